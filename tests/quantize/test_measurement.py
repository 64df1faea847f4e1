"""What the report says of a model: quality, saturation, operations, size."""

from __future__ import annotations

import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mamba_int import interpreter
from mamba_int.datasets import ClassificationData, DataSource, load_data
from mamba_int.errors import MambaintError
from mamba_int.executor import Executor
from mamba_int.graph import Graph, Node
from mamba_int.operations import OPERATIONS
from mamba_int.training import evaluate
from quantize.equality import Fingerprints
from quantize.measurement import measure, sample_inputs
from quantize.native import quantize_native
from quantize.operation_counts import COUNTERS, Counts, count_operations
from quantize.summary import summarize
from tests.circuits_runtime.models import features, graph_of
from tests.quantize.checkpoints import write_checkpoint

DIGITS = DataSource("digits")


def test_accuracy_is_that_of_training_and_the_confusion_counts_every_example(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "c", DIGITS)
    data = load_data(DIGITS)
    assert isinstance(data, ClassificationData)
    result = measure(quantize_native(tmp_path / "c"), data, 1024)
    score = evaluate(model, data, "test", torch.device("cpu"))
    assert (result.value, result.loss) == (score.metric, pytest.approx(score.loss, 1e-5))
    confusion = np.array(result.confusion)
    assert confusion.sum() == result.examples == 360
    assert (confusion.sum(1) == torch.bincount(data.test_labels, minlength=10).numpy()).all()
    assert np.trace(confusion) / 360 == result.value


def test_bits_per_byte_are_those_of_training(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_bytes(b"the cat sat on the mat. " * 40)
    source = DataSource("text", str(tmp_path / "t.txt"))
    model = write_checkpoint(tmp_path / "c", source)
    data = load_data(source)
    result = measure(quantize_native(tmp_path / "c"), data, 32)
    # Equal integers; only the logarithm is float32 there and float64 here.
    score = evaluate(model, data, "test", torch.device("cpu"), 32)
    assert result.value == pytest.approx(score.metric, 1e-6)
    assert result.loss == pytest.approx(score.loss, 1e-6)
    assert result.metric == "bits_per_byte" and result.examples == 64 and result.confusion == []


def test_long_text_is_read_in_windows_spread_over_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_bytes(np.random.default_rng(0).bytes(5120))
    source = DataSource("text", str(tmp_path / "t.txt"))
    write_checkpoint(tmp_path / "c", source)
    graph, data = quantize_native(tmp_path / "c"), load_data(source)
    monkeypatch.setattr("quantize.measurement.LARGEST_TEXT", 100)
    result = measure(graph, data, 32)
    assert result.examples == 96
    assert result.observed["input"].high - result.observed["input"].low > 100
    windows = sample_inputs(graph, data, 2, 4)
    assert windows.shape == (4, 16) and len({tuple(window) for window in windows.tolist()}) == 4


def test_sampled_sequences_are_spread_and_never_repeat(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "c", DIGITS)
    graph, data = quantize_native(tmp_path / "c"), load_data(DIGITS)
    assert isinstance(data, ClassificationData)
    assert (sample_inputs(graph, data, 2000, 0) == data.test_inputs.numpy()).all()
    assert (sample_inputs(graph, data, 3, 0) == data.test_inputs[[0, 120, 240]].numpy()).all()


def test_data_of_another_kind_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "c", DIGITS)
    (tmp_path / "t.txt").write_bytes(b"x" * 200)
    text = load_data(DataSource("text", str(tmp_path / "t.txt")))
    with pytest.raises(MambaintError, match="another kind"):
        measure(quantize_native(tmp_path / "c"), text, 32)


def test_saturation_counts_both_ends_and_nothing_else() -> None:
    clamp = Node("y", "clamp", ("input",), {"low": 3, "high": 9, "saturation": True})
    last = Node("logits", "reduce", ("y",), {"kind": "last"})
    graph = Graph((features(0, 16, 8), clamp, last), "logits", 8, {"task": "classification"})
    data = load_data(DIGITS)
    assert isinstance(data, ClassificationData)
    # The last row of 8 pixels stands for the logits, so there are 8 classes.
    relabelled = replace(data, test_labels=data.test_labels % 8)
    seen = measure(graph, relabelled, 1024).observed["y"]
    pixels = data.test_inputs.numpy()
    assert seen.saturated == ((pixels <= 3) | (pixels >= 9)).sum() and seen.values == pixels.size
    assert (seen.low, seen.high) == (3, 9)


def test_no_operation_of_the_graph_lacks_a_count() -> None:
    assert set(COUNTERS) == set(OPERATIONS)


def test_zero_weights_cost_nothing_and_powers_of_two_are_shifts() -> None:
    weight = np.array([[1, -1, 0, 1], [0, 0, 0, 0], [2, -4, 3, 0], [-1, 0, 0, 0]])
    nodes = (features(0, 3, 4), Node("y", "linear", ("input",), constants={"weight": weight}))
    assert count_operations(graph_of(*nodes, seq_len=5))["y"] == Counts(shifts=10, adds=20, multiplies=5)
    biased = Node("y", "linear", ("input",), constants={"weight": weight, "bias": np.ones(4, np.int64)})
    assert count_operations(graph_of(features(0, 3, 4), biased))["y"].adds == 4 + 3


