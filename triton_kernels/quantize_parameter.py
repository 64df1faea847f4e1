"""Latent real parameters as integers in one kernel: a step quantizes hundreds of them, most of them tiny."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_kernels.rounding import clamp_gradient, rounded

BLOCK = 1024


@triton.jit
def _quantize_kernel(real, integer, count, factor, limit, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(real + i, mask=i < count, other=0.0)
    y = rounded(x, factor, 0.5)
    tl.store(integer + i, tl.minimum(tl.maximum(y, -limit), limit), mask=i < count)


@triton.jit
def _quantize_gradient_kernel(gradient, integer, out, count, factor, limit, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gradient + i, mask=i < count, other=0.0)
    y = tl.load(integer + i, mask=i < count, other=0.0)
    tl.store(out + i, clamp_gradient(y, g, -limit, limit) * factor, mask=i < count)


class _Quantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, real: Tensor, frac: int, limit: int) -> Tensor:
        real = real.contiguous()
        integer = torch.empty_like(real)
        ctx.scalars = 2.0**frac, float(limit)
        count = real.numel()
        _quantize_kernel[(triton.cdiv(count, BLOCK),)](real, integer, count, *ctx.scalars, BLOCK)
        ctx.save_for_backward(integer)
        return integer

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (integer,) = ctx.saved_tensors
        out = torch.empty_like(integer)
        count = integer.numel()
        _quantize_gradient_kernel[(triton.cdiv(count, BLOCK),)](
            gradients[0].contiguous(), integer, out, count, *ctx.scalars, BLOCK
        )
        return out, None, None


def quantize_parameter_fused(real: Tensor, frac: int, limit: int) -> Tensor:
    """``mamba_int.model.quantize_parameter``, values and gradients equal to the bit.

    Args:
        real: float32, any shape.
        frac: binary places of the integers. limit: their largest magnitude.
    """
    result: Tensor = _Quantize.apply(real, frac, limit)
    return result
