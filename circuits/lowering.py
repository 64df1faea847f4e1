"""Integer graph to circuit: each node's gadget, the public outputs, the number of rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from circuits.cells import Cells, CircuitTooNarrow, Ids, Values
from circuits.circuit import Circuit, PublicTensor, Witness
from circuits.constraint_onnx import write_onnx
from circuits.gadgets.choice import compare, pointer, select, table
from circuits.gadgets.division import div, isqrt
from circuits.gadgets.linear import linear
from circuits.gadgets.norm import norm
from circuits.gadgets.rotate import rotate
from circuits.gadgets.ssd import ssd
from circuits.gadgets.values import (
    Accumulation,
    Combination,
    Computed,
    Summed,
    Value,
    check_range,
    clamp_from_zero,
)
from mamba_int.errors import MambaintError
from mamba_int.graph import Graph, Node, TensorType
from mamba_int.operations.choice import Table

MARGIN_ROWS = 12
"""Rows EZKL needs beyond those of the circuit."""
MODEL_INPUT = "model_input"
"""Name of the private tensor that holds the model input; shown in public, it is the output ``input``."""
SMALLEST_LOGROWS = 8
LARGEST_LOGROWS = 20


class _Relu(Value):
    """max(x, 0), whose lookup a following clamp shares."""

    def __init__(self, source: Value, name: str, tensor: TensorType) -> None:
        super().__init__(source.builder, name, tensor)
        self._source = source

    def _emit(self) -> Ids:
        return self._source.relu()

    def clamp(self, low: int, high: int) -> Ids:
        if low > 0 or high < 0:
            return super().clamp(low, high)
        return clamp_from_zero(self.builder, self.cells(), self._source.type, 0, high)


class _Lowering:
    """Walks the graph from its output: a tensor that nothing asks for makes no cells."""

    def __init__(self, graph: Graph, cells: Cells) -> None:
        self.graph = graph
        self.cells = cells
        self.made: dict[str, Value] = {}

    def value(self, name: str) -> Value:
        """The value of a node, lowered on first use."""
        if name not in self.made:
            for node in self.graph.nodes:
                if node.name not in self.made:
                    self.made[node.name] = GADGETS[node.op](self, node, self.graph.types[node.name])
                if node.name == name:
                    break
        return self.made[name]

    def operands(self, node: Node) -> list[Value]:
        """Values of a node's inputs."""
        return [self.made[name] for name in node.inputs]


def _input(low: _Lowering, node: Node, tensor: TensorType) -> Value:
    def emit() -> Ids:
        b = low.cells
        ids = b.private(MODEL_INPUT, tensor.shape, tensor.low, tensor.high, _given)
        return check_range(b, ids, tensor.low, tensor.high)

    return Computed(low.cells, node.name, tensor, emit)


def _given(get: Any) -> Values:
    raise ValueError("the model input was not given")


def _embedding(low: _Lowering, node: Node, tensor: TensorType) -> Value:
    """A one-hot row that points at the token; then dots with the table."""
    b, rows = low.cells, np.asarray(node.constants["table"])
    (source,) = low.operands(node)

    def emit() -> Ids:
        hot = pointer(b, node.name, source.cells(), 0, len(rows))
        return b.dot("tv,vd->td", hot, b.constant(rows), (tensor.low, tensor.high))

    return Computed(b, node.name, tensor, emit)


def _linear(low: _Lowering, node: Node, tensor: TensorType) -> Value:
    (x,) = low.operands(node)
    return linear(x, node.name, tensor, node.constants["weight"], node.constants.get("bias"))


def _conv(low: _Lowering, node: Node, tensor: TensorType) -> Value:
    """K taps of each channel as one dot over the shifted copies of x; its bias is one more term."""
    (source,), b = low.operands(node), low.cells
    taps, bias = node.constants["taps"], node.constants.get("bias")

    def accumulate() -> Accumulation:
        x = source.cells()
        steps, channels = x.shape
        width = taps.shape[1]
        zeros = np.broadcast_to(b.constant([0]), (width - 1, channels))
        padded = np.concatenate([zeros, x])
        left = [padded[i : i + steps] for i in range(width)]
        rows = [taps[:, i] for i in range(width)]
        if bias is not None and bias.any():
            left.append(np.broadcast_to(b.constant([1]), x.shape))
            rows.append(bias)
        right = np.stack(rows).astype(object)
        return Accumulation(np.stack(left), lambda m: b.constant(right * m), (1,), tensor.low, tensor.high)

    return Summed(b, node.name, tensor, accumulate)


