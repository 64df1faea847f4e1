"""How much arithmetic a graph takes, counted from its shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from mamba_int.graph import Graph, IntArray, Node, TensorType
from mamba_int.operations.scan import ScanShape


@dataclass(frozen=True)
class Counts:
    """Integer operations of one sequence.

    A rounding shift is one shift (the half it adds is part of it), a multiplication by a power of two is a
    shift, by -1 an addition; zero weights cost nothing.

    Attributes:
        shifts, adds, multiplies: as named.
        comparisons: of clamps, relu, norms and compare; a select tests its condition.
        divisions: divisions and square roots.
    """

    shifts: int = 0
    adds: int = 0
    multiplies: int = 0
    comparisons: int = 0
    divisions: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.shifts + other.shifts,
            self.adds + other.adds,
            self.multiplies + other.multiplies,
            self.comparisons + other.comparisons,
            self.divisions + other.divisions,
        )

    def __mul__(self, times: int) -> Counts:
        return Counts(
            self.shifts * times,
            self.adds * times,
            self.multiplies * times,
            self.comparisons * times,
            self.divisions * times,
        )


def _by_constant(values: IntArray) -> Counts:
    """Multiplying once by each of some constants."""
    size = np.abs(values)
    power = (size > 1) & (size & (size - 1) == 0)
    return Counts(
        shifts=int(power.sum()),
        adds=int((values == -1).sum()),
        multiplies=int(((size > 1) & ~power).sum()),
    )


def _dot(weight: IntArray, has_bias: bool) -> Counts:
    """``weight [outputs, terms] . x + bias``: a negative unit weight subtracts instead of adding."""
    terms = np.count_nonzero(weight, 1) + has_bias
    products = _by_constant(np.abs(weight))
    return Counts(products.shifts, int(np.maximum(terms - 1, 0).sum()), products.multiplies)


def _linear(node: Node, inputs: Sequence[TensorType], result: TensorType) -> Counts:
    return _dot(node.constants["weight"], "bias" in node.constants) * prod(result.shape[:-1])


def _conv(node: Node, inputs: Sequence[TensorType], result: TensorType) -> Counts:
    return _dot(node.constants["taps"], "bias" in node.constants) * result.shape[0]


def _add(node: Node, inputs: Sequence[TensorType], result: TensorType) -> Counts:
    return Counts(adds=prod(result.shape))


def _mul(node: Node, inputs: Sequence[TensorType], result: TensorType) -> Counts:
    if len(inputs) == 2:
        return Counts(multiplies=prod(result.shape))
    value = np.asarray(node.constants["value"])
    return _by_constant(value) * (prod(result.shape) // value.size)


def _shift(node: Node, inputs: Sequence[TensorType], result: TensorType) -> Counts:
    return Counts(shifts=prod(result.shape) if node.integer("places") else 0)


def _clamp(node: Node, inputs: Sequence[TensorType], result: TensorType) -> Counts:
    return Counts(comparisons=2 * prod(result.shape))


def _test(node: Node, inputs: Sequence[TensorType], result: TensorType) -> Counts:
    return Counts(comparisons=prod(result.shape))


def _norm(node: Node, inputs: Sequence[TensorType], result: TensorType) -> Counts:
    d = result.shape[-1]
    copy = d if node.integer("input_shift") else 0
    octaves, per_octave = node.integer("octaves"), node.integer("per_octave")
    # Three halves of a power of two are a shift and one addition.
    row = Counts(copy + d, d - 1 + d * (per_octave - 1), d, 2 * d + octaves * per_octave)
    return row * prod(result.shape[:-1])


def _rotate(node: Node, inputs: Sequence[TensorType], result: TensorType) -> Counts:
    pairs = prod(result.shape) // 2
    if node.attributes["form"] == "table":
        return Counts(shifts=2, adds=2, multiplies=4) * pairs
    # The half turn of a pair changes two signs; it is counted where it happens.
    turned = int((node.constants["sign"] < 0).mean() * 2 * pairs)
    return Counts(shifts=3, adds=3, multiplies=3) * pairs + Counts(adds=turned)


def _ssd(node: Node, inputs: Sequence[TensorType], result: TensorType) -> Counts:
    (length, state), heads, P = inputs[1].shape, inputs[3].shape[-1], node.integer("headdim")
    Q = min(node.integer("chunk_size"), length)
    total = Counts()
    for first in range(0, length, Q):
        steps = min(Q, length - first)
        total += _ssd_inside(node, steps, heads, P, state)
        if first:
            total += _ssd_read(node, steps, heads, P, state)
        if first + Q < length:
            total += _ssd_close(node, Q, heads, P, state, first > 0)
    return total


def _aligned(node: Node, key: str) -> int:
    return 1 if node.integer(key) else 0


def _ssd_inside(node: Node, Q: int, heads: int, P: int, state: int) -> Counts:
    pairs = Q * (Q + 1) // 2
    # Each step multiplies a row of t + 1 products of decays and starts one more; see ``Ssd``.
    A = Counts(shifts=pairs + Q, adds=Q, multiplies=pairs) * heads
    G = Counts(1, state - 1, state, 2) * pairs
    M = Counts(shifts=1, multiplies=1) * pairs * heads
    sums = Counts(adds=pairs - Q, multiplies=pairs) * (heads * P)
    align = _aligned(node, "M_align") + _aligned(node, "D_align")
    skip = Counts(shifts=align, adds=1, multiplies=1) * (Q * heads * P)
    return A + G + M + sums + skip


def _ssd_read(node: Node, Q: int, heads: int, P: int, state: int) -> Counts:
    """What a chunk takes from the state it begins with."""
    u = Counts(1, state - 1, state)
    weighted = Counts(shifts=_aligned(node, "u_align"), adds=1, multiplies=1)
    return (u + weighted) * (Q * heads * P) + Counts(shifts=Q * heads)


def _ssd_close(node: Node, Q: int, heads: int, P: int, state: int, carried: bool) -> Counts:
    """The state at the end of a chunk; the first chunk has none to turn."""
    beta = Counts(shifts=1, multiplies=1) * (heads * Q * state)
    inflow = Counts(_aligned(node, "H_align") + 1, Q - 1, Q) * (heads * P * state)
    if not carried:
        return beta + inflow
    turn = Counts(shifts=1, multiplies=1) * (heads * state)
    return beta + inflow + turn + Counts(adds=2, multiplies=2) * (heads * P * state)


def _scan(node: Node, inputs: Sequence[TensorType], result: TensorType) -> Counts:
    """Components of a state turned, entered, rounded and kept within their range, then read; D x."""
    shape, length = ScanShape(node, inputs), result.shape[0]
    turned = shape.turning
    enter = Counts(1 + _aligned(node, "inflow_align"), 0, 1, 2) * prod(shape.state)
    # The state before the first step is zero.
    turn = Counts(adds=turned, multiplies=turned) * prod(shape.state)
    terms = shape.components * shape.states
    read = Counts(adds=terms - 1, multiplies=terms) * (4 * shape.groups * shape.channels)
    skip = Counts(_aligned(node, "D_align"), 1, 1) * (shape.groups * shape.channels)
    return (enter + read + skip) * length + turn * (length - 1)


def _division(node: Node, inputs: Sequence[TensorType], result: TensorType) -> Counts:
    return Counts(divisions=prod(result.shape))


def _reduce(node: Node, inputs: Sequence[TensorType], result: TensorType) -> Counts:
    later = (inputs[0].shape[0] - 1) * prod(result.shape)
    kind = node.attributes["kind"]
    return Counts(adds=later if kind == "sum" else 0, comparisons=later if kind == "max" else 0)


def _nothing(node: Node, inputs: Sequence[TensorType], result: TensorType) -> Counts:
    return Counts()


COUNTERS: dict[str, Callable[[Node, Sequence[TensorType], TensorType], Counts]] = {
    "input": _nothing,
    "embedding": _nothing,
    "linear": _linear,
    "conv": _conv,
    "add": _add,
    "sub": _add,
    "mul": _mul,
    "compare": _test,
    "select": _test,
    "table": _nothing,
    "shift": _shift,
    "clamp": _clamp,
    "relu": _test,
    "norm": _norm,
    "rotate": _rotate,
    "ssd": _ssd,
    "scan": _scan,
    "isqrt": _division,
    "div": _division,
    "slice": _nothing,
    "concat": _nothing,
    "reduce": _reduce,
}
"""One rule for every operation of the integer graph, under its name."""


def count_operations(graph: Graph) -> dict[str, Counts]:
    """Operations of every node for one sequence of ``graph.seq_len`` steps."""
    return {
        node.name: COUNTERS[node.op](
            node, [graph.types[name] for name in node.inputs], graph.types[node.name]
        )
        for node in graph.nodes
    }
