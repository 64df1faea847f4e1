"""The rounding rule and the gradient of a clamp, as the kernels of the integer graph compute them."""

from __future__ import annotations

import triton
import triton.language as tl


def half_unit(places: int) -> float:
    """What a shift by ``places`` adds before it cuts: nothing to the left or by none, which are exact."""
    return 0.5 if places > 0 else 0.0


@triton.jit
def rounded(x, factor, half):
    """shift(x, k) with ``factor`` 2^-k and ``half`` of k."""
    return tl.floor(x * factor + half)


@triton.jit
def clamp_gradient(result, gradient, low, high):
    """The gradient that ``triton_kernels.clamp.saturate`` passes on, from its result."""
    return tl.where(((result >= high) & (gradient < 0)) | ((result <= low) & (gradient > 0)), 0.0, gradient)
