"""What can be said of a graph without running it: tensors, weights, arithmetic, size."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mamba_int.graph import Graph, IntArray, Node
from quantize.operation_counts import Counts, count_operations


@dataclass(frozen=True)
class TensorSummary:
    """One tensor of the graph.

    Attributes:
        name, op, shape, frac: as in its node.
        low, high: proven interval.
        bits: of the largest magnitude in it, the sign not counted.
        peak_bits: of the largest intermediate of the operation.
        weights: ``ternary``, ``int8`` or wider, for a linear layer.
        zero_share: zeros among those weights.
        parameters: integers the node holds. parameter_bits: what they take, ternary ones at 2 bits.
    """

    name: str
    op: str
    shape: tuple[int, ...]
    frac: int
    low: int
    high: int
    bits: int
    peak_bits: int
    weights: str | None
    zero_share: float | None
    parameters: int
    parameter_bits: int


@dataclass(frozen=True)
class GraphSummary:
    """A whole graph.

    Attributes:
        tensors: in the order of computation.
        operations: of one sequence. steps: its length.
        parameters: integers the model holds. size_bytes: what they take, ternary ones at 2 bits.
        max_bits: of the largest possible intermediate.
        model_id: of the graph.
    """

    tensors: tuple[TensorSummary, ...]
    operations: Counts
    steps: int
    parameters: int
    size_bytes: int
    max_bits: int
    model_id: str

    def per_token(self) -> dict[str, float]:
        """Operations of one step, on average over a sequence."""
        return {name: round(count / self.steps, 1) for name, count in asdict(self.operations).items()}

    def to_dict(self) -> dict[str, Any]:
        """Totals as JSON-able values, without the tensors."""
        return {
            "model_id": self.model_id,
            "max_bits": self.max_bits,
            "parameters": self.parameters,
            "size_bytes": self.size_bytes,
            "operations_per_token": self.per_token(),
        }


def magnitude_bits(low: int, high: int) -> int:
    """Bits of the largest magnitude between two integers."""
    return max(abs(low), abs(high)).bit_length()


def _storage_bits(values: IntArray) -> int:
    """2 for ternary integers, else the narrowest of 8, 16, 32 and 64."""
    if values.size == 0 or (values.min() >= -1 and values.max() <= 1):
        return 2
    for bits in (8, 16, 32):
        if values.min() >= -(1 << (bits - 1)) and values.max() < 1 << (bits - 1):
            return bits
    return 64


def _weights(node: Node) -> tuple[str, float] | None:
    if node.op != "linear":
        return None
    weight: IntArray = node.constants["weight"]
    bits = _storage_bits(weight)
    return "ternary" if bits == 2 else f"int{bits}", float(np.mean(weight == 0))


def summarize(graph: Graph) -> GraphSummary:
    """Describe a graph."""
    tensors = []
    for node in graph.nodes:
        kind, weights = graph.types[node.name], _weights(node)
        arrays = [np.asarray(value) for value in node.constants.values()]
        tensors.append(
            TensorSummary(
                node.name,
                node.op,
                kind.shape,
                node.frac,
                kind.low,
                kind.high,
                magnitude_bits(kind.low, kind.high),
                kind.peak.bit_length(),
                weights[0] if weights else None,
                weights[1] if weights else None,
                sum(array.size for array in arrays),
                sum(array.size * _storage_bits(array) for array in arrays),
            )
        )
    return GraphSummary(
        tuple(tensors),
        sum(count_operations(graph).values(), Counts()),
        graph.seq_len,
        sum(tensor.parameters for tensor in tensors),
        -(-sum(tensor.parameter_bits for tensor in tensors) // 8),
        graph.max_bits,
        graph.model_id,
    )
