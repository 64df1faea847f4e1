"""EZKL sees constants as float32, merges equal ones and decomposes those: none may be rounded or repeated."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import numpy_helper

from circuits.cells import Cells, float_parts
from circuits.circuit import InputTensor
from circuits.constraint_onnx import write_onnx
from circuits.lowering import build_circuit
from mamba_int.errors import MambaintError
from tests.circuits.conftest import assert_equal_to_interpreter, chain, extreme_inputs, node
from tests.circuits.test_equality import FORMS, MODEL_FORMS, built
from zk.prove import mock

LARGE = 123_456_789_123
"""37 bits, odd: two float32 constants."""
ONE_INPUT = (InputTensor("witness", (("x", 2),)),)


@given(st.lists(st.integers(-(1 << 100), 1 << 100), min_size=1, max_size=5))
def test_float_parts_are_exact_and_add_up(values: list[int]) -> None:
    parts = float_parts(np.array(values, dtype=object))
    assert [sum(part[i] for part in parts) for i in range(len(values))] == values
    for part in parts:
        assert [int(np.float32(v)) for v in part] == part.tolist()


@pytest.mark.parametrize("op", ["add", "sub", "mul"])
@pytest.mark.parametrize("value", [LARGE, -LARGE, [LARGE, 1, -LARGE - 2, (1 << 24) + 1]])
def test_a_constant_beyond_24_bits_is_not_rounded(op: str, value: int | list[int]) -> None:
    graph = chain(node("out", op, "input", constants={"value": value}), T=3)
    lowered = build_circuit(graph)
    x = extreme_inputs(graph)[2]
    assert_equal_to_interpreter(graph, lowered, x)
    assert mock(lowered.circuit, [lowered.witness(x)]) == [True]


@pytest.mark.parametrize("pooled", [False, True])
def test_a_bias_beyond_24_bits_is_not_rounded(pooled: bool) -> None:
    held = {"weight": np.ones((3, 4)), "bias": [LARGE, -LARGE, 5]}
    before = [node("last", "reduce", "input", kind="last")] if pooled else []
    source = "last" if pooled else "input"
    graph = chain(
        *before, node("lin", "linear", source, constants=held), node("q", "shift", "lin", places=25)
    )
    lowered = build_circuit(graph, logrows=17)
    x = extreme_inputs(graph)[2]
    assert_equal_to_interpreter(graph, lowered, x)
    assert mock(lowered.circuit, [lowered.witness(x)]) == [True]


def test_a_packed_bias_beyond_24_bits_is_not_rounded() -> None:
    held = {"weight": np.ones((3, 4)), "bias": [(1 << 24) + 1, -(1 << 25) - 3, 5]}
    graph = chain(node("lin", "linear", "input", constants=held), node("q", "shift", "lin", places=13))
    lowered = build_circuit(graph, logrows=17)
    assert any(".rho" in name for name, _ in lowered.circuit.private), "the packed form"
    x = extreme_inputs(graph)[2]
    assert_equal_to_interpreter(graph, lowered, x)
    assert mock(lowered.circuit, [lowered.witness(x)]) == [True]


def test_norm_of_a_width_whose_thresholds_exceed_24_bits() -> None:
    # d 4^j + 1 for d = 40: the first wide model a float32 constant would have rounded.
    graph = chain(
        node("y", "norm", "input", input_shift=0, input_limit=9000, octaves=13, per_octave=1, frac=4),
        T=1,
        C=40,
        low=-9000,
        high=9000,
    )
    lowered = build_circuit(graph)
    for x in extreme_inputs(graph):
        assert_equal_to_interpreter(graph, lowered, x)
    assert mock(lowered.circuit, [lowered.witness(extreme_inputs(graph)[2])]) == [True]


def test_a_constant_no_float32_holds_is_refused_with_a_remedy() -> None:
    cells = Cells(8)
    x = cells.private("x", (2,), 0, 1, lambda get: np.zeros(2, np.int64))
    huge = cells.mul(x, cells.constant([1 << 130]))
    with pytest.raises(MambaintError, match="float32"):
        write_onnx(cells, ONE_INPUT, {"huge": huge})


def test_a_constant_first_operand_beyond_24_bits_is_refused_with_a_remedy() -> None:
    cells = Cells(8)
    x = cells.private("x", (2,), 0, 1, lambda get: np.zeros(2, np.int64))
    difference = cells.sub(cells.constant([LARGE]), x)
    with pytest.raises(MambaintError, match="float32"):
        write_onnx(cells, ONE_INPUT, {"difference": difference})


@pytest.mark.parametrize("name", [*FORMS, *MODEL_FORMS])
def test_no_constant_is_written_twice(name: str) -> None:
    _, lowered = built(name)
    graph = onnx.load_from_string(lowered.circuit.onnx).graph
    floats = [
        tuple(numpy_helper.to_array(tensor).ravel().tolist())
        for tensor in graph.initializer
        if tensor.data_type == onnx.TensorProto.FLOAT
    ]
    assert len(floats) == len(set(floats))


def test_a_serial_number_does_not_repeat_another_constant() -> None:
    # The second [7] is written as [7, 3], which is the third constant here.
    cells = Cells(8)
    x = cells.private("x", (2,), 0, 1, lambda get: np.zeros(2, np.int64))
    y = cells.add(cells.add(cells.add(x, cells.constant([7])), cells.constant([7, 3])), cells.constant([7]))
    model = onnx.load_from_string(write_onnx(cells, ONE_INPUT, {"y": y}))
    floats = [tuple(numpy_helper.to_array(t).tolist()) for t in model.graph.initializer if t.data_type == 1]
    assert len(floats) == len(set(floats)) == 3
