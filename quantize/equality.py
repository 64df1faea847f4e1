"""Whether backends compute the integers of the specification: counted on every tensor, never 'close'."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mamba_int.graph import Graph, IntArray
from mamba_int.interpreter import evaluate
from mamba_int.operations.base import Trace

Tracer = Callable[[IntArray, Trace], object]
"""Runs a batch and enters every tensor by name, those inside operations as ``node.intermediate``."""
Runner = Callable[[IntArray], NDArray[Any]]
"""Runs a batch and returns the logits."""

BATCH_VALUES = 1 << 24
"""About as many values of the specification are computed at a time."""
RUNNER_BATCH = 16
"""Inputs at a time where logits alone are compared."""


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


def joined(parts: Sequence[Equality]) -> Equality:
    """Comparisons of several backends, the first of them on every tensor, as one."""
    return Equality(
        backends=tuple(name for part in parts for name in part.backends),
        inputs=parts[0].inputs,
        tensors=parts[0].tensors,
        values=sum(part.values for part in parts),
        mismatches=sum(part.mismatches for part in parts),
        first=next((part.first for part in parts if part.first is not None), None),
    )


class Fingerprints(dict[str, Any]):
    """A trace that keeps of every tensor its shape and the SHA-256 of its integers, not the tensor: those of
    large models would not fit the memory."""

    def __setitem__(self, name: str, tensor: Any) -> None:
        values = np.asarray(tensor)
        # What is no integer must not pass for the integer that it is rounded to.
        whole = values if values.dtype == np.int64 else _whole(values)
        kind = b"integers" if whole is not None else b"others"
        content = np.ascontiguousarray(values if whole is None else whole)
        digest = hashlib.sha256(kind + content.data.cast("B")).digest()
        super().__setitem__(name, (values.shape, digest))


def _whole(values: NDArray[Any]) -> IntArray | None:
    """The same numbers as int64, if they are integers."""
    with np.errstate(invalid="ignore"):
        integers: IntArray = values.astype(np.int64)
    return integers if bool((integers == values).all()) else None


class _Chosen(dict[str, Any]):
    """A trace of some tensors."""

    def __init__(self, names: Collection[str]) -> None:
        super().__init__()
        self._names = names

    def __setitem__(self, name: str, tensor: Any) -> None:
        if name in self._names:
            super().__setitem__(name, np.asarray(tensor))


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
        expected = Fingerprints()
        logits = evaluate(graph, batch, expected if tracers else None)
        order = _in_order(graph, expected) if tracers else []
        tensors = len(order)
        total = sum(prod(expected[name][0]) for name in order)
        for backend, tracer in tracers.items():
            found = Fingerprints()
            tracer(batch, found)
            values += total
            names = [*order, *(found.keys() - expected.keys())]
            differing = [name for name in names if expected.get(name) != found.get(name)]
            if not differing:
                continue
            # Rare enough to be computed again, with these tensors held.
            wanted, got = _Chosen(differing), _Chosen(differing)
            evaluate(graph, batch, wanted)
            tracer(batch, got)
            counts = [_differences(wanted.get(name), got.get(name)) for name in differing]
            values += sum(
                count for (count, _), name in zip(counts, differing, strict=True) if name not in wanted
            )
            mismatches += sum(wrong for _, wrong in counts)
            first = first or (backend, differing[0])
        for backend, runner in (runners or {}).items():
            count, wrong = _differences(logits, runner(batch))
            values += count
            mismatches += wrong
            if wrong and first is None:
                first = (backend, graph.output)
        start += len(batch)
        size = max(1, BATCH_VALUES * len(batch) // total) if total else RUNNER_BATCH
    return Equality((*tracers, *(runners or {})), len(inputs), tensors, values, mismatches, first)


def _in_order(graph: Graph, trace: Collection[str]) -> list[str]:
    """The names of tensors in the order of computation: those inside an operation before its result."""
    inside: dict[str, list[str]] = {}
    for name in trace:
        if name not in graph.by_name:
            inside.setdefault(name.rpartition(".")[0], []).append(name)
    return [name for node in graph.nodes for name in (*inside.get(node.name, ()), node.name)]


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

    def trace(inputs: IntArray, tensors: Trace) -> None:
        executor(torch.from_numpy(inputs), tensors)

    return trace
