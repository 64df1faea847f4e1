"""Dyadic rotation of pairs over time, in its table and three-shear forms."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_kernels.narrow import narrow_dtype
from triton_kernels.rounding import rounded


@triton.jit
def _rotate_kernel(
    x, first, second, sign, out, T, HALF, Q, stride_b, stride_t, factor, SHEAR: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    chunk, b = tl.program_id(0), tl.program_id(1)
    q, n = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_N)
    t = chunk * Q + q
    inside = ((q < Q) & (t < T))[:, None] & (n < HALF)[None, :]
    at = b.to(tl.int64) * stride_b + t[:, None] * stride_t + n[None, :]
    v1 = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    v2 = tl.load(x + at + HALF, mask=inside, other=0.0).to(tl.float32)
    constant = q[:, None] * HALF + n[None, :]
    a = tl.load(first + constant, mask=inside, other=0.0)
    s = tl.load(second + constant, mask=inside, other=0.0)
    if SHEAR:
        v1 += rounded(a * v2, factor, 0.5)
        v2 += rounded(s * v1, factor, 0.5)
        v1 += rounded(a * v2, factor, 0.5)
        turn = tl.load(sign + constant, mask=inside, other=0.0)
        y1, y2 = turn * v1, turn * v2
    else:
        y1, y2 = rounded(a * v1 - s * v2, factor, 0.5), rounded(s * v1 + a * v2, factor, 0.5)
    to = (b.to(tl.int64) * T + t)[:, None] * (2 * HALF) + n[None, :]
    tl.store(out + to, y1.to(out.dtype.element_ty), mask=inside)
    tl.store(out + to + HALF, y2.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _rotate_gradient_kernel(
    gradient, x, first, second, sign, d_x, d_first, d_second, T, HALF, Q, group, stride_b, stride_t, factor,
    SHEAR: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A program walks over ``group`` chunks of a sequence and sums the gradients of the constants."""
    b = tl.program_id(1)
    q, n = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_N)
    held = (q < Q)[:, None] & (n < HALF)[None, :]
    constant = q[:, None] * HALF + n[None, :]
    a = tl.load(first + constant, mask=held, other=0.0)
    s = tl.load(second + constant, mask=held, other=0.0)
    d_a = tl.zeros((BLOCK_Q, BLOCK_N), tl.float32)
    d_s = tl.zeros((BLOCK_Q, BLOCK_N), tl.float32)
    for index in range(group):
        t = (tl.program_id(0) * group + index) * Q + q
        inside = held & (t < T)[:, None]
        at = b.to(tl.int64) * stride_b + t[:, None] * stride_t + n[None, :]
        to = (b.to(tl.int64) * T + t)[:, None] * (2 * HALF) + n[None, :]
        v1 = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        v2 = tl.load(x + at + HALF, mask=inside, other=0.0).to(tl.float32)
        g1 = tl.load(gradient + to, mask=inside, other=0.0).to(tl.float32)
        g2 = tl.load(gradient + to + HALF, mask=inside, other=0.0).to(tl.float32)
        if SHEAR:
            turn = tl.load(sign + constant, mask=inside, other=0.0)
            w1 = v1 + rounded(a * v2, factor, 0.5)
            w2 = v2 + rounded(s * w1, factor, 0.5)
            g1, g2 = turn * g1, turn * g2
            # Backwards through v1 += a w2, v2 += s w1, v1 += a v2.
            d_a += g1 * w2 * factor
            g2 += g1 * a * factor
            d_s += g2 * w1 * factor
            g1 += g2 * s * factor
            d_a += g1 * v2 * factor
            g2 += g1 * a * factor
            d1, d2 = g1, g2
        else:
            d1, d2 = (a * g1 + s * g2) * factor, (a * g2 - s * g1) * factor
            d_a += (g1 * v1 + g2 * v2) * factor
            d_s += (g2 * v1 - g1 * v2) * factor
        tl.store(d_x + to, d1.to(d_x.dtype.element_ty), mask=inside)
        tl.store(d_x + to + HALF, d2.to(d_x.dtype.element_ty), mask=inside)
    part = (b * tl.num_programs(0) + tl.program_id(0)) * Q * HALF + constant
    tl.store(d_first + part, d_a, mask=held)
    tl.store(d_second + part, d_s, mask=held)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, first: Tensor, second: Tensor, sign: Tensor | None, frac: int) -> Tensor:
        if x.stride(-1) != 1:
            x = x.contiguous()
        first, second = first.contiguous(), second.contiguous()
        (B, T, N), Q = x.shape, len(first)
        out = torch.empty(B, T, N, dtype=narrow_dtype(x.device), device=x.device)
        blocks = {"BLOCK_Q": triton.next_power_of_2(Q), "BLOCK_N": triton.next_power_of_2(N // 2)}
        _rotate_kernel[(triton.cdiv(T, Q), B)](
            x, first, second, sign, out, T, N // 2, Q, x.stride(0), x.stride(1), 2.0**-frac,
            SHEAR=sign is not None, **blocks,
        )  # fmt: skip
        ctx.save_for_backward(x, first, second, sign)
        ctx.frac, ctx.blocks = frac, blocks
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, first, second, sign = ctx.saved_tensors
        (B, T, N), Q = x.shape, len(first)
        d_x = torch.empty(B, T, N, dtype=x.dtype, device=x.device)
        # Few programs have few partial sums to write; a GPU wants some hundreds of them.
        chunks = triton.cdiv(T, Q)
        group = max(1, min(chunks, B * chunks // 512))
        programs = triton.cdiv(chunks, group)
        parts = torch.empty(2, B * programs, *first.shape, device=x.device)
        _rotate_gradient_kernel[(programs, B)](
            gradients[0].contiguous(), x, first, second, sign, d_x, parts[0], parts[1], T, N // 2, Q,
            group, x.stride(0), x.stride(1), 2.0**-ctx.frac, SHEAR=sign is not None, **ctx.blocks,
        )  # fmt: skip
        sums = parts.sum(1)
        return d_x, sums[0], sums[1], None, None


def rotate(x: Tensor, first: Tensor, second: Tensor, sign: Tensor | None, frac: int) -> Tensor:
    """``rotate`` of the integer graph: pairs (v_i, v_(i+N/2)) turned by the angle of step t modulo Q.

    Args:
        x: narrow integers [B, T, N].
        first, second: integers, float32 [Q, N/2]: cos and sin of the table form, lam and gam of the other.
        sign: +-1 [Q, N/2] of the shear form; None for the table form.
        frac: binary places of the constants.

    Returns:
        Integers [B, T, N] of magnitude at most 256; gradients straight through, as node by node.
    """
    result: Tensor = _Rotate.apply(x, first, second, sign, frac)
    return result
