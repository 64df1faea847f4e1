"""Converted models with ternary projections: which matrices those are, and the same integers everywhere."""

from __future__ import annotations

import numpy as np
import pytest

from circuits.runtime.runner import OnnxRunner
from mamba_int.errors import MambaintError
from mamba_int.graph import IntArray
from quantize.calibration import calibrate
from quantize.equality import compare, torch_tracer
from quantize.float_mamba import ConversionConfig, build
from tests.quantize.test_float_mamba import converted, noise, random_model

TERNARY = ConversionConfig(weights="ternary")
RECONSTRUCTED = ConversionConfig(weights="ternary", reconstruct=True)


@pytest.mark.parametrize("config", [TERNARY, RECONSTRUCTED])
@pytest.mark.parametrize(
    ("name", "others"),
    [("last", {"embed", "logits"}), ("language_odd", {"logits"}), ("mamba_language", {"dt_proj", "logits"})],
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


@pytest.mark.parametrize("name", ["last", "language_odd", "mamba_language"])
def test_backends_compute_the_same_integers_of_ternary_rows(name: str) -> None:
    conversion, *_, integers = converted(name, RECONSTRUCTED)
    graph = conversion.graph
    runner = OnnxRunner(graph)

    def onnx_trace(batch: IntArray) -> dict[str, IntArray]:
        tensors: dict[str, IntArray] = {}
        runner(batch, tensors)
        return tensors

    equality = compare(graph, integers, {"torch": torch_tracer(graph), "onnx": onnx_trace})
    assert equality.equal, equality.first


@pytest.mark.parametrize("name", ["last", "language", "mamba_language"])
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
