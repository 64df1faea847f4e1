"""``rotate``: turn the pairs (i, i + N/2) of a vector by an angle that depends on the step in its chunk."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, sqrt
from typing import TYPE_CHECKING, Any

import numpy as np

from mamba_int.graph import IntArray, Node, TensorType
from mamba_int.operations.base import Memory, Operation, Record, check, rounding_shift

if TYPE_CHECKING:
    from torch import Tensor


class Rotate(Operation):
    """Rotation by constants of row ``t mod period``, each [period, N/2] with ``constant_frac`` places.

    ``form`` ``table``: (c v1 - s v2, s v1 + c v2), each rounded once; constants ``cos``, ``sin``.

    ``form`` ``shear``: three lifting steps v1 += shift(l v2), v2 += shift(g v1), v1 += shift(l v2) with
    l = -tan(angle/2), g = sin(angle), then ``sign`` for angles outside [-pi/2, pi/2]; exactly invertible
    (Daubechies & Sweldens 1998, lifting); constants ``lam``, ``gam``, ``sign``.
    """

    name = "rotate"

    def infer(self, node: Node, inputs: Sequence[TensorType], seq_len: int) -> TensorType:
        (x,) = inputs
        frac, period, half = node.integer("constant_frac"), node.integer("period"), x.shape[-1] // 2
        names = ("cos", "sin") if node.attributes["form"] == "table" else ("lam", "gam", "sign")
        check(node.attributes["form"] in ("table", "shear"), f"form = {node.attributes['form']}")
        check(0 <= frac <= 24, f"constant_frac = {frac}")
        for name in names:
            check(node.constants[name].shape == (period, half), f"{name} does not fit")
        check(x.shape[-1] % 2 == 0, "needs pairs")
        mag, one = x.magnitude, 1 << frac
        if names[0] == "cos":
            cos, sin = node.constants["cos"], node.constants["sin"]
            reach = int((np.abs(cos) + np.abs(sin)).max()) * mag
            bound = (reach + one // 2) // one
            norm = float(np.sqrt((cos**2 + sin**2).max())) / one
            pair = ceil(norm * sqrt(2) * mag + sqrt(0.5) + 1e-6)
            return TensorType(x.shape, -bound, bound, reach + one // 2, pair)
        lam, gam = int(np.abs(node.constants["lam"]).max()), int(np.abs(node.constants["gam"]).max())
        check(bool((np.abs(node.constants["sign"]) == 1).all()), "sign is not +-1")
        first = mag + (lam * mag + one // 2) // one
        second = mag + (gam * first + one // 2) // one
        bound = max(first + (lam * second + one // 2) // one, second)
        stretch, slack = self._lifting(node, one)
        pair = ceil(stretch * sqrt(2) * mag + slack + 1e-6)
        bound = min(bound, pair)
        return TensorType(x.shape, -bound, bound, max(lam * second, gam * first) + one // 2, pair)

    @staticmethod
    def _lifting(node: Node, one: int) -> tuple[float, float]:
        """Of the three steps as they are, rounded constants included: the largest stretch of a pair, and
        how far the three roundings of 1/2 can carry it."""
        lam, gam = node.constants["lam"] / one, node.constants["gam"] / one
        a, b, c = 1 + lam * gam, 2 * lam + lam * lam * gam, gam
        # Spectral norm of [[a, b], [c, a]], whose determinant is 1.
        half = (2 * a * a + b * b + c * c) / 2
        stretch = np.sqrt(half + np.sqrt(np.maximum(half * half - 1, 0)))
        slack = (np.sqrt(a * a + c * c) + np.sqrt(1 + lam * lam) + 1) / 2
        return float(stretch.max()), float(slack.max())

    def evaluate(self, node: Node, inputs: Sequence[IntArray], record: Record) -> IntArray:
        return self._turn(node, inputs[0], np.arange(inputs[0].shape[1]) % node.integer("period"))

    def evaluate_step(
        self, node: Node, inputs: Sequence[IntArray], memory: Memory, position: IntArray, record: Record
    ) -> IntArray:
        return self._turn(node, inputs[0], position[:, None] % node.integer("period"))

    @staticmethod
    def _turn(node: Node, x: IntArray, row: IntArray) -> IntArray:
        """Rotate x [batch, T, N] by the constants of ``row``, [T] or [batch, T]."""
        frac, half = node.integer("constant_frac"), x.shape[-1] // 2
        v1, v2 = x[..., :half], x[..., half:]
        if node.attributes["form"] == "table":
            c, s = node.constants["cos"][row], node.constants["sin"][row]
            return rounding_shift(np.concatenate([c * v1 - s * v2, s * v1 + c * v2], -1), frac)
        lam, gam, sign = (node.constants[name][row] for name in ("lam", "gam", "sign"))
        v1 = v1 + rounding_shift(lam * v2, frac)
        v2 = v2 + rounding_shift(gam * v1, frac)
        v1 = v1 + rounding_shift(lam * v2, frac)
        return np.concatenate([sign * v1, sign * v2], -1)

    def execute(self, node: Node, inputs: Sequence[Tensor], record: Record, rounding: bool) -> Tensor:
        import torch

        x = inputs[0]
        row = torch.arange(x.shape[1], device=x.device) % node.integer("period")
        return self._turn_tensor(node, x, row, rounding)

    def execute_step(
        self, node: Node, inputs: Sequence[Tensor], memory: Memory, position: Tensor, record: Record
    ) -> Tensor:
        return self._turn_tensor(node, inputs[0], position[:, None] % node.integer("period"), True)

    @staticmethod
    def _turn_tensor(node: Node, x: Tensor, row: Tensor, rounding: bool) -> Tensor:
        import torch

        from triton_kernels.shift import shift

        frac, half = node.integer("constant_frac"), x.shape[-1] // 2
        v1, v2 = x[..., :half], x[..., half:]
        if node.attributes["form"] == "table":
            c, s = node.constants["cos"][row], node.constants["sin"][row]
            return shift(torch.cat([c * v1 - s * v2, s * v1 + c * v2], -1), frac, rounding)
        lam, gam, sign = (node.constants[name][row] for name in ("lam", "gam", "sign"))
        v1 = v1 + shift(lam * v2, frac, rounding)
        v2 = v2 + shift(gam * v1, frac, rounding)
        v1 = v1 + shift(lam * v2, frac, rounding)
        return torch.cat([sign * v1, sign * v2], -1)


def unrotate(node: Node, rotated: IntArray) -> IntArray:
    """The exact inverse of a ``shear`` rotation: the lifting steps undone in reverse.

    Args:
        node: a ``rotate`` node of form ``shear``.
        rotated: its result, [batch, T, N].
    """
    constants: dict[str, Any] = {
        name: value[np.arange(rotated.shape[1]) % node.integer("period")]
        for name, value in node.constants.items()
    }
    frac, half = node.integer("constant_frac"), rotated.shape[-1] // 2
    v1, v2 = constants["sign"] * rotated[..., :half], constants["sign"] * rotated[..., half:]
    v1 = v1 - rounding_shift(constants["lam"] * v2, frac)
    v2 = v2 - rounding_shift(constants["gam"] * v1, frac)
    v1 = v1 - rounding_shift(constants["lam"] * v2, frac)
    return np.concatenate([v1, v2], -1)
