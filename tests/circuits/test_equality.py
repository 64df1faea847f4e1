"""Every circuit computes the integers of the interpreter, and EZKL accepts and counts it as predicted."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from circuits.circuit import Witness
from circuits.lowering import LoweredCircuit, build_circuit
from mamba_int.errors import MambaintError
from mamba_int.graph import Graph
from mamba_int.operations import OPERATIONS
from tests.circuits.conftest import (
    GRAPHS,
    MODELS,
    assert_equal_to_interpreter,
    extreme_inputs,
    native_graph,
    random_input,
)
from zk.prove import mock


@functools.cache
def built(name: str) -> tuple[Graph, LoweredCircuit]:
    """The graph and the circuit of a name in ``FORMS`` or ``MODEL_FORMS``."""
    form = name.removesuffix(POLYNOMIAL)
    plain = form.removesuffix(CLAIMED)
    graph = GRAPHS[plain]() if plain in GRAPHS else native_graph(**MODELS[plain])
    return graph, build_circuit(graph, challenged=form != plain, lookups=form == name)


CLAIMED = "@claimed"
"""Behind a name: the form whose products are checked at a random point."""
POLYNOMIAL = "@polynomial"
"""Behind either: the form without lookups."""

FORMS = [
    *GRAPHS,
    *(name + CLAIMED for name in GRAPHS if built(name + CLAIMED)[1].circuit.challenged),
]
MODEL_FORMS = [*MODELS, *(name + CLAIMED for name in MODELS)]


def test_every_operation_has_a_graph_of_its_own() -> None:
    covered = {node.op for make in GRAPHS.values() for node in make().nodes}
    assert covered == set(OPERATIONS)


@pytest.mark.parametrize("name", FORMS)
def test_operation_equals_the_interpreter_and_ezkl_accepts_it(name: str) -> None:
    graph, lowered = built(name)
    inputs = [*extreme_inputs(graph), random_input(graph)]
    for x in inputs:
        assert_equal_to_interpreter(graph, lowered, x)
    # EZKL's own row count and the settings guard are checked inside.
    assert all(mock(lowered.circuit, [lowered.witness(x) for x in inputs]))


@pytest.mark.parametrize("name", MODEL_FORMS)
def test_model_equals_the_interpreter_and_ezkl_accepts_it(name: str) -> None:
    graph, lowered = built(name)
    inputs = [*extreme_inputs(graph), random_input(graph)]
    for x in inputs:
        assert_equal_to_interpreter(graph, lowered, x)
    assert all(mock(lowered.circuit, [lowered.witness(inputs[0]), lowered.witness(inputs[-1])]))


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(GRAPHS)), st.integers(0, 2**32), st.floats(0, 1))
def test_any_input_of_any_operation_equals_the_interpreter(name: str, seed: int, extreme: float) -> None:
    graph, lowered = built(name)
    assert_equal_to_interpreter(graph, lowered, mixed_input(graph, seed, extreme))


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(set(MODELS) - {"carried_state_many_heads"})), st.integers(0, 2**32))
def test_any_input_of_any_model_equals_the_interpreter(name: str, seed: int) -> None:
    graph, lowered = built(name)
    assert_equal_to_interpreter(graph, lowered, mixed_input(graph, seed, 0.5))


def mixed_input(graph: Graph, seed: int, extreme: float) -> np.ndarray:
    """Uniform values of which a share is pushed to either end of the range."""
    tensor, random = graph.types[graph.input.name], np.random.default_rng(seed)
    ends = np.where(random.random(tensor.shape) < 0.5, tensor.low, tensor.high)
    pick = random.random(tensor.shape) < extreme
    return np.where(pick, ends, random.integers(tensor.low, tensor.high + 1, tensor.shape))


def test_the_same_graph_gives_the_same_bytes() -> None:
    first, second = (build_circuit(GRAPHS["ssd_carried"]()).circuit for _ in range(2))
    assert first == second


def test_more_rows_than_needed_give_the_same_answers() -> None:
    graph = GRAPHS["ssd_carried"]()
    x = random_input(graph)
    for logrows in (10, 11, 13):
        lowered = build_circuit(graph, logrows=logrows)
        assert_equal_to_interpreter(graph, lowered, x)
        assert mock(lowered.circuit, [lowered.witness(x)]) == [True]


def test_too_few_rows_are_refused_with_the_reason() -> None:
    with pytest.raises(MambaintError, match="2\\^8 rows"):
        build_circuit(GRAPHS["ssd_carried"](), logrows=8)


@pytest.mark.parametrize("name", ["embedding", "linear_ternary", "ssd_carried"])
def test_public_input_is_shown_and_a_wrong_one_is_rejected(name: str) -> None:
    graph = GRAPHS[name]()
    lowered = build_circuit(graph, public_input=True)
    x = random_input(graph)
    witness = lowered.witness(x)
    assert [tensor.name for tensor in lowered.circuit.public] == ["input", "logits", "anchor"]
    assert witness.public["input"] == x.ravel().tolist()
    wrong = dict(witness.public)
    wrong["input"] = [wrong["input"][0] - 1, *wrong["input"][1:]]
    claims: list[Witness] = [witness, dataclasses.replace(witness, public=wrong)]
    assert mock(lowered.circuit, claims) == [True, False]
