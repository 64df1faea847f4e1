"""Converted models with ternary projections: which matrices those are, and the same integers everywhere."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from circuits.lowering import build_circuit
from circuits.runtime.runner import OnnxRunner
from mamba_int.errors import MambaintError
from mamba_int.float_models.config import MambaConfig
from mamba_int.float_models.models import MambaForSequenceClassification
from quantize.calibration import calibrate
from quantize.equality import compare, torch_tracer
from quantize.float_mamba import PROVABLE, ConversionConfig, build, convert
from tests.quantize.test_float_mamba import FORMAT, SMALL, converted, noise, random_model
from zk.prove import mock

TERNARY = ConversionConfig(weights="ternary")
RECONSTRUCTED = ConversionConfig(weights="ternary", reconstruct=True)


@pytest.mark.parametrize("config", [TERNARY, RECONSTRUCTED])
@pytest.mark.parametrize(
    ("name", "others"),
    [
        ("last", {"embed", "logits"}),
        ("groups", {"embed", "logits"}),
        ("language_odd", {"logits"}),
        ("mamba_language", {"dt_proj", "logits"}),
    ],
)
def test_projections_are_ternary_and_nothing_else(
    name: str, others: set[str], config: ConversionConfig
) -> None:
    graph = converted(name, config)[0].graph
    weights = {
        node.name.removesuffix("_rows"): node.constants["weight"]
        for node in graph.nodes
        if node.op == "linear"
    }
    projections = [key for key in weights if key.endswith(("in_proj", "x_proj", "out_proj"))]
    assert len(projections) == (6 if name.startswith("mamba") else 4)
    for key in projections:
        assert set(np.unique(weights[key])) == {-1, 0, 1}, key
    assert all(
        np.abs(weight).max() > 1 for key, weight in weights.items() if key.rpartition(".")[2] in others
    )


@pytest.mark.parametrize("name", ["last", "language_odd", "mamba_language", "groups_language"])
def test_backends_compute_the_same_integers_of_ternary_rows(name: str) -> None:
    conversion, *_, integers = converted(name, RECONSTRUCTED)
    graph = conversion.graph
    equality = compare(graph, integers, {"torch": torch_tracer(graph), "onnx": OnnxRunner(graph)})
    assert equality.equal, equality.first


@pytest.mark.parametrize("name", ["last", "language", "mamba_language", "groups"])
def test_reconstructed_rows_follow_the_model_better(name: str) -> None:
    for plain, better in (
        (TERNARY, RECONSTRUCTED),
        (ConversionConfig(weight_bits=4), ConversionConfig(weight_bits=4, reconstruct=True)),
    ):
        assert noise(*converted(name, better)) < 0.8 * noise(*converted(name, plain))


def test_reconstruction_without_moments_is_refused() -> None:
    model, reals, _ = random_model("language")
    config = ConversionConfig(seq_len=reals.shape[1], reconstruct=True)
    with pytest.raises(MambaintError, match=r"layer0\.norm"):
        build(model, calibrate(model, reals), None, config)


def test_an_unknown_form_of_weights_is_named() -> None:
    with pytest.raises(MambaintError, match="weights = 'binary'"):
        ConversionConfig(weights="binary")  # type: ignore[arg-type]


def test_the_circuit_accepts_the_witness_of_ternary_rows() -> None:
    tiny = {"n_features": 1, "d_model": 4, "headdim": 4, "d_state": 2, "n_layer": 1, "num_labels": 2}
    torch.manual_seed(0)
    model = MambaForSequenceClassification(MambaConfig(**(SMALL | tiny)))
    integers = torch.randint(FORMAT.low, FORMAT.high + 1, (8, 3, 1))
    config = dataclasses.replace(PROVABLE, pieces=4, decay_index_bits=4, weights="ternary", reconstruct=True)
    graph = convert(model, integers * 2.0**-FORMAT.frac, FORMAT, config).graph
    assert graph.max_bits <= 24
    lowered = build_circuit(graph)
    assert mock(lowered.circuit, [lowered.witness(integers[0].numpy())]) == [True]
