"""``shift`` (the one rounding rule), ``clamp`` and ``relu``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from mamba_int.graph import IntArray, Node, TensorType
from mamba_int.operations.base import Operation, Record, check, rounding_shift, shift_peak, shifted

if TYPE_CHECKING:
    from torch import Tensor


class Shift(Operation):
    """floor((x + 2^(k-1)) / 2^k) with k = ``places``; a negative k shifts left."""

    name = "shift"

    def infer(self, node: Node, inputs: Sequence[TensorType], seq_len: int) -> TensorType:
        (x,), k = inputs, node.integer("places")
        check(-24 <= k <= 40, f"places = {k}")
        return TensorType(x.shape, shifted(x.low, k), shifted(x.high, k), shift_peak(x.magnitude, k))

    def evaluate(self, node: Node, inputs: Sequence[IntArray], record: Record) -> IntArray:
        return rounding_shift(inputs[0], node.integer("places"))

    def execute(self, node: Node, inputs: Sequence[Tensor], record: Record, rounding: bool) -> Tensor:
        from triton_kernels.shift import shift

        return shift(inputs[0], node.integer("places"), rounding)


class Clamp(Operation):
    """min(max(x, low), high).

    A clamp with ``saturation`` true only keeps integers within their bits: the float twin leaves it out.
    """

    name = "clamp"

    def infer(self, node: Node, inputs: Sequence[TensorType], seq_len: int) -> TensorType:
        (x,), low, high = inputs, node.integer("low"), node.integer("high")
        check(low <= high, "low exceeds high")
        check(isinstance(node.attributes["saturation"], bool), "saturation is not a truth value")
        return TensorType(x.shape, min(max(x.low, low), high), min(max(x.high, low), high), x.magnitude)

    def evaluate(self, node: Node, inputs: Sequence[IntArray], record: Record) -> IntArray:
        return np.clip(inputs[0], node.integer("low"), node.integer("high"))

    def execute(self, node: Node, inputs: Sequence[Tensor], record: Record, rounding: bool) -> Tensor:
        from triton_kernels.clamp import saturate

        if node.attributes["saturation"] and not rounding:
            return inputs[0]
        return saturate(inputs[0], node.integer("low"), node.integer("high"))


class Relu(Operation):
    """max(x, 0)."""

    name = "relu"

    def infer(self, node: Node, inputs: Sequence[TensorType], seq_len: int) -> TensorType:
        (x,) = inputs
        return TensorType(x.shape, max(x.low, 0), max(x.high, 0), x.magnitude)

    def evaluate(self, node: Node, inputs: Sequence[IntArray], record: Record) -> IntArray:
        return np.maximum(inputs[0], 0)

    def execute(self, node: Node, inputs: Sequence[Tensor], record: Record, rounding: bool) -> Tensor:
        # Its gradient follows from its result, unlike that of a clamp at zero.
        return inputs[0].relu()
