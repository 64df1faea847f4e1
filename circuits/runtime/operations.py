"""One function for every operation of the integer graph, under its name; it computes the same integers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from onnx import TensorProto

from circuits.runtime.builder import Builder
from circuits.runtime.ssd import ssd
from mamba_int.graph import IntArray, Node
from mamba_int.operations.choice import Table
from mamba_int.operations.norm import Norm

INT8_WEIGHT_LIMIT = 64
"""Largest weight given to MatMulInteger. On x86 without VNNI its kernel adds two products of an activation
0..255 and a weight in int16 with saturation: 2 * 255 * 64 is the last that fits."""

Lowering = Callable[[Builder, Node, Sequence[str]], str]
"""Appends the nodes of one operation, given the names of its inputs, and returns its result."""


def _input(b: Builder, node: Node, inputs: Sequence[str]) -> str:
    raise ValueError("the graph has a second input")


def _embedding(b: Builder, node: Node, inputs: Sequence[str]) -> str:
    return b.op("Gather", b.constant(node.constants["table"]), inputs[0], axis=0)


def _linear(b: Builder, node: Node, inputs: Sequence[str]) -> str:
    (x,), source = inputs, b.graph.types[node.inputs[0]]
    weight: IntArray = node.constants["weight"].T
    if max(-source.low - 1, source.high) <= 127 and np.abs(weight).max() <= INT8_WEIGHT_LIMIT:
        narrow = b.op("Cast", x, to=TensorProto.INT8)
        y = b.op("MatMulInteger", narrow, b.initializer(np.ascontiguousarray(weight.astype(np.int8))))
        if b.onnx_type != TensorProto.INT32:
            y = b.op("Cast", y, to=b.onnx_type)
    else:
        y = b.op("MatMul", x, b.constant(np.ascontiguousarray(weight)))
    return b.add(y, b.constant(node.constants["bias"])) if "bias" in node.constants else y


def _conv(b: Builder, node: Node, inputs: Sequence[str]) -> str:
    (x,), taps = inputs, node.constants["taps"]
    width, length = taps.shape[1], b.graph.types[node.inputs[0]].shape[0]
    padded = b.pad(x, 3, 1, width - 1, 0)
    y = b.mul(x, b.constant(taps[:, -1]))
    for i in range(width - 1):
        y = b.add(y, b.mul(b.slice(padded, i, i + length, axis=1), b.constant(taps[:, i])))
    return b.add(y, b.constant(node.constants["bias"])) if "bias" in node.constants else y


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
    x = b.graph.types[node.inputs[0]]
    index = b.sub(inputs[0], b.constant(x.low)) if x.low else inputs[0]
    return b.op("Gather", b.constant(Table.within(node, x)), index, axis=0)


def _shift(b: Builder, node: Node, inputs: Sequence[str]) -> str:
    return b.shift(inputs[0], node.integer("places"))


def _clamp(b: Builder, node: Node, inputs: Sequence[str]) -> str:
    return b.clip(inputs[0], node.integer("low"), node.integer("high"))


def _relu(b: Builder, node: Node, inputs: Sequence[str]) -> str:
    return b.op("Max", inputs[0], b.constant(0))


def _norm(b: Builder, node: Node, inputs: Sequence[str]) -> str:
    (x,), limit = inputs, node.integer("input_limit")
    d = b.graph.types[node.inputs[0]].shape[-1]
    xs = b.call(b.clip(b.shift(x, node.integer("input_shift")), -limit, limit), f"{node.name}.xs")
    squares = b.call(b.sum(b.mul(xs, xs), -1, keep=True), f"{node.name}.squares")
    # A threshold beyond the dtype is beyond every sum.
    thresholds = np.minimum(Norm.thresholds(node, d), np.iinfo(b.dtype).max)
    above = b.truth(b.op("Greater", squares, b.constant(thresholds)))
    level = b.call(b.sum(above, -1, keep=True), f"{node.name}.level")
    multiplier = b.op("Gather", b.constant(Norm.multipliers(node)), level, axis=0)
    return b.shift(b.mul(x, multiplier), Norm.places(node))


def _rotate(b: Builder, node: Node, inputs: Sequence[str]) -> str:
    (x,), frac = inputs, node.integer("constant_frac")
    length, state = b.graph.types[node.inputs[0]].shape
    half = state // 2
    row = np.arange(length) % node.integer("period")
    constants = {key: b.constant(value[row]) for key, value in node.constants.items()}
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
    # The float root is off by at most one below 2^50; one step each way makes it exact.
    (x,), one = inputs, b.constant(1)
    real = b.op("Sqrt", b.op("Cast", x, to=TensorProto.DOUBLE))
    root = b.op("Cast", real, to=b.onnx_type)
    root = b.sub(root, b.truth(b.op("Greater", b.mul(root, root), x)))
    above = b.add(root, one)
    return b.add(root, b.truth(b.op("LessOrEqual", b.mul(above, above), x)))


def _div(b: Builder, node: Node, inputs: Sequence[str]) -> str:
    # Div truncates; Mod takes the sign of the divisor, so what is left divides exactly.
    x, d = inputs
    return b.op("Div", b.sub(x, b.op("Mod", x, d)), d)


def _slice(b: Builder, node: Node, inputs: Sequence[str]) -> str:
    return b.slice(inputs[0], node.integer("start"), node.integer("stop"))


def _concat(b: Builder, node: Node, inputs: Sequence[str]) -> str:
    return b.concat(inputs, -1)


def _reduce(b: Builder, node: Node, inputs: Sequence[str]) -> str:
    if node.attributes["kind"] == "sum":
        return b.sum(inputs[0], 1, keep=False)
    if node.attributes["kind"] == "max":
        return b.op("ReduceMax", inputs[0], b.sizes(1), keepdims=0)
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
    "isqrt": _isqrt,
    "div": _div,
    "slice": _slice,
    "concat": _concat,
    "reduce": _reduce,
}
"""One lowering for every operation of the integer graph, under its name."""