def _terms(value: Value) -> list[tuple[Ids, int]]:
    return value.terms() if isinstance(value, Combination) else [(value.cells(), 1)]


def _sum(low: _Lowering, node: Node, tensor: TensorType, sign: int) -> Value:
    operands, b = low.operands(node), low.cells
    if len(operands) == 1:
        constant = b.constant(node.constants["value"])
        shift = b.add if sign > 0 else b.sub
        return Computed(b, node.name, tensor, lambda: shift(operands[0].cells(), constant))
    return Combination(
        b,
        node.name,
        tensor,
        lambda: _terms(operands[0]) + [(ids, sign * c) for ids, c in _terms(operands[1])],
    )


def _mul(low: _Lowering, node: Node, tensor: TensorType) -> Value:
    operands, b = low.operands(node), low.cells
    if len(operands) == 1:
        constant = b.constant(node.constants["value"])
        return Computed(b, node.name, tensor, lambda: b.mul(operands[0].cells(), constant))

    def accumulate() -> Accumulation:
        x, y = operands[0].cells(), operands[1].cells()

        def right(m: int) -> Ids:
            return (b.mul(y, b.constant([m])) if m > 1 else y)[None]

        return Accumulation(x[None], right, tuple(range(x.ndim)), tensor.low, tensor.high)

    class Product(Summed):
        def _emit(self) -> Ids:
            return b.mul(operands[0].cells(), operands[1].cells(), (tensor.low, tensor.high))

    return Product(b, node.name, tensor, accumulate)


def _compare(low: _Lowering, node: Node, tensor: TensorType) -> Value:
    x, *rest = low.operands(node)
    y = rest[0] if rest else np.atleast_1d(node.constants["value"])
    return Computed(low.cells, node.name, tensor, lambda: compare(x, y, node.name))


def _select(low: _Lowering, node: Node, tensor: TensorType) -> Value:
    condition, first, second = low.operands(node)
    return Computed(low.cells, node.name, tensor, lambda: select(condition, first, second, tensor))


def _table(low: _Lowering, node: Node, tensor: TensorType) -> Value:
    (source,) = low.operands(node)
    values = Table.within(node, source.type)
    return Computed(low.cells, node.name, tensor, lambda: table(source, node.name, tensor, values))


def _shift(low: _Lowering, node: Node, tensor: TensorType) -> Value:
    (source,), places = low.operands(node), node.integer("places")
    if places > 0:
        return source.shifted(node.name, tensor, places)
    return Combination(
        low.cells, node.name, tensor, lambda: [(ids, c << -places) for ids, c in _terms(source)]
    )


def _clamp(low: _Lowering, node: Node, tensor: TensorType) -> Value:
    (source,) = low.operands(node)
    top = node.integer("high")
    bottom = min(max(node.integer("low"), source.type.low), top)
    return Computed(low.cells, node.name, tensor, lambda: source.clamp(bottom, top))


def _relu(low: _Lowering, node: Node, tensor: TensorType) -> Value:
    return _Relu(low.operands(node)[0], node.name, tensor)


def _norm(low: _Lowering, node: Node, tensor: TensorType) -> Value:
    return norm(low.operands(node)[0], node, tensor)


def _rotate(low: _Lowering, node: Node, tensor: TensorType) -> Value:
    return rotate(low.operands(node)[0], node, tensor)


def _ssd(low: _Lowering, node: Node, tensor: TensorType) -> Value:
    return ssd(low.operands(node), node, tensor)


def _isqrt(low: _Lowering, node: Node, tensor: TensorType) -> Value:
    (source,) = low.operands(node)
    return Computed(low.cells, node.name, tensor, lambda: isqrt(source, node.name, tensor))


def _div(low: _Lowering, node: Node, tensor: TensorType) -> Value:
    x, d = low.operands(node)
    return Computed(low.cells, node.name, tensor, lambda: div(x, d, node.name, tensor))


def _slice(low: _Lowering, node: Node, tensor: TensorType) -> Value:
    (source,) = low.operands(node)
    return source.sliced(node.name, tensor, node.integer("start"), node.integer("stop"))


def _reduce(low: _Lowering, node: Node, tensor: TensorType) -> Value:
    (source,), b = low.operands(node), low.cells
    if node.attributes["kind"] == "last":
        return Computed(b, node.name, tensor, lambda: source.cells()[-1])

    def terms() -> list[tuple[Ids, int]]:
        return [(ids[t], c) for ids, c in _terms(source) for t in range(len(ids))]

    return Combination(b, node.name, tensor, terms)


Gadget = Callable[[_Lowering, Node, TensorType], Value]

