"""BitNet b1.58 weights in one pass over a matrix, a program a row."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_kernels.narrow import narrow_dtype
from triton_kernels.ternarize import SMALLEST_MEAN


@triton.jit
def _ternarize_kernel(weight, ternary, columns, SMALLEST: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < columns
    w = tl.load(weight + row * columns + column, mask=inside, other=0.0)
    mean = tl.maximum(tl.sum(tl.abs(w), 0) / columns, SMALLEST)
    rounded = tl.floor(tl.math.div_rn(w, mean) + 0.5)
    rounded = tl.minimum(tl.maximum(rounded, -1.0), 1.0)
    tl.store(ternary + row * columns + column, rounded.to(ternary.dtype.element_ty), mask=inside)


class _Ternarize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, frac: int) -> Tensor:
        ctx.factor = 2.0**frac
        rows, columns = weight.shape
        ternary = torch.empty(rows, columns, dtype=narrow_dtype(weight.device), device=weight.device)
        block = triton.next_power_of_2(columns)
        _ternarize_kernel[(rows,)](
            weight.contiguous(), ternary, columns, SMALLEST_MEAN, block, num_warps=4 if block <= 2048 else 8
        )
        return ternary

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0].float() * ctx.factor, None


def ternarize_rows(weight: Tensor, frac: int) -> Tensor:
    """``triton_kernels.ternarize.ternarize`` as narrow integers; a mean may differ in its last place.

    Args:
        weight: latent weights, float32 [outputs, inputs].
        frac: binary places of the scale that the following nodes apply.
    """
    result: Tensor = _Ternarize.apply(weight, frac)
    return result
