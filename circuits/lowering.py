"""Integer graph to circuit: each node's gadget, the public outputs, the number of rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from circuits.cells import CHALLENGE, Cells, CircuitTooNarrow, Ids, Values
from circuits.circuit import (
    ACTIVATIONS_IN,
    ACTIVATIONS_OUT,
    CHAIN,
    CHAIN_BITS,
    CHAIN_VALUES,
    COMMITTED_INPUT,
    GENERATED,
    LARGEST_LOGROWS,
    LAST,
    SALTS,
    SCORE,
    SCORED,
    SMALLEST_LOGROWS,
    STATE_IN,
    STATE_OUT,
    TOKENS,
    Circuit,
    InputTensor,
    PublicTensor,
    Witness,
)
from circuits.constraint_onnx import write_onnx
from circuits.gadgets.argmax import argmax
from circuits.gadgets.choice import compare, pointed, pointer, select, table
from circuits.gadgets.conv import conv
from circuits.gadgets.division import div, isqrt
from circuits.gadgets.linear import linear
from circuits.gadgets.log_score import log_score
from circuits.gadgets.norm import norm
from circuits.gadgets.rotate import rotate
from circuits.gadgets.scan import scan
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
from circuits.polynomials import SQUARE, PolynomialCells
from circuits.segment import (
    ENDS,
    FLAGS,
    FOLLOWING,
    LARGEST_TOTAL,
    NEXT_TOKEN,
    PLACE,
    TOTAL,
    Carried,
    Segment,
    check_language_model,
    check_steps,
    crossing,
    leaving,
    reduction,
    types_of,
)
from mamba_int.errors import MambaintError
from mamba_int.graph import Graph, Node, TensorType
from mamba_int.log_score import LogScore
from mamba_int.operations.choice import Table

MARGIN_ROWS = 12
"""Rows EZKL needs beyond those of the circuit."""
MODEL_INPUT = "model_input"
"""Name of the private tensor that holds the model input; shown in public, it is the output ``input``."""
CLAIM_WIDTH = 64
"""Cells of a row of a claim that two lists are equal."""
COLUMN_MARGIN = 64
"""Rows of a column that a committed input cannot fill."""
MISMATCH = "mismatch"
"""Output of segments that read tokens: where one is not the one expected."""
FORCED = {MISMATCH: 0, "claims": 0, "anchor": 0, "zeros": 0, "squares": SQUARE}
"""Outputs that have one value in every valid proof."""


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

    def __init__(self, graph: Graph, cells: Cells, segment: Segment | None = None) -> None:
        self.graph = graph
        self.cells = cells
        self.types = graph.types if segment is None else types_of(graph, segment)
        self.carried = None if segment is None else Carried(cells)
        self.made: dict[str, Value] = {}
        self._nodes: tuple[Node, ...] = graph.nodes
        if segment is not None and segment.nodes is not None and self.carried is not None:
            self._nodes = graph.nodes[segment.nodes.start : segment.nodes.stop]
            for name in crossing(graph, segment.nodes.start, segment.reads_tokens):
                entered = self.carried.enter_activation(name, self.types[name])
                self.made[name] = Computed(cells, name, self.types[name], _always(entered))

    def value(self, name: str) -> Value:
        """The value of a node, lowered on first use."""
        if name not in self.made:
            for node in self._nodes:
                if node.name not in self.made:
                    self.made[node.name] = GADGETS[node.op](self, node, self.types[node.name])
                if node.name == name:
                    break
        return self.made[name]

    def operands(self, node: Node) -> list[Value]:
        """Values of a node's inputs."""
        return [self.made[name] for name in node.inputs]


def _always(ids: Ids) -> Callable[[], Ids]:
    return lambda: ids


def _input(low: _Lowering, node: Node, tensor: TensorType) -> Value:
    def emit() -> Ids:
        b = low.cells
        ids = b.private(MODEL_INPUT, tensor.shape, tensor.low, tensor.high, _given)
        return check_range(b, ids, tensor.low, tensor.high)

    return Computed(low.cells, node.name, tensor, emit)


def _given(get: Any) -> Values:
    raise ValueError("the model input was not given")


