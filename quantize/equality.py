"""Whether backends compute the integers of the specification: counted on every tensor, never 'close'."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mamba_int.graph import Graph, IntArray
from mamba_int.interpreter import evaluate

Tracer = Callable[[IntArray], Mapping[str, NDArray[Any]]]
"""Runs a batch and returns every tensor by name, those inside operations as ``node.intermediate``."""
Runner = Callable[[IntArray], NDArray[Any]]
"""Runs a batch and returns the logits."""

BATCH_VALUES = 1 << 24
"""About as many values of the specification are held at a time (128 MiB)."""


@dataclass(frozen=True)
class Equality:
    """Result of a comparison.

    Attributes:
        backends: what was compared with the NumPy interpreter.
        inputs: sequences that were run.
        tensors: tensors compared per sequence, intermediates included.
        values: integers compared, over all backends.
        mismatches: how many of them differ; a tensor that is missing, or of another shape, counts whole.
        first: backend and tensor of the first difference in the order of computation, or None.
    """

    backends: tuple[str, ...]
    inputs: int
    tensors: int
    values: int
    mismatches: int
    first: tuple[str, str] | None

    @property
    def equal(self) -> bool:
        """Whether every value agreed, and there were any."""
        return self.mismatches == 0 and self.values > 0


def compare(
    graph: Graph, inputs: IntArray, tracers: Mapping[str, Tracer], runners: Mapping[str, Runner] | None = None
) -> Equality:
    """Compare backends with the NumPy interpreter.

    Args:
        graph: the model.
        inputs: int64 [n, T, ...].
        tracers: backends by name, compared on every tensor.
        runners: backends by name, compared on the logits alone.
    """
    values = mismatches = tensors = 0
    first: tuple[str, str] | None = None
    start, size = 0, 1
    while start < len(inputs):
        batch = inputs[start : start + size]
        expected: dict[str, IntArray] = {}
        evaluate(graph, batch, expected)
        expected = _in_order(graph, expected)
        tensors = len(expected)
        results = {name: (tracer(batch), expected) for name, tracer in tracers.items()}
        for name, runner in (runners or {}).items():
            results[name] = ({graph.output: runner(batch)}, {graph.output: expected[graph.output]})
        for backend, (found, wanted) in results.items():
            for tensor in [*wanted, *(found.keys() - wanted.keys())]:
                count, wrong = _differences(wanted.get(tensor), found.get(tensor))
                values += count
                mismatches += wrong
                if wrong and first is None:
                    first = (backend, tensor)
        start += len(batch)
        size = max(1, BATCH_VALUES // max(1, sum(v[0].size for v in expected.values())))
    return Equality((*tracers, *(runners or {})), len(inputs), tensors, values, mismatches, first)


def _in_order(graph: Graph, trace: dict[str, IntArray]) -> dict[str, IntArray]:
    """The tensors in the order of computation: those inside an operation before its result."""
    inside: dict[str, list[str]] = {}
    for name in trace:
        if name not in graph.by_name:
            inside.setdefault(name.rpartition(".")[0], []).append(name)
    order = [name for node in graph.nodes for name in (*inside.get(node.name, ()), node.name)]
    return {name: trace[name] for name in order}


def _differences(wanted: IntArray | None, found: NDArray[Any] | None) -> tuple[int, int]:
    """Values compared, and how many of them differ."""
    if wanted is None or found is None or wanted.shape != found.shape:
        size = max(1, *(array.size for array in (wanted, found) if array is not None))
        return size, size
    return wanted.size, int(np.count_nonzero(wanted != found))


def torch_tracer(graph: Graph) -> Tracer:
    """The PyTorch executor on the CPU; its floats are compared as they are."""
    import torch

    from mamba_int.executor import Executor

    executor = Executor(graph)

    def trace(inputs: IntArray) -> Mapping[str, NDArray[Any]]:
        tensors: dict[str, torch.Tensor] = {}
        executor(torch.from_numpy(inputs), tensors)
        return {name: tensor.numpy() for name, tensor in tensors.items()}

    return trace
