"""``norm``: BitShiftNorm, a division by the power of two nearest above the root mean square."""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt
from typing import TYPE_CHECKING

import numpy as np

from mamba_int.graph import IntArray, Node, TensorType
from mamba_int.operations.base import Operation, Record, check, rounding_shift, shift_peak, shifted

if TYPE_CHECKING:
    from torch import Tensor


class Norm(Operation):
    """xs = clamp(shift(x, input_shift), +-input_limit); j = #{i < levels: sum xs^2 > d 4^i};
    y = shift(x << (levels - j), levels + input_shift - frac).

    rms(xs) / 2^j lies in (1/2, 1], so y has ``frac`` binary places of a normalised vector.

    Range rule (relational): if j < levels then sum xs^2 <= d 4^j, hence |xs| <= sqrt(d) 2^j; a clamped
    element alone gives sum xs^2 >= input_limit^2, which bounds j from below.
    """

    name = "norm"

    def infer(self, node: Node, inputs: Sequence[TensorType], seq_len: int) -> TensorType:
        (x,) = inputs
        d, levels, limit = x.shape[-1], node.integer("levels"), node.integer("input_limit")
        k_in, places = node.integer("input_shift"), self.places(node)
        check(
            0 < levels <= 16 and 0 <= k_in <= 40 and limit > 0,
            "levels, input_shift or input_limit out of range",
        )
        squared = min(limit, shifted(x.magnitude, k_in))
        clamped = shifted(x.magnitude, k_in) > limit
        bounds = [x.magnitude]
        for j in range(levels):
            unclamped = isqrt(d * 4**j) * (1 << k_in) + ((1 << k_in) >> 1)
            bounds.append(min(x.magnitude, unclamped) << (levels - j))
        if clamped:
            lowest = sum(limit * limit > t for t in self.thresholds(node, d))
            bounds.append(x.magnitude << (levels - lowest))
        scaled = max(bounds)
        y = shifted(scaled, places)
        peak = max(d * squared * squared, shift_peak(scaled, places), shift_peak(x.magnitude, k_in))
        return TensorType(x.shape, -y, y, peak)

    @staticmethod
    def places(node: Node) -> int:
        """Places of the final shift, levels + input_shift - frac."""
        places = node.integer("levels") + node.integer("input_shift") - node.frac
        check(places > 0, "frac exceeds levels + input_shift")
        return places

    @staticmethod
    def thresholds(node: Node, d: int) -> list[int]:
        """d 4^i for i < levels: what the sum of squares is compared with."""
        return [d * 4**i for i in range(node.integer("levels"))]

    def evaluate(self, node: Node, inputs: Sequence[IntArray], record: Record) -> IntArray:
        (x,), limit = inputs, node.integer("input_limit")
        xs = np.clip(rounding_shift(x, node.integer("input_shift")), -limit, limit)
        squares = (xs * xs).sum(-1, keepdims=True)
        exponent = sum(
            ((squares > t).astype(np.int64) for t in self.thresholds(node, x.shape[-1])),
            np.zeros_like(squares),
        )
        record("xs", xs)
        record("squares", squares)
        record("exponent", exponent)
        return rounding_shift(x << (node.integer("levels") - exponent), self.places(node))

    def execute(self, node: Node, inputs: Sequence[Tensor], record: Record, rounding: bool) -> Tensor:
        from triton_kernels.bit_shift_norm import bit_shift_norm

        x = inputs[0]
        y, internals = bit_shift_norm(
            x,
            node.integer("input_shift"),
            node.integer("input_limit"),
            self.thresholds(node, x.shape[-1]),
            node.frac,
            rounding,
        )
        for name, value in internals.items():
            record(name, value)
        return y
