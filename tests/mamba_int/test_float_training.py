"""Float models in the trainer of the native ones: what must hold for both, and what floats have not."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from mamba_int.config import MambaIntConfig
from mamba_int.datasets.text_file import split_text
from mamba_int.errors import MambaintError
from mamba_int.float_models.config import MambaConfig
from mamba_int.training import TrainingConfig, load_checkpoint, save_checkpoint, train
from mamba_int.training.float_model import input_places, restored_float_model
from mamba_int.training.run import CHECKPOINT_FILE, LAST_FILE, STATE_FILE
from quantize.native import native_graph
from tests.mamba_int.stand_in import SOURCE, assert_same_tensors, interrupt_at, make_data, tensors_of

TEXT = MambaConfig(mixer="mamba2", vocab_size=256, d_model=8, n_layer=1, headdim=8, d_state=4)
CLASSES = MambaConfig(mixer="mamba", n_features=3, num_labels=3, d_model=8, n_layer=2, d_state=2, dropout=0.3)
pytestmark = pytest.mark.usefixtures("references")

RECIPE = TrainingConfig(
    steps=8,
    batch_size=6,
    sequence_length=12,
    evaluation_length=32,
    warmup_steps=2,
    validate_every=3,
    checkpoint_every=5,
)


def test_interrupted_float_training_ends_with_the_same_bits(tmp_path: Path) -> None:
    """Dropout draws from the global generator, which the state must restore."""
    data = make_data()
    train(CLASSES, RECIPE, data, SOURCE, tmp_path / "whole", device="cpu")
    with pytest.raises(MambaintError, match="interrupted after step 4"):
        train(CLASSES, RECIPE, data, SOURCE, tmp_path / "parts", device="cpu", progress=interrupt_at(4))
    assert train(CLASSES, RECIPE, data, SOURCE, tmp_path / "parts", device="cpu").resumed
    for name in (CHECKPOINT_FILE, LAST_FILE, STATE_FILE):
        assert_same_tensors(tmp_path / "whole" / name, tmp_path / "parts" / name)


def test_checkpoint_gives_back_the_model_that_was_tested(tmp_path: Path) -> None:
    """Reading the inputs at another scale than in training would be another model."""
    data = make_data()
    result = train(CLASSES, RECIPE, data, SOURCE, tmp_path, device="cpu")
    checkpoint = load_checkpoint(result.checkpoint)
    assert checkpoint.model_config == CLASSES and not checkpoint.integers
    predicted = restored_float_model(checkpoint)(data.test_inputs).argmax(-1)
    assert float((predicted == data.test_labels).double().mean()) == pytest.approx(result.test_metric)
    reals = data.test_inputs * 2.0 ** -input_places(data.input_low, data.input_high)
    assert float(reals.max()) <= 1
    with torch.no_grad():
        whole = restored_float_model(checkpoint)
        assert torch.equal(whole.model(reals).logits, whole(data.test_inputs))


@pytest.mark.parametrize(
    ("low", "high", "places"), [(0, 1, 0), (0, 2, 1), (0, 16, 4), (-127, 127, 7), (-3, 1, 2)]
)
def test_largest_input_is_between_a_half_and_one(low: int, high: int, places: int) -> None:
    assert input_places(low, high) == places
    assert 0.5 < max(-low, high) * 2.0**-places <= 1


def test_micro_batches_add_up_to_the_step_of_the_whole_batch(tmp_path: Path) -> None:
    data = split_text(bytes(range(97, 123)) * 20, "letters")
    for parts in (1, 3):
        recipe = dataclasses.replace(RECIPE, micro_batches=parts)
        train(TEXT, recipe, data, SOURCE, tmp_path / str(parts), device="cpu")
    whole, cut = (tensors_of(tmp_path / str(parts) / LAST_FILE) for parts in (1, 3))
    for name, value in whole.items():
        torch.testing.assert_close(cut[name], value, atol=2e-3, rtol=1e-3)


def test_gradient_checkpointing_reaches_the_layers(tmp_path: Path) -> None:
    data = split_text(bytes(range(97, 123)) * 20, "letters")
    recipe = dataclasses.replace(RECIPE, steps=2, gradient_checkpointing=True)
    train(TEXT, recipe, data, SOURCE, tmp_path / "anew", device="cpu")
    train(
        TEXT,
        dataclasses.replace(recipe, gradient_checkpointing=False),
        data,
        SOURCE,
        tmp_path / "kept",
        device="cpu",
    )
    for name, value in tensors_of(tmp_path / "kept" / LAST_FILE).items():
        torch.testing.assert_close(tensors_of(tmp_path / "anew" / LAST_FILE)[name], value)


def test_half_precision_is_refused_where_it_would_round_integers(tmp_path: Path) -> None:
    data = make_data()
    native = MambaIntConfig(seq_len=4, n_features=3, n_classes=3)
    recipe = dataclasses.replace(RECIPE, autocast="bfloat16")
    with pytest.raises(MambaintError, match="would round the integers"):
        train(native, recipe, data, SOURCE, tmp_path, device="cpu")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n_features": 4}, "n_features = 4, the data made has 3"),
        ({"num_labels": 2}, "num_labels = 2, the data made has 3"),
        ({"n_features": 0}, "n_features = 0"),
    ],
)
def test_float_model_of_another_shape_than_the_data_is_refused(
    changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(MambaintError, match=words):
        train(dataclasses.replace(CLASSES, **changes), RECIPE, make_data(), SOURCE, tmp_path, device="cpu")


def test_weights_of_another_shape_and_native_use_of_a_float_checkpoint_are_refused(tmp_path: Path) -> None:
    result = train(CLASSES, dataclasses.replace(RECIPE, steps=1), make_data(), SOURCE, tmp_path, device="cpu")
    checkpoint = load_checkpoint(result.checkpoint)
    with pytest.raises(MambaintError, match="float model, which has no integers"):
        native_graph(checkpoint)
    wider = dataclasses.replace(CLASSES, d_model=1 << 16)
    save_checkpoint(
        tmp_path / "lies.safetensors",
        wider,
        checkpoint.training_config,
        checkpoint.data,
        checkpoint.results,
        checkpoint.model_state,
        {},
    )
    with pytest.raises(MambaintError, match="do not fit its configuration"):
        restored_float_model(load_checkpoint(tmp_path / "lies.safetensors"))


@pytest.mark.gpu
def test_resumed_replayed_steps_draw_the_same_dropout(tmp_path: Path) -> None:
    """What is run once before a capture must not use up random numbers."""
    data = make_data()
    train(CLASSES, RECIPE, data, SOURCE, tmp_path / "whole", device="cuda")
    with pytest.raises(MambaintError, match="interrupted"):
        train(CLASSES, RECIPE, data, SOURCE, tmp_path / "parts", device="cuda", progress=interrupt_at(4))
    train(CLASSES, RECIPE, data, SOURCE, tmp_path / "parts", device="cuda")
    assert_same_tensors(tmp_path / "whole" / LAST_FILE, tmp_path / "parts" / LAST_FILE)


@pytest.mark.gpu
def test_half_precision_trains_on_a_gpu(tmp_path: Path) -> None:
    data = split_text(bytes(range(97, 123)) * 40, "letters")
    recipe = dataclasses.replace(RECIPE, autocast="bfloat16", steps=60, learning_rate=1e-2)
    result = train(TEXT, recipe, data, SOURCE, tmp_path, device="cuda")
    assert result.test_metric < 6
    weights = tensors_of(result.checkpoint).values()
    assert all(value.dtype == torch.float32 for value in weights)
