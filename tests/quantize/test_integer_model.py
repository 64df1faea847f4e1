"""The Python side of quantization: the model that the command makes, and inputs as users have them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import quantize as package
from mamba_int.datasets import DataSource, load_data
from mamba_int.errors import MambaintError
from mamba_int.float_models.config import MambaConfig
from mamba_int.float_models.models import MambaForCausalLM, MambaForSequenceClassification
from quantize import IntegerModel, quantize
from quantize.conversion_config import PROVABLE, InputFormat
from quantize.native import quantize_native
from tests.quantize.checkpoints import write_checkpoint
from tests.quantize.float_checkpoints import SMALL, write_float_run

pytestmark = pytest.mark.usefixtures("references")


def classifier(**changes: object) -> MambaForSequenceClassification:
    torch.manual_seed(0)
    shape = {"n_features": 3, "num_labels": 4, "pooling": "mean"}
    return MambaForSequenceClassification(MambaConfig(**(SMALL | shape | changes))).eval()


@pytest.mark.parametrize("scale", [0.01, 1.0, 40.0, 1000.0])
def test_logits_of_real_inputs_are_those_of_the_float_model(scale: float) -> None:
    """Inputs of any size must be read on a scale that holds them, and with enough places."""
    model = classifier()
    samples = torch.randn(24, 5, 3, generator=torch.Generator().manual_seed(1)) * scale
    with torch.no_grad():
        first = model.backbone.embeddings
        assert isinstance(first, nn.Linear)
        first.weight /= scale
        expected = model(samples).logits.numpy()
    found = quantize(model, samples).run(samples)
    assert np.abs(found - expected).max() < 0.1 * np.abs(expected).max()


def test_saved_model_is_the_same_model_and_runs_arrays_and_lists(tmp_path: Path) -> None:
    model = quantize(classifier(), np.random.default_rng(0).random((8, 5, 3)), PROVABLE)
    assert model.graph.input.integer("low") == 0 and model.graph.max_bits <= 24
    model.save(tmp_path / "m.mint")
    again = IntegerModel.load(str(tmp_path / "m.mint"))
    assert again.model_id == model.model_id
    inputs = np.random.default_rng(1).random((2, 5, 3))
    assert (again.run(inputs.tolist()) == model.run(torch.from_numpy(inputs))).all()


def test_path_gives_the_model_of_the_command_and_takes_its_own_data(tmp_path: Path) -> None:
    write_float_run(tmp_path / "checkpoint.safetensors", DataSource("digits"))
    model = quantize(tmp_path, samples=8)
    data = load_data(DataSource("digits"))
    assert model.graph.card["dataset"]["fingerprint"] == data.fingerprint()
    assert model.run(data.test_inputs[:3]).shape == (3, 10)  # type: ignore[union-attr]


def test_native_run_keeps_its_frozen_integers(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoint.safetensors", DataSource("digits"))
    expected = quantize_native(tmp_path / "checkpoint.safetensors").model_id
    assert quantize(str(tmp_path)).model_id == expected
    with pytest.raises(MambaintError, match="leave out calibration"):
        quantize(tmp_path, config=PROVABLE)


def test_token_ids_are_integers_of_the_vocabulary() -> None:
    torch.manual_seed(0)
    model = MambaForCausalLM(MambaConfig(**(SMALL | {"vocab_size": 20}))).eval()
    integers = quantize(model, torch.arange(40).reshape(4, 10) % 20)
    assert integers.run([[1, 2, 19]]).shape == (1, 3, 20)
    for wrong in ([[20]], [[-1]], [[0.5]]):
        with pytest.raises(MambaintError):
            integers.run(wrong)


@pytest.mark.parametrize(
    ("calibration", "words"),
    [
        (None, "no calibration data"),
        (np.zeros((0, 5, 3)), "no calibration data"),
        (np.full((2, 5, 3), np.nan), "not finite"),
        (np.full((2, 5, 3), 1e9), "16 bits"),
        (np.zeros((2, 5, 4)), "shape"),
        (np.zeros((2, 5)), "shape"),
    ],
)
def test_calibration_data_that_does_not_fit_is_refused(calibration: object, words: str) -> None:
    with pytest.raises(MambaintError, match=words):
        quantize(classifier(), calibration)  # type: ignore[arg-type]


def test_format_of_inputs_is_taken_as_given() -> None:
    model = quantize(classifier(), np.ones((4, 5, 3)), input_format=InputFormat(-8, 8, 2))
    assert model.integers(np.full((1, 5, 3), 1.3)).max() == 5
    assert model.integers(np.full((1, 5, 3), 9.0)).max() == 8


def test_package_offers_its_names_and_no_others() -> None:
    assert package.quantize is quantize
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = package.nothing
