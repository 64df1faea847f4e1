"""The comparison itself: it must see every kind of difference."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from mamba_int.graph import IntArray
from mamba_int.interpreter import evaluate
from mamba_int.operations.base import Trace
from quantize.equality import compare
from tests.circuits_runtime.models import random_graph


def enter(found: Trace, tensors: Trace) -> None:
    for name, tensor in found.items():
        tensors[name] = tensor


def one_value(trace: Trace) -> None:
    trace["layer0.ssd.A"][-1, 0, 0, 0, 0] += 1


def one_missing(trace: Trace) -> None:
    del trace["layer0.ssd.A"]


def one_too_many(trace: Trace) -> None:
    trace["layer0.extra"] = np.zeros(3)


def another_shape(trace: Trace) -> None:
    trace["layer0.ssd.A"] = trace["layer0.ssd.A"][:1]


def half_an_integer(trace: Trace) -> None:
    trace["layer0.ssd.A"] = trace["layer0.ssd.A"] + 0.5


def not_a_number(trace: Trace) -> None:
    trace["layer0.ssd.A"] = np.full(trace["layer0.ssd.A"].shape, np.nan)


@pytest.mark.parametrize(
    ("change", "tensor"),
    [
        (one_value, "layer0.ssd.A"),
        (one_missing, "layer0.ssd.A"),
        (one_too_many, "layer0.extra"),
        (another_shape, "layer0.ssd.A"),
        (half_an_integer, "layer0.ssd.A"),
        (not_a_number, "layer0.ssd.A"),
    ],
)
def test_a_difference_is_counted_and_named(change: Callable[[Trace], None], tensor: str) -> None:
    graph, inputs = random_graph()

    def faulty(batch: IntArray, tensors: Trace) -> None:
        trace: dict[str, IntArray] = {}
        evaluate(graph, batch, trace)
        trace = {name: value.copy() for name, value in trace.items()}
        change(trace)
        enter(trace, tensors)

    equality = compare(graph, inputs, {"faulty": faulty})
    assert not equality.equal and equality.mismatches > 0
    assert equality.first == ("faulty", tensor)


def test_the_first_difference_is_the_first_computed() -> None:
    graph, inputs = random_graph()

    def all_wrong(batch: IntArray, tensors: Trace) -> None:
        trace: dict[str, IntArray] = {}
        evaluate(graph, batch, trace)
        enter({name: value + 1 for name, value in reversed(trace.items())}, tensors)

    equality = compare(graph, inputs, {"wrong": all_wrong})
    assert equality.first == ("wrong", "input") and equality.mismatches == equality.values


def test_logits_of_a_runner_are_compared() -> None:
    graph, inputs = random_graph()
    equality = compare(graph, inputs, {}, {"wrong": lambda batch: evaluate(graph, batch) - 1})
    assert (equality.first, equality.mismatches) == (("wrong", "logits"), len(inputs) * 5)


def test_comparing_nothing_is_not_equality() -> None:
    graph, inputs = random_graph()
    assert not compare(graph, inputs[:0], {}).equal


def test_every_input_is_compared_whatever_the_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, inputs = random_graph()
    seen: list[IntArray] = []

    def trace(batch: IntArray, tensors: Trace) -> None:
        seen.append(batch)
        evaluate(graph, batch, tensors)

    monkeypatch.setattr("quantize.equality.BATCH_VALUES", 10_000)
    equality = compare(graph, inputs, {"numpy": trace})
    assert len(seen) > 2 and (np.concatenate(seen) == inputs).all()
    whole: dict[str, IntArray] = {}
    evaluate(graph, inputs, whole)
    assert equality.equal and equality.values == sum(value.size for value in whole.values())
