"""One function for every operation of the integer graph, under its name; it computes the same integers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from onnx import TensorProto

from circuits.runtime.builder import Builder
from circuits.runtime.clock import Clock
from circuits.runtime.scan import scan, scan_step
from circuits.runtime.ssd import ssd, ssd_step
from mamba_int.graph import IntArray, Node
from mamba_int.operations.choice import Table
from mamba_int.operations.norm import Norm

PAIR_LIMIT = (1 << 15) - 1
"""On x86 without VNNI the kernel of MatMulInteger for uint8 activations and int8 weights adds two products in
int16 with saturation: where two can exceed this, weights are uint8, whose kernels add in int32."""

Lowering = Callable[[Builder, Node, Sequence[str]], str]
"""Appends the nodes of one operation, given the names of its inputs, and returns its result."""
StepLowering = Callable[[Builder, Node, Sequence[str], Mapping[str, str], Clock], tuple[str, dict[str, str]]]
"""The same of one step: also given the memory by name and the clock; also returns what changes of it."""


def _input(b: Builder, node: Node, inputs: Sequence[str]) -> str:
    raise ValueError("the graph has a second input")


def _embedding(b: Builder, node: Node, inputs: Sequence[str]) -> str:
    # Rows are widened when they are read.
    table = b.narrow(node.constants["table"])
    return b.own(b.same_type(b.op("Gather", table, b.index(inputs[0]), axis=0), table))


def _linear(b: Builder, node: Node, inputs: Sequence[str]) -> str:
    (x,), source = inputs, b.graph.types[node.inputs[0]]
    weight: IntArray = node.constants["weight"]
    outputs, width = weight.shape
    # Both keep zero, which zero points must name.
    low, high = min(source.low, 0), max(source.high, 0)
    if width == 1:
        y = b.mul(x, b.constant(weight[:, 0]))
    elif _repeats(weight):
        factors = b.constant(weight.sum(1).reshape(width, -1))
        spread = b.mul(b.unsqueeze(x, -1), factors)
        y = b.reshape(spread, *[0] * len(source.shape), outputs)
    elif outputs == 1 and (weight == 1).all():
        y = b.sum(x, -1, keep=True)
    elif high - low <= 255 and np.abs(weight).max() <= 127:
        lifted = b.add(x, b.constant(-low)) if low else x
        operands = [b.cast(lifted, TensorProto.UINT8)]
        zero = b.initializer(np.array(-low, np.uint8))
        transposed = np.ascontiguousarray(weight.T)
        if 2 * (high - low) * int(np.abs(weight).max()) <= PAIR_LIMIT:
            operands += [b.initializer(transposed.astype(np.int8)), zero]
        else:
            middle = np.array(128, np.uint8)
            operands += [b.initializer((transposed + 128).astype(np.uint8)), zero, b.initializer(middle)]
        y = b.own(b.typed(b.op("MatMulInteger", *operands), TensorProto.INT32))
    else:
        terms = int(np.abs(weight).sum(1).max()) * source.magnitude
        y = b.matmul(x, b.narrow(np.ascontiguousarray(weight.T)), max(terms, source.magnitude))
    return b.add(y, b.constant(node.constants["bias"])) if "bias" in node.constants else y


def _repeats(weight: IntArray) -> bool:
    """Whether a matrix only multiplies every input by numbers of its own: block-diagonal, blocks one wide."""
    outputs, width = weight.shape
    if outputs % width:
        return False
    elsewhere = np.repeat(~np.eye(width, dtype=bool), outputs // width, 0)
    return not weight[elsewhere].any()


def _conv(b: Builder, node: Node, inputs: Sequence[str]) -> str:
    (x,), taps = inputs, node.constants["taps"]
    width = taps.shape[1]
    padded = b.pad(x, 3, 1, width - 1, 0)
    y = b.mul(x, b.constant(taps[:, -1]))
    for i in range(width - 1):
        y = b.add(y, b.mul(b.slice(padded, i, i + b.length, axis=1), b.constant(taps[:, i])))
    return b.add(y, b.constant(node.constants["bias"])) if "bias" in node.constants else y


def _conv_step(
    b: Builder, node: Node, inputs: Sequence[str], memory: Mapping[str, str], clock: Clock
) -> tuple[str, dict[str, str]]:
    width = node.constants["taps"].shape[1]
    seen = b.concat([memory["window"], inputs[0]], 1) if width > 1 else inputs[0]
    y = b.sum(b.mul(seen, b.constant(node.constants["taps"].T)), 1, keep=True)
    y = b.add(y, b.constant(node.constants["bias"])) if "bias" in node.constants else y
    return y, {"window": b.slice(seen, 1, width, axis=1) if width > 1 else memory["window"]}


def _binary(kind: str) -> Lowering:
    def lower(b: Builder, node: Node, inputs: Sequence[str]) -> str:
        other = inputs[1] if len(inputs) == 2 else b.constant(node.constants["value"])
        return b.op(kind, inputs[0], other)

    return lower


def _compare(b: Builder, node: Node, inputs: Sequence[str]) -> str:
    return b.truth(_binary("GreaterOrEqual")(b, node, inputs))


def _select(b: Builder, node: Node, inputs: Sequence[str]) -> str:
    condition, first, second = inputs
    return b.op("Where", b.op("Cast", condition, to=TensorProto.BOOL), first, second)


def _table(b: Builder, node: Node, inputs: Sequence[str]) -> str:
    # Entries out of reach may exceed the dtype.
    (source,), x = inputs, b.graph.types[node.inputs[0]]
    entries = Table.within(node, x)
    if x.low <= 0 <= x.high:
        # Negative indices count from the end.
        index, entries = source, np.roll(entries, x.low)
    else:
        index = b.sub(source, b.constant(x.low))
    if b.length == 1:
        return b.op("Gather", b.constant(entries), b.index(index), axis=0)
    # Five times as fast for many elements: Gather copies slices.
    found = b.op("GatherElements", b.constant(entries), b.reshape(b.index(index), -1), axis=0)
    return b.op("Reshape", found, b.op("Shape", source))


def _shift(b: Builder, node: Node, inputs: Sequence[str]) -> str:
    return b.shift(inputs[0], node.integer("places"), b.graph.types[node.inputs[0]].low)


def _clamp(b: Builder, node: Node, inputs: Sequence[str]) -> str:
    return b.clip(inputs[0], node.integer("low"), node.integer("high"))


def _relu(b: Builder, node: Node, inputs: Sequence[str]) -> str:
    return b.op("Max", inputs[0], b.constant(0))


def _norm(b: Builder, node: Node, inputs: Sequence[str]) -> str:
    (x,), limit = inputs, node.integer("input_limit")
    d = b.graph.types[node.inputs[0]].shape[-1]
    xs = b.call(b.clip(b.shift(x, node.integer("input_shift")), -limit, limit), f"{node.name}.xs")
    squares = b.call(b.sum(b.mul(xs, xs), -1, keep=True), f"{node.name}.squares")
    # A threshold beyond the graph's bits is beyond every sum.
    thresholds = np.minimum(Norm.thresholds(node, d), 1 << (b.graph.max_bits + 1))
    above = b.truth(b.op("Greater", squares, b.constant(thresholds)))
    level = b.call(b.sum(above, -1, keep=True), f"{node.name}.level")
    multiplier = b.op("Gather", b.constant(Norm.multipliers(node)), b.index(level), axis=0)
    return b.shift(b.mul(x, multiplier), Norm.places(node))


def _rotate(b: Builder, node: Node, inputs: Sequence[str]) -> str:
    row = np.arange(b.length) % node.integer("period")
    return _turn(b, node, inputs[0], {key: b.constant(value[row]) for key, value in node.constants.items()})


def _rotate_step(
    b: Builder, node: Node, inputs: Sequence[str], memory: Mapping[str, str], clock: Clock
) -> tuple[str, dict[str, str]]:
    row = b.unsqueeze(clock.within(node.integer("period")), -1)
    tables = {key: b.constant(value) for key, value in node.constants.items()}
    constants = {key: b.op("Gather", table, row, axis=0) for key, table in tables.items()}
    return _turn(b, node, inputs[0], constants), {}


def _turn(b: Builder, node: Node, x: str, constants: Mapping[str, str]) -> str:
    """Rotate x [batch, T, N] by constants [T, N/2] or [batch, T, N/2]."""
    frac, state = node.integer("constant_frac"), b.graph.types[node.inputs[0]].shape[-1]
    half = state // 2
    v1, v2 = b.slice(x, 0, half), b.slice(x, half, state)
    if node.attributes["form"] == "table":
        c, s = constants["cos"], constants["sin"]
        first = b.sub(b.mul(c, v1), b.mul(s, v2))
        second = b.add(b.mul(s, v1), b.mul(c, v2))
        return b.shift(b.concat([first, second], -1), frac)
    lam, gam, sign = (constants[name] for name in ("lam", "gam", "sign"))
    v1 = b.add(v1, b.shift(b.mul(lam, v2), frac))
    v2 = b.add(v2, b.shift(b.mul(gam, v1), frac))
    v1 = b.add(v1, b.shift(b.mul(lam, v2), frac))
    return b.concat([b.mul(sign, v1), b.mul(sign, v2)], -1)


def _isqrt(b: Builder, node: Node, inputs: Sequence[str]) -> str:
    # The float64 root of an integer below 2^50 never rounds up across an integer, and a cast truncates.
    root = b.typed(b.op("Sqrt", b.cast(inputs[0], TensorProto.DOUBLE)), TensorProto.DOUBLE)
    return b.own(b.cast(root, b.whole_type))


def _div(b: Builder, node: Node, inputs: Sequence[str]) -> str:
    x, d = (b.cast(name, b.whole_type) for name in inputs)
    if b.graph.types[node.inputs[0]].low < 0:
        # Div truncates; Mod takes the sign of the divisor, so what is left divides exactly.
        x = b.typed(b.sub(x, b.typed(b.op("Mod", x, d), b.whole_type)), b.whole_type)
    return b.own(b.typed(b.op("Div", x, d), b.whole_type))


def _slice(b: Builder, node: Node, inputs: Sequence[str]) -> str:
    return b.slice(inputs[0], node.integer("start"), node.integer("stop"))


def _concat(b: Builder, node: Node, inputs: Sequence[str]) -> str:
    return b.concat(inputs, -1)


def _reduce(b: Builder, node: Node, inputs: Sequence[str]) -> str:
    if node.attributes["kind"] == "sum":
        return b.sum(inputs[0], 1, keep=False)
    if node.attributes["kind"] == "max":
        return b.op("ReduceMax", inputs[0], axes=[1], keepdims=0)
    return b.op("Gather", inputs[0], b.initializer(np.array(-1, np.int64)), axis=1)


LOWERINGS: dict[str, Lowering] = {
    "input": _input,
    "embedding": _embedding,
    "linear": _linear,
    "conv": _conv,
    "add": _binary("Add"),
    "sub": _binary("Sub"),
    "mul": _binary("Mul"),
    "compare": _compare,
    "select": _select,
    "table": _table,
    "shift": _shift,
    "clamp": _clamp,
    "relu": _relu,
    "norm": _norm,
    "rotate": _rotate,
    "ssd": ssd,
    "scan": scan,
    "isqrt": _isqrt,
    "div": _div,
    "slice": _slice,
    "concat": _concat,
    "reduce": _reduce,
}
"""One lowering for every operation of the integer graph, under its name."""

STEP_LOWERINGS: dict[str, StepLowering] = {
    "conv": _conv_step,
    "rotate": _rotate_step,
    "ssd": ssd_step,
    "scan": scan_step,
}
"""Of the operations whose step is more than a sequence of one."""
