"""BitShiftNorm: divide by the step of a geometric ladder nearest above the root mean square."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor


@cache
def _constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A vector on the device, copied there once: a CUDA graph cannot hold a copy from the host."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device=device)


class _BitShiftNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(x, factor)
        return torch.floor_(x * factor + 0.5)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        x, factor = ctx.saved_tensors
        g = gradients[0]
        along = (g * x).sum(-1, keepdim=True) / ((x * x).sum(-1, keepdim=True) + 1e-6)
        return factor * (g - x * along), None


def bit_shift_norm(
    x: Tensor,
    input_shift: int,
    input_limit: int,
    thresholds: list[int],
    multipliers: list[int],
    places: int,
    frac: int,
    gain: float,
    rounding: bool = True,
) -> tuple[Tensor, dict[str, Tensor]]:
    """y = shift(x * multipliers[level], places), level the number of thresholds that sum(xs^2) exceeds.

    xs = clamp(shift(x, input_shift), +-input_limit). The gradient is that of RMSNorm (Zhang & Sennrich 2019)
    scaled by the multiplier: the forward scale is a constant of the backward otherwise, which costs 6 points
    of accuracy.

    Args:
        x: integer values [..., d].
        input_shift, input_limit: how the copy that is squared is made.
        thresholds, multipliers, places: the ladder, see ``mamba_int.operations.norm``.
        frac: binary places of the result.
        gain: root mean square of the float twin's result, the middle of what the ladder gives.
        rounding: False for the float twin, a true RMSNorm.

    Returns:
        The result before its int8 clamp, and the intermediates ``xs``, ``squares`` and ``level``.
    """
    if not rounding:
        mean_square = x.pow(2).mean(-1, keepdim=True)
        return x * torch.rsqrt(mean_square + 1e-5) * (gain * 2.0**frac), {}
    with torch.no_grad():
        xs = torch.floor(x * 2.0**-input_shift + 0.5) if input_shift else x
        xs = xs.clamp(-input_limit, input_limit)
        squares = (xs * xs).sum(-1, keepdim=True)
        steps = _constant(tuple(thresholds), x.dtype, x.device)
        factors = _constant(tuple(m * 2.0**-places for m in multipliers), x.dtype, x.device)
        index = (squares > steps).sum(-1, keepdim=True)
        level, factor = index.to(x.dtype), factors[index]
    result: Tensor = _BitShiftNorm.apply(x, factor)
    return result, {"xs": xs, "squares": squares, "level": level}
