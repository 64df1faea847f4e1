"""``isqrt`` (integer square root) and ``div`` (floor division by a positive divisor)."""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt
from typing import TYPE_CHECKING

import numpy as np

from mamba_int.graph import IntArray, Node, TensorType
from mamba_int.operations.base import Operation, Record, check

if TYPE_CHECKING:
    from torch import Tensor


class Isqrt(Operation):
    """The r >= 0 with r^2 <= x < (r + 1)^2."""

    name = "isqrt"

    def infer(self, node: Node, inputs: Sequence[TensorType], seq_len: int) -> TensorType:
        (x,) = inputs
        check(x.low >= 0, "the argument can be negative")
        check(x.high < 1 << 50, "the argument can exceed 50 bits")
        return TensorType(x.shape, isqrt(x.low), isqrt(x.high), x.high)

    def evaluate(self, node: Node, inputs: Sequence[IntArray], record: Record) -> IntArray:
        # The float root is off by at most one below 2^50; one step each way makes it exact.
        root = np.sqrt(inputs[0].astype(np.float64)).astype(np.int64)
        root -= root * root > inputs[0]
        return root + ((root + 1) * (root + 1) <= inputs[0])

    def execute(self, node: Node, inputs: Sequence[Tensor], record: Record, rounding: bool) -> Tensor:
        # float64: the root of an integer below 2^50 never rounds up across an integer.
        from triton_kernels.straight_through import straight_through

        root = inputs[0].sqrt()
        if not rounding:
            return root
        return straight_through(root, inputs[0].detach().double().sqrt().floor().to(root.dtype))


class Div(Operation):
    """floor(x / d) for d >= 1."""

    name = "div"

    def infer(self, node: Node, inputs: Sequence[TensorType], seq_len: int) -> TensorType:
        x, d = inputs
        check(x.shape == d.shape, "operands differ in shape")
        check(d.low >= 1, "the divisor can be zero or negative")
        corners = [a // b for a in (x.low, x.high) for b in (d.low, d.high)]
        return TensorType(x.shape, min(corners), max(corners), max(x.magnitude, d.magnitude))

    def evaluate(self, node: Node, inputs: Sequence[IntArray], record: Record) -> IntArray:
        return inputs[0] // inputs[1]

    def execute(self, node: Node, inputs: Sequence[Tensor], record: Record, rounding: bool) -> Tensor:
        from triton_kernels.straight_through import straight_through

        x, d = inputs
        ratio = x / d
        if not rounding:
            return ratio
        # float64 holds both operands, and their quotient is at least 2^-24 away from any integer it is not.
        floor = (x.detach().double() / d.detach().double()).floor().to(x.dtype)
        return straight_through(ratio, floor)
