"""The one rounding rule: shift(x, k) = floor((x + 2^(k-1)) / 2^k), with a straight-through gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Shift(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, k: int) -> Tensor:
        ctx.factor = 2.0**-k
        return torch.floor_(torch.add(0.5, x, alpha=ctx.factor)) if k > 0 else x * ctx.factor

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.factor, None


def shift(x: Tensor, k: int, rounding: bool = True) -> Tensor:
    """Rounding right shift of integer-valued floats; a negative ``k`` shifts left, exactly.

    Exact in float32 while ``|x| + 2^(k-1) <= 2^24``.

    Args:
        x: integer values, any shape.
        k: number of binary places.
        rounding: False for the float twin, which only scales.

    Returns:
        Tensor like ``x``. The gradient is that of ``x * 2^-k`` (straight-through, Bengio et al. 2013).
    """
    if k == 0:
        return x
    if not rounding:
        return x * 2.0**-k
    result: Tensor = _Shift.apply(x, k)
    return result
