"""Decoding in ONNX Runtime is the whole run and the decoder: every integer, at any position."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from circuits.runtime import OnnxDecoder, OnnxRunner, decoding_onnx, runtime_onnx
from mamba_int.decoder import Decoder
from mamba_int.decoding_state import DecodingState
from mamba_int.errors import MambaintError
from mamba_int.graph import Graph, IntArray, Node
from mamba_int.interpreter import evaluate, evaluate_step
from quantize.float_mamba import ConversionConfig
from tests.circuits_runtime.models import features, graph_of, random_graph
from tests.mamba_int.test_decoder import assert_same_state
from tests.quantize.test_float_mamba import converted

TEXT: dict[str, Any] = {"task": "language_model", "vocab_size": 11, "seq_len": 13, "chunk_size": 4}
FORMS: dict[str, dict[str, Any]] = {
    "table": {"n_layer": 2},
    "shear": {"rotation": "shear", "weights": "int8", "activation": "squareplus", "gate": "algebraic"},
    "none": {"rotation": "none", "conv_bias": False, "d_conv": 1},
    "wide": {"d_conv": 6, "chunk_size": 1},
    "one_chunk": {"chunk_size": 16},
}
CONVERTED: dict[str, tuple[str, ConversionConfig]] = {
    "mamba2": ("language", ConversionConfig(chunk_size=4)),
    "mamba2_odd": ("language_odd", ConversionConfig(chunk_size=5, pieces=4)),
    "mamba2_24_bits": ("language", ConversionConfig(chunk_size=8, max_bits=24)),
    "mamba": ("mamba_language", ConversionConfig(chunk_size=6)),
}


def language_model(name: str) -> tuple[Graph, IntArray]:
    if name in FORMS:
        return random_graph(**(TEXT | FORMS[name]))
    conversion, *_, tokens = converted(*CONVERTED[name])
    return conversion.graph, tokens[:3]


@pytest.mark.parametrize("name", [*FORMS, *CONVERTED])
def test_every_integer_of_every_step_is_the_specifications_and_its_logits_those_of_the_whole_run(
    name: str,
) -> None:
    graph, tokens = language_model(name)
    whole = evaluate(graph, tokens)
    np.testing.assert_array_equal(OnnxRunner(graph)(tokens), whole)
    decoder, state = OnnxDecoder(graph, len(tokens)), DecodingState.of(graph, len(tokens))
    for t in range(tokens.shape[1]):
        wanted: dict[str, IntArray] = {}
        evaluate_step(graph, tokens[:, t], state, wanted)
        found: dict[str, IntArray] = {}
        logits = decoder.step(tokens[:, t], found if t % 2 else None)
        np.testing.assert_array_equal(logits, whole[:, t], err_msg=f"logits at {t}")
        for key, value in found.items():
            np.testing.assert_array_equal(value, wanted[key], err_msg=f"{key} at {t}")
        if found:
            assert set(graph.by_name) <= set(found)
        assert_same_state(decoder.snapshot(), state)


@pytest.mark.parametrize("name", ["table", "mamba2", "mamba"])
def test_a_prompt_of_the_torch_decoder_goes_on_here_at_positions_of_its_own(name: str) -> None:
    graph, tokens = language_model(name)
    lengths = [3, 8, 5]
    torch_decoder = Decoder(graph, 3)
    torch_decoder.prefill([row[:length] for row, length in zip(tokens, lengths, strict=True)])
    decoder = OnnxDecoder(graph, 3)
    decoder.step(tokens[:, 0])
    decoder.restore(torch_decoder.snapshot())
    whole = evaluate(graph, tokens)
    for t in range(5):
        now = [length + t for length in lengths]
        logits = decoder.step(tokens[range(3), now])
        np.testing.assert_array_equal(logits, whole[range(3), now])
    decoder.reset()
    np.testing.assert_array_equal(decoder.step(tokens[:3, 0]), whole[:3, 0])


def test_a_classifier_and_a_step_of_another_shape_and_a_foreign_state_are_refused() -> None:
    with pytest.raises(MambaintError, match="needs all steps at once"):
        OnnxDecoder(random_graph()[0])
    graph, tokens = language_model("table")
    decoder = OnnxDecoder(graph, 2)
    with pytest.raises(MambaintError, match="a step has shape"):
        decoder.step(tokens[0, 0])
    with pytest.raises(MambaintError, match="is not an integer in"):
        decoder.step([0, 11])
    with pytest.raises(MambaintError, match="the state is of the model"):
        decoder.restore(DecodingState.of(language_model("none")[0], 2))
    with pytest.raises(MambaintError, match="decoder of batch"):
        decoder.restore(DecodingState.of(graph, 3))


def test_the_one_chunk_of_a_model_without_a_carried_state_ends() -> None:
    graph, tokens = random_graph(**(TEXT | {"seq_len": 4}))
    decoder = OnnxDecoder(graph, len(tokens))
    for t in range(4):
        decoder.step(tokens[:, t])
    with pytest.raises(MambaintError, match="beyond the one chunk"):
        decoder.step(tokens[:, 0])


def test_no_weight_is_stored_wider_than_it_is_and_bytes_repeat() -> None:
    graph, _ = language_model("mamba2")
    for content in (runtime_onnx(graph), decoding_onnx(graph).step):
        model = onnx.load_from_string(content)
        onnx.checker.check_model(model, full_check=True)
        wide = [t for t in model.graph.initializer if t.data_type in (TensorProto.INT32, TensorProto.INT64)]
        assert max(np.prod(t.dims, dtype=int) for t in wide) <= 64
    assert decoding_onnx(graph) == decoding_onnx(graph)


def linear(low: int, high: int, weight: IntArray) -> tuple[Graph, list[str]]:
    graph = graph_of(
        features(low, high, weight.shape[1]), Node("y", "linear", ("input",), constants={"weight": weight})
    )
    return graph, [node.op_type for node in onnx.load_from_string(runtime_onnx(graph)).graph.node]


@pytest.mark.parametrize(
    ("low", "high", "largest", "stored"),
    [
        (-127, 127, 64, TensorProto.INT8),
        (-127, 127, 65, TensorProto.UINT8),
        (-127, 127, 127, TensorProto.UINT8),
        (0, 127, 127, TensorProto.INT8),
        (0, 255, 1, TensorProto.INT8),
        (-128, 127, 127, TensorProto.UINT8),
        (-200, 55, 127, TensorProto.UINT8),
        (3, 100, 127, TensorProto.INT8),
    ],
)
def test_int8_products_that_a_kernel_without_vnni_would_saturate_are_of_uint8(
    low: int, high: int, largest: int, stored: int
) -> None:
    """Every corner of the interval against weights of both signs at their largest, on many terms."""
    random = np.random.default_rng(0)
    weight = np.concatenate([np.full((1, 96), largest), random.choice([-largest, largest], (7, 96))])
    graph, kinds = linear(low, high, weight)
    assert "MatMulInteger" in kinds
    (matrix,) = [t for t in onnx.load_from_string(runtime_onnx(graph)).graph.initializer if len(t.dims) == 2]
    assert matrix.data_type == stored
    inputs = random.choice([low, high], (64, 1, 96))
    inputs[0], inputs[1] = low, high
    np.testing.assert_array_equal(OnnxRunner(graph)(inputs), evaluate(graph, inputs))


@pytest.mark.parametrize("bits", [24, 25, 50])
def test_products_beyond_int8_are_exact_at_the_edge_of_their_float(bits: int) -> None:
    """2^24 is the last sum that float32 holds; odd sums beyond it must be in float64."""
    width, weight = 4, (1 << (bits - 10)) - 1
    rows = np.full((3, width), weight)
    rows[1:, 0] += 1
    rows[2] *= -1
    graph, kinds = linear(-255, 255, rows)
    assert "MatMulInteger" not in kinds
    inputs = np.random.default_rng(0).choice([-255, 254, 255], (50, 1, width))
    np.testing.assert_array_equal(OnnxRunner(graph)(inputs), evaluate(graph, inputs))


@pytest.mark.parametrize("shape", [(1, 1), (6, 1), (6, 3), (1, 5)])
def test_matrices_that_only_scale_or_sum_are_no_products(shape: tuple[int, int]) -> None:
    outputs, width = shape
    scaling = np.kron(np.eye(width, dtype=np.int64), np.ones((outputs // width or 1, 1), np.int64))
    weight = scaling * np.arange(1, len(scaling) + 1)[:, None] * 1001 if outputs > 1 else np.ones(shape, int)
    graph, kinds = linear(-300, 300, weight.astype(np.int64))
    assert not {"MatMul", "MatMulInteger"} & set(kinds)
    inputs = np.random.default_rng(0).integers(-300, 301, (5, 1, width))
    np.testing.assert_array_equal(OnnxRunner(graph)(inputs), evaluate(graph, inputs))
