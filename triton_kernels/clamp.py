"""Clamping with a gradient that lets saturated values come back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Saturate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, low: int, high: int) -> Tensor:
        ctx.low, ctx.high = low, high
        y = x.clamp(low, high)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (y,), g = ctx.saved_tensors, gradients[0]
        stuck = ((y >= ctx.high) & (g < 0)) | ((y <= ctx.low) & (g > 0))
        return g.masked_fill(stuck, 0.0), None, None


def saturate(x: Tensor, low: int, high: int) -> Tensor:
    """Clamp to [low, high]; at an end, a gradient passes only if descending it moves ``x`` inside.

    The result alone decides, so a fused kernel has nothing wider than the result to keep for its backward.
    """
    result: Tensor = _Saturate.apply(x, low, high)
    return result