def test_comparisons_and_choices_are_counted_and_tables_are_not() -> None:
    nodes = (
        features(-3, 3, 4),
        Node("g", "compare", ("input",), constants={"value": np.array(1)}),
        Node("s", "select", ("g", "input", "g")),
        Node("y", "table", ("s",), {"low": -3}, {"values": np.arange(7)}),
    )
    counts = count_operations(graph_of(*nodes, seq_len=5))
    assert counts["g"] == counts["s"] == Counts(comparisons=20)
    assert counts["y"] == Counts()


def scan(length: int, chunk: int, heads: int, P: int, state: int) -> Graph:
    """A graph of nothing but a scan of an input."""
    x = features(0, 1, heads * P + 3 * state + heads)

    def part(name: str, start: int, width: int) -> Node:
        return Node(name, "slice", ("input",), {"start": start, "stop": start + width})

    at = heads * P
    parts = [part("x", 0, at), part("B", at, state), part("C", at + state, state)]
    parts += [part("n", at + 2 * state, heads), part("Bn", at + 2 * state + heads, state)]
    keys = [
        "G_shift",
        "G_limit",
        "M_shift",
        "u_shift",
        "beta_shift",
        "H_align",
        "M_align",
        "u_align",
        "D_align",
    ]
    attributes = dict.fromkeys(keys, 1) | {"chunk_size": chunk, "headdim": P, "decay_bits": 4}
    attributes |= {"A_bits": 8, "A_u_bits": 6, "rotation_frac": 4}
    zeros = np.zeros(state // 2, np.int64)
    constants = {"D": np.ones(heads, np.int64), "cos_Q": zeros, "sin_Q": zeros}
    ssd = Node("y", "ssd", ("x", "B", "C", "n", "Bn"), attributes, constants)
    return graph_of(x, *parts, ssd, seq_len=length)


@pytest.mark.parametrize(("length", "chunk"), [(1, 4), (4, 4), (6, 4), (12, 4), (3, 1)])
def test_multiplications_of_the_scan_are_those_of_its_formulas(length: int, chunk: int) -> None:
    heads, P, state = 2, 3, 4
    products = 0
    for t in range(length):
        i = t % chunk
        products += heads * (i + 1)  # A[t, s] for s = -1 .. t-1
        products += (i + 1) * state  # G[t, s]
        products += heads * (i + 1) * (1 + P)  # M[t, s], and M x
        products += heads * P  # D x
        if t >= chunk:
            products += heads * P * (state + 1)  # u, A_u u
    for close in range(chunk, length, chunk):
        products += heads * chunk * state  # beta
        products += heads * P * state * chunk  # x beta
        if close > chunk:
            products += heads * state + heads * P * state * 2  # kappa, sigma, and the turn
    assert count_operations(scan(length, chunk, heads, P, state))["y"].multiplies == products


def test_ternary_weights_are_stored_in_two_bits() -> None:
    ternary = Node("t", "linear", ("input",), constants={"weight": np.tile([[1, -1, 0, 1]], (4, 1))})
    wide = Node("w", "linear", ("t",), constants={"weight": np.full((3, 4), 100)})
    summary = summarize(graph_of(features(0, 1, 4), ternary, wide))
    assert summary.size_bytes == 16 * 2 // 8 + 12 and summary.parameters == 28
    kinds = {t.name: (t.weights, t.zero_share) for t in summary.tensors}
    assert kinds == {"input": (None, None), "t": ("ternary", 0.25), "w": ("int8", 0.0)}


@pytest.mark.parametrize("runner", ["interpreter", "executor", "measurement"])
def test_large_models_fit_since_no_run_keeps_tensors_that_nothing_reads_any_more(
    runner: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A chain of 24 layers took 24 GB where each of its tensors took 3 MB."""
    write_checkpoint(tmp_path / "c", DIGITS)
    graph, data = quantize_native(tmp_path / "c"), load_data(DIGITS)
    made: list[weakref.ref[Any]] = []
    alive: list[int] = []

    def watch(name: str, operation: str) -> None:
        honest = getattr(OPERATIONS[name], operation)

        def run(self: Any, node: Node, *arguments: Any) -> Any:
            result = honest(node, *arguments)
            made.append(weakref.ref(result))
            alive.append(sum(reference() is not None for reference in made))
            return result

        monkeypatch.setattr(type(OPERATIONS[name]), operation, run)

    for name in {node.op for node in graph.nodes}:
        watch(name, "execute" if runner == "executor" else "evaluate")
    inputs = sample_inputs(graph, data, 2, 2)
    if runner == "interpreter":
        interpreter.evaluate(graph, inputs, Fingerprints())
    elif runner == "executor":
        Executor(graph)(torch.from_numpy(inputs), Fingerprints())
    else:
        monkeypatch.setattr("quantize.measurement.SEQUENCES", 1000)
        measure(graph, data, 1024)
    assert len(made) == len(graph.nodes)
    assert max(alive) < len(graph.nodes) / 2
