"""BitShiftNorm: divide by the power of two nearest above the root mean square."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

FLOAT_GAIN = 0.72
"""Mean of rms / 2^j over the octave that BitShiftNorm maps to (1/2, 1]: the twin's RMSNorm uses it."""


class _BitShiftNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, exponent: Tensor, k: int) -> Tensor:
        factor = torch.exp2(-exponent - k)
        ctx.save_for_backward(x, factor)
        return torch.floor_(x * factor + 0.5)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        x, factor = ctx.saved_tensors
        g = gradients[0]
        along = (g * x).sum(-1, keepdim=True) / ((x * x).sum(-1, keepdim=True) + 1e-6)
        return factor * (g - x * along), None, None


def bit_shift_norm(
    x: Tensor, input_shift: int, input_limit: int, thresholds: list[int], frac: int, rounding: bool = True
) -> tuple[Tensor, dict[str, Tensor]]:
    """y = shift(x, j + input_shift - frac) with j the number of thresholds that sum(xs^2) exceeds.

    xs = clamp(shift(x, input_shift), +-input_limit) and thresholds d*4^i, so that rms(xs) / 2^j lies in
    (1/2, 1]. The gradient is that of RMSNorm (Zhang & Sennrich 2019) scaled by the power of two: the
    forward scale is a constant of the backward otherwise, which costs 6 points of accuracy.

    Args:
        x: integer values [..., d].
        input_shift, input_limit: how the copy that is squared is made.
        thresholds: d*4^i, ascending.
        frac: binary places of the result.
        rounding: False for the float twin, a true RMSNorm.

    Returns:
        The result before its int8 clamp, and the intermediates ``xs``, ``squares`` and ``exponent``.
    """
    if not rounding:
        mean_square = x.pow(2).mean(-1, keepdim=True)
        return x * torch.rsqrt(mean_square + 1e-5) * (FLOAT_GAIN * 2.0**frac), {}
    with torch.no_grad():
        xs = torch.floor(x * 2.0**-input_shift + 0.5) if input_shift else x
        xs = xs.clamp(-input_limit, input_limit)
        squares = (xs * xs).sum(-1, keepdim=True)
        exponent = torch.zeros_like(squares)
        for threshold in thresholds:
            exponent += squares > threshold
    result: Tensor = _BitShiftNorm.apply(x, exponent, input_shift - frac)
    return result, {"xs": xs, "squares": squares, "exponent": exponent}
