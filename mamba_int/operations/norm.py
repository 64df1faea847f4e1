"""``norm``: BitShiftNorm, a division by the step of a geometric ladder nearest above the root mean square."""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt
from typing import TYPE_CHECKING

import numpy as np

from mamba_int.graph import IntArray, Node, TensorType
from mamba_int.operations.base import Operation, Record, check, rounding_shift, shift_peak, shifted

if TYPE_CHECKING:
    from torch import Tensor

MIDDLE = {1: 0.72, 2: 0.88}
"""Mean of the root mean squares that a ladder of so many steps an octave leaves."""


class Norm(Operation):
    """xs = clamp(shift(x, input_shift), +-input_limit); level = #{j: sum xs^2 > thresholds[j]};
    y = shift(x * multipliers[level], places), places = octaves + input_shift - frac + per_octave - 1.

    With ``per_octave`` 1 the thresholds are d 4^i (i < octaves) and the multipliers 2^(octaves - i): the
    root mean square of y lies in (1/2, 1] times 2^frac. With 2 they are d 4^i / 2 and d 4^i, the multipliers
    3 * 2^(octaves - i) and 2 * 2^(octaves - i): it lies in (0.7, 1.07]. The coarse ladder is the norm of
    Mamba-Integer checkpoints; it costs one point of accuracy on the digits (docs/log.md).

    Range rule (relational): at level j sum xs^2 <= thresholds[j], hence |xs| <= sqrt(thresholds[j]); a
    clamped element alone gives sum xs^2 >= input_limit^2, which bounds the level from below.
    """

    name = "norm"

    def infer(self, node: Node, inputs: Sequence[TensorType], seq_len: int) -> TensorType:
        (x,) = inputs
        d, limit, k_in = x.shape[-1], node.integer("input_limit"), node.integer("input_shift")
        check(
            0 < node.integer("octaves") <= 16 and 0 <= k_in <= 40 and limit > 0,
            "octaves, input_shift or input_limit out of range",
        )
        check(node.integer("per_octave") in (1, 2), "per_octave is neither 1 nor 2")
        places, thresholds, multipliers = self.places(node), self.thresholds(node, d), self.multipliers(node)
        squared = min(limit, shifted(x.magnitude, k_in))
        clamped = shifted(x.magnitude, k_in) > limit
        bounds = [x.magnitude * multipliers[-1]]
        for threshold, multiplier in zip(thresholds, multipliers, strict=False):
            unclamped = isqrt(threshold) * (1 << k_in) + ((1 << k_in) >> 1)
            bounds.append(min(x.magnitude, unclamped) * multiplier)
        if clamped:
            lowest = sum(limit * limit > t for t in thresholds)
            bounds.append(x.magnitude * multipliers[lowest])
        scaled = max(bounds)
        y = shifted(scaled, places)
        peak = max(d * squared * squared, shift_peak(scaled, places), shift_peak(x.magnitude, k_in))
        return TensorType(x.shape, -y, y, peak)

    @staticmethod
    def places(node: Node) -> int:
        """Places of the final shift, octaves + input_shift - frac + per_octave - 1."""
        places = node.integer("octaves") + node.integer("input_shift") - node.frac
        places += node.integer("per_octave") - 1
        check(places > 0, "frac exceeds octaves + input_shift")
        return places

    @staticmethod
    def thresholds(node: Node, d: int) -> list[int]:
        """What the sum of squares is compared with, ascending: d 4^i, after d 4^i / 2 if per_octave is 2."""
        octaves = [d * 4**i for i in range(node.integer("octaves"))]
        if node.integer("per_octave") == 1:
            return octaves
        # Sums are integers: exceeding half an odd number is exceeding its floor.
        return [threshold for octave in octaves for threshold in (octave // 2, octave)]

    @staticmethod
    def multipliers(node: Node) -> list[int]:
        """What x is multiplied by at each level, descending; one more than there are thresholds."""
        octaves = [1 << i for i in range(node.integer("octaves"), -1, -1)]
        if node.integer("per_octave") == 1:
            return octaves
        return [factor * octave for octave in octaves for factor in (3, 2)][:-1]

    def evaluate(self, node: Node, inputs: Sequence[IntArray], record: Record) -> IntArray:
        (x,), limit = inputs, node.integer("input_limit")
        xs = np.clip(rounding_shift(x, node.integer("input_shift")), -limit, limit)
        squares = (xs * xs).sum(-1, keepdims=True)
        thresholds, multipliers = self.thresholds(node, x.shape[-1]), np.array(self.multipliers(node))
        level = sum(((squares > t).astype(np.int64) for t in thresholds), np.zeros_like(squares))
        record("xs", xs)
        record("squares", squares)
        record("level", level)
        return rounding_shift(x * multipliers[level], self.places(node))

    def execute(self, node: Node, inputs: Sequence[Tensor], record: Record, rounding: bool) -> Tensor:
        from triton_kernels.bit_shift_norm import bit_shift_norm

        x = inputs[0]
        y, internals = bit_shift_norm(
            x,
            node.integer("input_shift"),
            node.integer("input_limit"),
            self.thresholds(node, x.shape[-1]),
            self.multipliers(node),
            self.places(node),
            node.frac,
            MIDDLE[node.integer("per_octave")],
            rounding,
        )
        for name, value in internals.items():
            record(name, value)
        return y