def _embedding(low: _Lowering, node: Node, tensor: TensorType) -> Value:
    """A one-hot row that points at the token; then the table as a matrix."""
    (source,) = low.operands(node)
    rows = np.asarray(node.constants["table"])[source.type.low : source.type.high + 1]
    chosen = TensorType((*source.type.shape, len(rows)), 0, 1)
    hot = Computed(low.cells, f"{node.name}.row", chosen, lambda: pointed(source, node.name))
    return linear(hot, node.name, tensor, rows.T, None)


def _linear(low: _Lowering, node: Node, tensor: TensorType) -> Value:
    (x,) = low.operands(node)
    return linear(x, node.name, tensor, node.constants["weight"], node.constants.get("bias"))


def _conv(low: _Lowering, node: Node, tensor: TensorType) -> Value:
    return conv(low.operands(node)[0], node, tensor, low.carried)


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
        factor = np.asarray(node.constants["value"])
        if factor.size == 1:
            c = int(factor.ravel()[0])
            return Combination(
                b, node.name, tensor, lambda: [(ids, c * own) for ids, own in _terms(operands[0])]
            )
        return Computed(b, node.name, tensor, lambda: b.mul(operands[0].cells(), b.constant(factor)))

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
    return ssd(low.operands(node), node, tensor, low.carried)


def _scan(low: _Lowering, node: Node, tensor: TensorType) -> Value:
    return scan(low.operands(node), node, tensor, low.carried)


def _isqrt(low: _Lowering, node: Node, tensor: TensorType) -> Value:
    (source,) = low.operands(node)
    return Computed(low.cells, node.name, tensor, lambda: isqrt(source, node.name, tensor))


def _div(low: _Lowering, node: Node, tensor: TensorType) -> Value:
    x, d = low.operands(node)
    return Computed(low.cells, node.name, tensor, lambda: div(x, d, node.name, tensor))


def _slice(low: _Lowering, node: Node, tensor: TensorType) -> Value:
    (source,) = low.operands(node)
    return source.sliced(node.name, tensor, node.integer("start"), node.integer("stop"))


def _concat(low: _Lowering, node: Node, tensor: TensorType) -> Value:
    parts = low.operands(node)
    return Computed(
        low.cells, node.name, tensor, lambda: np.concatenate([value.cells() for value in parts], -1)
    )


def _reduce(low: _Lowering, node: Node, tensor: TensorType) -> Value:
    (source,), b, kind = low.operands(node), low.cells, str(node.attributes["kind"])
    if kind == "last":
        return Computed(b, node.name, tensor, lambda: source.cells()[-1])
    # Of the steps before a segment: their sum, or the largest so far.
    before: list[Ids] = []
    if low.carried is not None:
        first = source.type.low if kind == "max" else 0
        low_end, high_end = min(tensor.low, first), max(tensor.high, first)
        before = [low.carried.enter(f"{node.name}:{kind}", tensor.shape, low_end, high_end, first)]

    def terms() -> list[tuple[Ids, int]]:
        return [(ids[t], c) for ids, c in _terms(source) for t in range(len(ids))] + [(s, 1) for s in before]

    value: Value = Combination(b, node.name, tensor, terms)
    if kind == "max":
        value = Computed(b, node.name, tensor, lambda: _largest(b, [*before, *source.cells()], tensor))
    if low.carried is not None:
        low.carried.leave(f"{node.name}:{kind}", value.cells)
    return value