GADGETS: dict[str, Gadget] = {
    "input": _input,
    "embedding": _embedding,
    "linear": _linear,
    "conv": _conv,
    "add": partial(_sum, sign=1),
    "sub": partial(_sum, sign=-1),
    "mul": _mul,
    "compare": _compare,
    "select": _select,
    "table": _table,
    "shift": _shift,
    "clamp": _clamp,
    "relu": _relu,
    "norm": _norm,
    "rotate": _rotate,
    "ssd": _ssd,
    "isqrt": _isqrt,
    "div": _div,
    "slice": _slice,
    "reduce": _reduce,
}
"""One gadget for every operation of the integer graph, under its name."""


@dataclass(frozen=True)
class LoweredCircuit:
    """A circuit together with what it was made from: it can compute witnesses.

    Attributes:
        circuit: what ``zk`` proves.
        cells: the constraint graph.
        outputs: its public cells, by name.
        tensors: cells of the graph's tensors that became cells as such, by node name.
    """

    circuit: Circuit
    cells: Cells
    outputs: Mapping[str, Ids]
    tensors: Mapping[str, Ids]

    @property
    def cost(self) -> dict[str, Counter[str]]:
        """Cells by part of the model and kind."""
        return self.cells.cost

    def witness(
        self,
        inputs: NDArray[np.int64],
        lies: Mapping[str, Callable[[Values], Values]] | None = None,
        trace: dict[str, Values] | None = None,
    ) -> Witness:
        """All private and public values of one inference.

        Args:
            inputs: the model input without batch axis.
            lies: private tensor -> what a lying prover makes of its honest values (tests).
            trace: if given, receives the value of every graph tensor that has cells of its own.
        """
        values = self.cells.evaluate({MODEL_INPUT: inputs}, lies)
        if trace is not None:
            trace.update({name: values.get(ids) for name, ids in self.tensors.items()})
        firsts = {base.name: base for base in self.cells.bases if base.op == "private"}
        private = {
            name: [int(v) for v in values.get(_all(firsts[name].first, size))]
            for name, size in self.circuit.private
        }
        public = {name: [int(v) for v in values.get(ids).ravel()] for name, ids in self.outputs.items()}
        return Witness(private, public)


def _all(first: int, size: int) -> Ids:
    return np.arange(first, first + size, dtype=np.int64)


def lower(graph: Graph, logrows: int, public_input: bool) -> LoweredCircuit:
    """Build the circuit for one number of rows.

    Raises:
        CircuitTooNarrow: if some quotient does not fit the lookup table.
    """
    cells = Cells(logrows)
    lowering = _Lowering(graph, cells)
    logits = lowering.value(graph.output).cells()
    outputs: dict[str, Ids] = {}
    if public_input:
        outputs["input"] = lowering.value(graph.input.name).cells().ravel()
    outputs |= {"logits": logits.ravel(), "anchor": cells.close()}
    onnx_bytes = write_onnx(cells, outputs)
    instances = sum(ids.size for ids in outputs.values())
    circuit = Circuit(
        model_id=graph.model_id,
        onnx=onnx_bytes,
        logrows=logrows,
        rows=(cells.total + instances) // 2,
        private=tuple((base.name, base.size) for base in cells.bases if base.op == "private"),
        public=tuple(
            PublicTensor(name, (ids.size,), 0 if name == "anchor" else None) for name, ids in outputs.items()
        ),
    )
    tensors = {name: value._cells for name, value in lowering.made.items() if value._cells is not None}
    return LoweredCircuit(circuit, cells, outputs, tensors)


def build_circuit(graph: Graph, public_input: bool = False, logrows: int | None = None) -> LoweredCircuit:
    """Build the circuit of a graph with the fewest rows that hold it.

    Args:
        graph: the integer graph.
        public_input: show the model input among the public values instead of hiding it.
        logrows: use this many rows (log2) instead of the fewest.

    Raises:
        MambaintError: if no allowed number of rows holds the circuit.
    """
    reason = ""
    for k in [logrows] if logrows else range(SMALLEST_LOGROWS, LARGEST_LOGROWS + 1):
        try:
            lowered = lower(graph, k, public_input)
        except CircuitTooNarrow as narrow:
            reason = f"{narrow}, beyond the lookup table"
            continue
        if lowered.circuit.rows + MARGIN_ROWS <= 1 << k:
            return lowered
        reason = f"it needs {lowered.circuit.rows} rows"
    raise MambaintError(
        f"the circuit does not fit 2^{logrows or LARGEST_LOGROWS} rows: {reason}",
        "prove a shorter sequence or a smaller model",
    )
