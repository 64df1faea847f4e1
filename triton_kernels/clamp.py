"""Clamping with a gradient that lets saturated values come back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Saturate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, low: int, high: int) -> Tensor:
        ctx.low, ctx.high = low, high
        ctx.save_for_backward(x)
        return x.clamp(low, high)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (x,), g = ctx.saved_tensors, gradients[0]
        stuck = ((x > ctx.high) & (g < 0)) | ((x < ctx.low) & (g > 0))
        return g.masked_fill(stuck, 0.0), None, None


def saturate(x: Tensor, low: int, high: int) -> Tensor:
    """Clamp to [low, high]; outside, a gradient passes only if descending it moves ``x`` back inside."""
    result: Tensor = _Saturate.apply(x, low, high)
    return result
