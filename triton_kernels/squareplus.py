"""Integer squareplus, correct for every argument whose square plus four fits 2^30."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def integer_root(square):
    """floor(sqrt(square)) of int32 0..2^30: a float root is at most one off, and is put right."""
    root = tl.sqrt_rn(square.to(tl.float32)).to(tl.int32)
    root = tl.where(root * root > square, root - 1, root)
    return tl.where((root + 1) * (root + 1) <= square, root + 1, root)


@triton.jit
def squareplus_of(x, FOUR: tl.constexpr):
    """shift(x + floor(sqrt(x^2 + FOUR)), 1) of int32 x."""
    return (x + integer_root(x * x + FOUR) + 1) >> 1


@triton.jit
def _squareplus_kernel(x, out, count, FOUR: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i, mask=i < count, other=0)
    tl.store(out + i, squareplus_of(value, FOUR), mask=i < count)


def squareplus(x: Tensor, frac: int) -> Tensor:
    """(x + sqrt(x^2 + 4)) / 2 (Barron 2021, arXiv 2112.11687) on integers with ``frac`` binary places.

    Args:
        x: int32, any shape, |x| < 2^15 - 2^(frac + 1).
        frac: binary places of x and of the result, 0 to 13.

    Returns:
        int32 like x: shift(x + floor(sqrt(x^2 + 4 * 4^frac)), 1).
    """
    x = x.contiguous()
    out = torch.empty_like(x)
    _squareplus_kernel[(triton.cdiv(x.numel(), 1024),)](x, out, x.numel(), 4 << 2 * frac, 1024)
    return out
