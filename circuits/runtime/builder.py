"""Writes ONNX nodes on integer tensors, with the few forms that ONNX itself lacks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import ArrayLike
from onnx import TensorProto, helper, numpy_helper

from mamba_int.graph import Graph, IntArray, smallest_dtype

FLOAT32_BITS = 24
"""Graphs up to this width run in float32, whose kernels are the fastest: it holds integers up to 2^24, and so
all sums that never exceed it; float64 holds them up to 2^53."""
INT32_BITS = 29
"""Wider ones up to this run in int32: the offset of the shift needs a bit beside the sign."""
SMALL = 64
"""Constants of no more elements are stored as they are used."""


class Builder:
    """Nodes and constants of one ONNX graph in the making. Tensors are handled by their ONNX names.

    Args:
        graph: the integer graph that is being lowered.
        length: steps of the input.

    Attributes:
        graph, length: these.
        dtype: of every tensor: float32 or int32 where the proven intervals allow it, else int64.
        onnx_type: the same as ``TensorProto`` has it. whole_type: that of inputs and logits, an integer type.
        names: tensors that bear a name of the integer graph, in order.
    """

    def __init__(self, graph: Graph, length: int) -> None:
        self.graph = graph
        self.length = length
        bits = graph.max_bits
        narrow = bits <= INT32_BITS
        self.whole_type = TensorProto.INT32 if narrow else TensorProto.INT64
        self.onnx_type = TensorProto.FLOAT if bits <= FLOAT32_BITS else self.whole_type
        self.dtype: type[np.number[Any]] = helper.tensor_dtype_to_np_dtype(self.onnx_type).type
        # Above every magnitude, and a multiple of every power of two that is shifted by.
        self._offset = 1 << (30 if narrow else 62)
        self._types: dict[str, int] = {}
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[tuple[str, tuple[int, ...], bytes], onnx.TensorProto] = {}
        self.names: list[str] = []
        self._casts: dict[tuple[str, int], str] = {}
        self._count = 0

    # -- tensors -----------------------------------------------------------------------------------------

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """Append a node; return the name of its result."""
        self._count += 1
        result = f"%{self._count}"
        self.nodes.append(helper.make_node(kind, inputs, [result], **attributes))
        return result

    def call(self, tensor: str, name: str) -> str:
        """Give a tensor its name in the integer graph, and return that.

        The tensor must be fresh: nothing reads it yet under its old name.
        """
        last = self.nodes[-1] if self.nodes else None
        if last is not None and tensor == last.output[0] and tensor.startswith("%"):
            last.output[0] = name
        else:
            self.nodes.append(helper.make_node("Identity", [tensor], [name]))
        self.names.append(name)
        return name

    def outputs(self, names: Mapping[str, str]) -> None:
        """Give results of nodes the names of outputs: output -> tensor. Named tensors lose their own names.

        What is not the result of a node, or has an output's name already, is copied.
        """
        produced = {result for node in self.nodes for result in node.output}
        renamed: dict[str, str] = {}
        copies = []
        for output, tensor in names.items():
            if tensor in produced and tensor not in renamed:
                renamed[tensor] = output
            else:
                copies.append(helper.make_node("Identity", [renamed.get(tensor, tensor)], [output]))
        for node in self.nodes:
            node.input[:] = [renamed.get(name, name) for name in node.input]
            node.output[:] = [renamed.get(name, name) for name in node.output]
        self.nodes += copies

    def cast(self, x: str, to: int) -> str:
        """A tensor in another type, itself if it has it; asked for again, it is the same one."""
        if self._types.get(x, self.onnx_type) == to:
            return x
        if (x, to) not in self._casts:
            self._casts[x, to] = self.typed(self.op("Cast", x, to=to), to)
        return self._casts[x, to]

    def typed(self, x: str, kind: int) -> str:
        """Note that a tensor has another type than the rest, and return it."""
        self._types[x] = kind
        return x

    def same_type(self, x: str, other: str) -> str:
        """Note that a tensor has the type of another, and return it."""
        return self.typed(x, self._types.get(other, self.onnx_type))

    def input(self, name: str) -> str:
        """The input of the graph in its dtype; what indexes with it takes it as it is."""
        if self.whole_type == self.onnx_type:
            return name
        # Not a number: another node's name must not become that of what all readers of the input read.
        own = f"{name}%"
        self.nodes.append(helper.make_node("Cast", [name], [own], to=self.onnx_type))
        self._casts[own, self.whole_type] = self.typed(name, self.whole_type)
        return own

    def own(self, x: str) -> str:
        """A tensor in the dtype of the graph."""
        return self.cast(x, self.onnx_type)

    def index(self, x: str) -> str:
        """A tensor as indices."""
        return self.cast(x, self.whole_type)

    @staticmethod
    def real(bound: int) -> int:
        """The float type that is exact up to a bound, a type of ``TensorProto``."""
        kind: int = TensorProto.FLOAT if bound <= 1 << FLOAT32_BITS else TensorProto.DOUBLE
        return kind

    def initializer(self, array: np.ndarray[Any, Any]) -> str:
        """A constant with the dtype it has; equal ones are stored once."""
        key = (array.dtype.str, array.shape, np.ascontiguousarray(array).tobytes())
        if key not in self.initializers:
            self.initializers[key] = numpy_helper.from_array(array, f"%c{len(self.initializers)}")
        name: str = self.initializers[key].name
        return name

    def narrow(self, values: IntArray) -> str:
        """Integers in the smallest type that holds them, to be cast by whoever reads them."""
        narrowed = values.astype(smallest_dtype(values))
        return self.typed(self.initializer(narrowed), helper.np_dtype_to_tensor_dtype(narrowed.dtype))

    def constant(self, values: ArrayLike) -> str:
        """Integers of the graph, in its dtype; ONNX Runtime widens large ones once, when it loads them."""
        integers = np.asarray(values)
        if (
            integers.size > SMALL
            and np.dtype(smallest_dtype(integers)).itemsize < np.dtype(self.dtype).itemsize
        ):
            return self.own(self.narrow(integers))
        return self.initializer(integers.astype(self.dtype))

    def sizes(self, *values: int) -> str:
        """A vector of int64, as shapes and axes are given."""
        return self.initializer(np.array(values, np.int64))

    # -- arithmetic --------------------------------------------------------------------------------------

    def add(self, a: str, b: str) -> str:
        return self.op("Add", a, b)

    def sub(self, a: str, b: str) -> str:
        return self.op("Sub", a, b)

    def mul(self, a: str, b: str) -> str:
        return self.op("Mul", a, b)

    def matmul(self, a: str, b: str, bound: int) -> str:
        """The product of two matrices of integers, in floats that hold it: those have fast kernels.

        Args:
            a, b: [..., m, k] and [..., k, n], of any type.
            bound: proven bound of the sum of the magnitudes of the terms of every element, so that every
                partial sum is exact, in any order.
        """
        real = self.real(bound)
        return self.own(self.typed(self.op("MatMul", self.cast(a, real), self.cast(b, real)), real))

    def scale(self, x: str, places: int) -> str:
        """x << places, for places >= 0."""
        return self.mul(x, self.constant(1 << places)) if places else x

    def shift(self, x: str, places: int, low: int | None = None) -> str:
        """The rounding shift floor((x + 2^(k-1)) / 2^k); a negative k shifts left.

        In float32 every step of it is exact. Division of integers truncates, so an offset that is a multiple
        of 2^k makes x positive, if ``low``, a proven bound, does not say that it is. (Shifts are for unsigned
        integers: two casts more, and no faster.)
        """
        if places <= 0:
            return self.scale(x, -places)
        if self.onnx_type == TensorProto.FLOAT:
            fraction = self.mul(x, self.initializer(np.array(2.0**-places, np.float32)))
            return self.op("Floor", self.add(fraction, self.initializer(np.array(0.5, np.float32))))
        half = 1 << (places - 1)
        offset = 0 if low is not None and low + half >= 0 else self._offset
        lowered = self.op("Div", self.add(x, self.constant(offset + half)), self.constant(1 << places))
        return self.sub(lowered, self.constant(offset >> places)) if offset else lowered

    def clip(self, x: str, low: int, high: int) -> str:
        """min(max(x, low), high)."""
        info = np.iinfo(helper.tensor_dtype_to_np_dtype(self.whole_type))
        bottom, top = (self.constant(min(max(v, info.min), info.max)) for v in (low, high))
        return self.op("Clip", x, bottom, top)

    def truth(self, condition: str) -> str:
        """A bool tensor as 0 and 1."""
        return self.op("Cast", condition, to=self.onnx_type)

    def sum(self, x: str, axis: int, keep: bool) -> str:
        """Sum over one axis."""
        return self.op("ReduceSum", x, self.sizes(axis), keepdims=int(keep))

    # -- shape -------------------------------------------------------------------------------------------

    def slice(self, x: str, start: int, stop: int, axis: int = -1) -> str:
        """Elements start to stop (exclusive) of one axis."""
        return self.op("Slice", x, self.sizes(start), self.sizes(stop), self.sizes(axis))

    def concat(self, parts: Sequence[str], axis: int) -> str:
        return self.op("Concat", *parts, axis=axis) if len(parts) > 1 else parts[0]

    def reshape(self, x: str, *shape: int) -> str:
        """To a shape whose 0 keeps the size found there: the batch."""
        return self.op("Reshape", x, self.sizes(*shape))

    def transpose(self, x: str, *order: int) -> str:
        return self.op("Transpose", x, perm=list(order))

    def unsqueeze(self, x: str, axis: int) -> str:
        return self.op("Unsqueeze", x, self.sizes(axis))

    def pad(self, x: str, rank: int, axis: int, before: int, after: int) -> str:
        """Zeros before and after one axis."""
        if before == after == 0:
            return x
        widths = [0] * (2 * rank)
        widths[axis % rank], widths[rank + axis % rank] = before, after
        return self.op("Pad", x, self.sizes(*widths))
