"""Decoding in ONNX Runtime is the whole run and the decoder: every integer, at any position."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from circuits.runtime import OnnxDecoder, OnnxRunner, decoding_onnx, runtime_onnx
from mamba_int.decoder import Decoder
from mamba_int.decoding_state import DecodingState
from mamba_int.errors import MambaintError
from mamba_int.graph import Graph, IntArray
from mamba_int.interpreter import evaluate, evaluate_step
from quantize.float_mamba import PROVABLE, ConversionConfig
from tests.circuits.conftest import GRAPHS
from tests.circuits_runtime.models import random_graph
from tests.mamba_int.graphs import random_batch
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
    "mamba2_24_bits": ("language", dataclasses.replace(PROVABLE, pieces=0, chunk_size=8)),
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
    tokens, lengths = tokens[:3], [3, 8, 5]
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
    np.testing.assert_array_equal(decoder.step(tokens[:, 0]), whole[:, 0])


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


def test_a_scan_without_state_is_equal_and_ends_with_its_chunk() -> None:
    graph = next(
        g
        for g in (make() for make in GRAPHS.values())
        if any(n.op == "ssd" and len(n.inputs) == 4 for n in g.nodes)
    )
    chunk = next(node for node in graph.nodes if node.op == "ssd").integer("chunk_size")
    inputs = random_batch(graph, count=2, seq_len=chunk)
    whole, decoder = evaluate(graph, inputs), OnnxDecoder(graph, len(inputs))
    for t in range(chunk):
        np.testing.assert_array_equal(decoder.step(inputs[:, t]), whole[:, t])
    with pytest.raises(MambaintError, match="beyond the one chunk"):
        decoder.step(inputs[:, 0])


def test_no_weight_is_stored_wider_than_it_is_and_bytes_repeat() -> None:
    graph, _ = language_model("mamba2")
    for content in (runtime_onnx(graph), decoding_onnx(graph).step):
        model = onnx.load_from_string(content)
        onnx.checker.check_model(model, full_check=True)
        wide = [t for t in model.graph.initializer if t.data_type in (TensorProto.INT32, TensorProto.INT64)]
        assert max(np.prod(t.dims, dtype=int) for t in wide) <= 64
    assert decoding_onnx(graph) == decoding_onnx(graph)