def _largest(b: Cells, steps: Sequence[Ids], tensor: TensorType) -> Ids:
    """max over the first axis, step by step: max(m, x) = m + max(x - m, 0), which stays within x's interval.

    Nothing in it is private: the lookups compute it, and prove the differences in the table.
    """
    largest: Ids = steps[0]
    for step in steps[1:]:
        largest = b.add(largest, b.relu(b.sub(step, largest)), (tensor.low, tensor.high))
    return largest


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
    "scan": _scan,
    "isqrt": _isqrt,
    "div": _div,
    "slice": _slice,
    "concat": _concat,
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
        carried: of a segment: what enters and leaves.
    """

    circuit: Circuit
    cells: Cells
    outputs: Mapping[str, Ids]
    tensors: Mapping[str, Ids]
    carried: Carried | None = None

    @property
    def cost(self) -> dict[str, Counter[str]]:
        """Cells by part of the model and kind."""
        return self.cells.cost

    def witness(
        self,
        inputs: NDArray[np.int64],
        lies: Mapping[str, Callable[[Values], Values]] | None = None,
        trace: dict[str, Values] | None = None,
        given: Mapping[str, NDArray[np.int64]] | None = None,
    ) -> Witness:
        """All private and public values of one inference.

        Args:
            inputs: the model input without batch axis.
            lies: private tensor -> what a lying prover makes of its honest values (tests).
            trace: if given, receives the value of every graph tensor that has cells of its own.
            given: of a segment: the parts of the state and the activations that enter, and ``place``.
        """
        values = self.cells.evaluate({MODEL_INPUT: inputs, **(given or {})}, lies)
        if trace is not None:
            trace.update({name: values.get(ids) for name, ids in self.tensors.items()})
        firsts = {base.name: base for base in self.cells.bases if base.op == "private"}
        private = {
            name: [int(v) for v in values.get(_all(firsts[name].first, size)).tolist()]
            for name, size in self.circuit.private
        }
        public = {
            name: [FORCED[name]] * ids.size if name in FORCED else [int(v) for v in values.get(ids).ravel()]
            for name, ids in self.outputs.items()
            if name != CHALLENGE
        }
        return Witness(private, public)


def _all(first: int, size: int) -> Ids:
    return np.arange(first, first + size, dtype=np.int64)


def _group(
    cells: Cells, logrows: int, committed: bool, alone: Mapping[str, Sequence[str]]
) -> tuple[InputTensor, ...]:
    """The private tensors as ONNX inputs; a committed one has to fit a column.

    Args:
        alone: inputs that are to hold these tensors, in this order, and nothing else; they come first.
    """
    room = (1 << logrows) - COLUMN_MARGIN - SALTS if committed else sum(b.size for b in cells.bases)
    sizes = {base.name: base.size for base in cells.bases if base.op == "private"}
    groups = [[(member, sizes.pop(member)) for member in members] for members in alone.values()]
    for name, group in zip(alone, groups, strict=True):
        if sum(size for _, size in group) > room:
            raise CircuitTooNarrow(name, sum(size for _, size in group))
    used = room
    for name, size in sizes.items():
        if size > room:
            raise CircuitTooNarrow(name, size)
        if used + size > room:
            groups.append([])
            used = 0
        groups[-1].append((name, size))
        used += size
    names = list(alone)
    names += [f"witness{i}" if i else "witness" for i in range(len(groups) - len(names))]
    return tuple(
        InputTensor(name, tuple(members), committed) for name, members in zip(names, groups, strict=True)
    )


def lower(
    graph: Graph,
    logrows: int,
    public_input: bool,
    challenged: bool = False,
    commit_input: bool = False,
    lookups: bool = True,
    segment: Segment | None = None,
) -> LoweredCircuit:
    """Build the circuit for one number of rows.

    Raises:
        CircuitTooNarrow: if some quotient does not fit the lookup table, or a private tensor no column.
    """
    cells = Cells(logrows, challenged) if lookups else PolynomialCells(challenged)
    lowering = _Lowering(graph, cells, segment)
    outputs: dict[str, Ids] = {}
    if segment is None:
        logits = lowering.value(graph.output).cells()
        if public_input:
            outputs["input"] = lowering.value(graph.input.name).cells().ravel()
        outputs["logits"] = logits.ravel()
    else:
        outputs |= _segment_outputs(lowering, segment, public_input)
    # Closing may make a claim itself.
    residues = cells.close()
    if cells.claims:
        outputs |= {CHALLENGE: cells.power(1), "claims": np.concatenate(cells.claims)}
    outputs |= residues
    alone: dict[str, Sequence[str]] = {COMMITTED_INPUT: [MODEL_INPUT]} if commit_input else {}
    if segment is not None and segment.hidden and lowering.carried is not None:
        linked = _linked(lowering.carried, segment)
        alone |= {
            name: [leaving(part) for part in parts] if name in _HANDED_ON else list(parts)
            for name, parts in linked.items()
        }
    committed = bool(cells.claims or alone)
    groups = _group(cells, logrows, committed, alone)
    salts = SALTS * len(groups) if committed else 0
    onnx_bytes = write_onnx(cells, groups, outputs)
    instances = sum(ids.size for ids in outputs.values())
    circuit = Circuit(
        model_id=graph.model_id,
        onnx=onnx_bytes,
        logrows=logrows,
        rows=(cells.total + salts + instances) // 2,
        inputs=groups,
        public=tuple(
            PublicTensor(name, (ids.size,), FORCED.get(name), name == CHALLENGE)
            for name, ids in outputs.items()
        ),
        lookups=lookups,
    )
    tensors = {name: value._cells for name, value in lowering.made.items() if value._cells is not None}
    return LoweredCircuit(circuit, cells, outputs, tensors, lowering.carried)


_HANDED_ON = (STATE_OUT, ACTIVATIONS_OUT)


def _linked(carried: Carried, segment: Segment) -> dict[str, Iterable[str]]:
    """What links a circuit to those beside it, and the names of its parts."""
    linked: dict[str, Iterable[str]] = {STATE_IN: carried.shapes}
    if not segment.head:
        linked[STATE_OUT] = carried.shapes
    linked |= {ACTIVATIONS_IN: carried.activations_in, ACTIVATIONS_OUT: carried.activations_out}
    return {name: parts for name, parts in linked.items() if parts}


def _segment_outputs(lowering: _Lowering, segment: Segment, public_input: bool) -> dict[str, Ids]:
    """The public cells of a segment: its place in its chain, the states on both sides, what it computes."""
    graph, carried, outputs = lowering.graph, lowering.carried, {}
    assert carried is not None
    ends, logits = reduction(graph), None
    if segment.last_stage(graph):
        last = graph.output if ends is None or segment.head else ends.name
        value = lowering.value(last)
        logits = value.cells() if last == graph.output else None
    else:
        assert segment.nodes is not None
        for name in crossing(graph, segment.nodes.stop, segment.reads_tokens):
            carried.leave_activation(name, lowering.value(name).cells())
    if public_input and segment.first_stage():
        outputs["input"] = lowering.value(graph.input.name).cells().ravel()
    if segment.greedy and logits is not None:
        outputs |= _greedy(lowering, logits)
    if segment.scored and logits is not None:
        outputs |= _scored(lowering, logits)
    # Nothing reads these cells: that they are among the public values binds the proof to them.
    outputs[CHAIN] = lowering.cells.private(PLACE, (CHAIN_VALUES,), 0, 1 << CHAIN_BITS, _given)
    linked = _linked(carried, segment)
    if segment.hidden:
        handed_on = [part for name in _HANDED_ON for part in linked.get(name, ())]
        if handed_on:
            _claim_equal(lowering.cells, *carried.copied(handed_on))
    else:
        outputs |= {
            name: carried.left(parts) if name in _HANDED_ON else carried.entered(parts)
            for name, parts in linked.items()
        }
    if logits is not None and not segment.reads_tokens:
        outputs["logits"] = logits.ravel()
    return outputs


def _greedy(lowering: _Lowering, logits: Ids) -> dict[str, Ids]:
    """Which steps are greedy, and their tokens: where the flag is 1, the token is the one that the step
    before makes the most likely."""
    b, carried = lowering.cells, lowering.carried
    assert carried is not None
    with b.part(TOKENS):
        choices = logits.shape[1]
        entered = carried.enter(NEXT_TOKEN, (1,), 0, choices - 1)
        following = argmax(b, "next_token", logits)
        carried.leave(NEXT_TOKEN, lambda: following[-1:])
        tokens = lowering.value(lowering.graph.input.name).cells()
        flags = b.private(FLAGS, tokens.shape, 0, 1, _given)
        expected = np.concatenate([entered, following[:-1]])
        wrong = b.mul(b.sub(tokens, expected), flags)
        return {GENERATED: flags, TOKENS: b.mul(tokens, flags), MISMATCH: wrong}


def _scored(lowering: _Lowering, logits: Ids) -> dict[str, Ids]:
    """The score so far, shown where nothing of the text follows.

    A step's logits are about the token after it. That of the last step is given, goes into the state, and has
    to be the first of the next segment; before the first segment the state has -1, which is no token.
    """
    b, carried, graph = lowering.cells, lowering.carried, lowering.graph
    assert carried is not None
    source = lowering.value(graph.input.name)
    with b.part(SCORE):
        tokens, choices = source.cells(), logits.shape[1]
        expected = carried.enter(NEXT_TOKEN, (1,), -1, choices - 1, first=-1)
        begun = b.add(expected, b.constant([1]))
        wrong = b.mul(begun, b.sub(tokens[:1], expected))
        following = b.check(b.private(FOLLOWING, (1,), 0, choices - 1, _given))
        carried.leave(NEXT_TOKEN, lambda: following)
        next_ones = [pointed(source, "tokens")[1:], pointer(b, FOLLOWING, following, 0, choices)]
        scores = log_score(b, SCORE, LogScore.of(graph), logits, np.concatenate(next_ones))

        flags = b.private(FLAGS, tokens.shape, 0, 1, _given)
        ends = b.private(ENDS, (1,), 0, 1, _given)
        before = carried.enter(TOTAL, (1,), -LARGEST_TOTAL, LARGEST_TOTAL)
        total = b.add(before, b.dot("at,at->a", scores[None], flags[None]))
        carried.leave(TOTAL, lambda: total)
        return {SCORED: flags, LAST: ends, SCORE: b.mul(total, ends), MISMATCH: wrong}


def _claim_equal(b: Cells, first: Ids, second: Ids) -> None:
    """Claim that as many cells are the same field elements, pair by pair: each weighs a power of its own."""
    with b.part(STATE_OUT):
        rows, columns = b.weights(-(-first.size // CLAIM_WIDTH), CLAIM_WIDTH)
        parts = []
        for ids, sign in ((first, 1), (second, -1)):
            # What is beyond the end is the first cell again, in both.
            filled = np.append(ids, np.broadcast_to(first[:1], (rows.size * CLAIM_WIDTH - ids.size,)))
            sums = b.dot("ij,j->i", filled.reshape(rows.size, CLAIM_WIDTH), columns)
            parts.append((b.dot("ai,i->a", sums[None], rows), sign))
        b.claim(parts)


def build_circuit(
    graph: Graph,
    public_input: bool = False,
    logrows: int | None = None,
    challenged: bool | None = None,
    commit_input: bool = False,
    lookups: bool = True,
    segment: Segment | None = None,
) -> LoweredCircuit:
    """Build the circuit of a graph with the fewest rows (a power of two) that hold it.

    Args:
        graph: the integer graph.
        public_input: show the model input among the public values instead of hiding it.
        logrows: use this many rows (log2) instead of the fewest.
        challenged: check products at a random point, or not; default: only if that takes fewer rows, since it
            costs a column.
        commit_input: commit to the model input alone, so that two proofs can be shown to share it.
        lookups: check ranges by a lookup table, or else by polynomial constraints alone.
        segment: prove this stretch of a sequence instead of ``graph.seq_len`` steps from the first.

    Raises:
        MambaintError: if the stretch cannot be cut, or no allowed number of rows holds the circuit.
    """
    if segment is not None:
        check_steps(graph, segment)
        if segment.reads_tokens:
            check_language_model(graph)
        # What is committed to is compared at a random point, and so is what is looked up for a score.
        challenged = True if segment.hidden or segment.scored else challenged
    reason = ""
    forms = [False, True] if challenged is None else [challenged]
    # A form that is too long for 2^k rows is not tried again before 2^k holds what it needed.
    smallest = dict.fromkeys(forms, SMALLEST_LOGROWS)
    for k in [logrows] if logrows else range(SMALLEST_LOGROWS, LARGEST_LOGROWS + 1):
        for form in forms:
            if not logrows and k < smallest[form]:
                continue
            try:
                lowered = lower(graph, k, public_input, form, commit_input, lookups, segment)
            except CircuitTooNarrow as narrow:
                reason = f"{narrow}, beyond the lookup table"
                continue
            rows = lowered.circuit.rows + MARGIN_ROWS
            if rows <= 1 << k:
                return lowered
            reason = f"it needs {lowered.circuit.rows} rows"
            # A wider table saves split remainders and digits: a third of the rows at most was seen.
            smallest[form] = (rows // 2 - 1).bit_length()
    raise MambaintError(
        f"the circuit does not fit 2^{logrows or LARGEST_LOGROWS} rows: {reason}",
        f"prove a shorter sequence or a smaller model{', or use more rows' if logrows else ''}",
    )
