"""Causal depthwise convolution, activation and requantization in one pass."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from triton_kernels.narrow import narrow_dtype
from triton_kernels.rounding import clamp_gradient, half_unit, rounded
from triton_kernels.squareplus import squareplus_of


class Activation(NamedTuple):
    """What follows the convolution: shift, clamp, and for squareplus its integer form and a second clamp.

    Attributes:
        places, low, high: of the shift and the clamp.
        relu: whether a relu is between them (``low`` is 0 then): it passes no gradient at all at 0.
        squareplus: whether squareplus follows. frac: binary places of its argument.
    """

    places: int
    low: int
    high: int
    relu: bool
    squareplus: bool
    frac: int


@triton.jit
def _sums(
    x, taps, bias, base, t, c, T, C, stride_t, HAS_BIAS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    total = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    for i in tl.static_range(4):
        source = t - 3 + i
        mask = ((source >= 0) & (source < T))[:, None] & (c < C)[None, :]
        value = tl.load(x + base + source[:, None] * stride_t + c[None, :], mask=mask, other=0.0)
        tap = tl.load(taps + c * 4 + i, mask=c < C, other=0.0)
        total += value.to(tl.float32) * tap[None, :]
    if HAS_BIAS:
        total += tl.load(bias + c, mask=c < C, other=0.0)[None, :]
    return total


@triton.jit
def _conv_kernel(
    x, taps, bias, out, T, C, stride_b, stride_t, factor, half, low, high,
    FOUR: tl.constexpr, HAS_BIAS: tl.constexpr, SQUAREPLUS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(T, BLOCK_T)
    b = tl.program_id(0) // blocks
    t = (tl.program_id(0) % blocks) * BLOCK_T + tl.arange(0, BLOCK_T)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    base = b.to(tl.int64) * stride_b
    y = _sums(x, taps, bias, base, t, c, T, C, stride_t, HAS_BIAS, BLOCK_T, BLOCK_C)
    y = rounded(y, factor, half)
    y = tl.minimum(tl.maximum(y, low), high)
    if SQUAREPLUS:
        y = squareplus_of(y.to(tl.int32), FOUR).to(tl.float32)
        y = tl.minimum(tl.maximum(y, low), high)
    at = (b.to(tl.int64) * T + t)[:, None] * C + c[None, :]
    tl.store(out + at, y.to(out.dtype.element_ty), mask=(t < T)[:, None] & (c < C)[None, :])


@triton.jit
def _sum_gradient(
    gradient, y, x, taps, bias, b, base, t, c, T, C, stride_t, factor, half, low, high,
    FOUR: tl.constexpr, HAS_BIAS: tl.constexpr, RELU: tl.constexpr, SQUAREPLUS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Gradient of the sums at step t, zero from step T on."""
    mask = (c < C) & (t + c * 0 < T)
    at = (b.to(tl.int64) * T + t) * C + c
    g = tl.load(gradient + at, mask=mask, other=0.0).to(tl.float32)
    value = tl.load(y + at, mask=mask, other=0.0).to(tl.float32)
    if RELU:
        g = tl.where(value <= 0, 0.0, g)
    g = clamp_gradient(value, g, low, high)
    if SQUAREPLUS:
        # The slope of (x + sqrt(x^2 + 4)) / 2 at the integer x.
        times = t + tl.zeros((1,), tl.int32)
        inner = _sums(x, taps, bias, base, times, c, T, C, stride_t, HAS_BIAS, 1, BLOCK_C)
        inner = rounded(tl.reshape(inner, (BLOCK_C,)), factor, half)
        inner = tl.minimum(tl.maximum(inner, low), high)
        g = g * 0.5 * (1.0 + inner / tl.sqrt_rn(inner * inner + FOUR))
        g = clamp_gradient(inner, g, low, high)
    return g * factor


@triton.jit
def _conv_gradient_kernel(
    gradient, y, x, taps, bias, d_x, d_taps, T, C, stride_b, stride_t, factor, half, low, high,
    FOUR: tl.constexpr, HAS_BIAS: tl.constexpr, RELU: tl.constexpr, SQUAREPLUS: tl.constexpr,
    STEPS: tl.constexpr, UNROLL: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Walks back through STEPS steps with the gradients d of the sums of the last four in registers."""
    parts = tl.cdiv(T, STEPS)
    b = tl.program_id(0) // parts
    first = (tl.program_id(0) % parts) * STEPS
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    base = b.to(tl.int64) * stride_b
    present = c < C
    tap0 = tl.load(taps + c * 4, mask=present, other=0.0)
    tap1 = tl.load(taps + c * 4 + 1, mask=present, other=0.0)
    tap2 = tl.load(taps + c * 4 + 2, mask=present, other=0.0)
    tap3 = tl.load(taps + c * 4 + 3, mask=present, other=0.0)
    last = first + STEPS
    d1 = _sum_gradient(
        gradient, y, x, taps, bias, b, base, last, c, T, C, stride_t, factor, half, low, high,
        FOUR, HAS_BIAS, RELU, SQUAREPLUS, BLOCK_C,
    )  # fmt: skip
    d2 = _sum_gradient(
        gradient, y, x, taps, bias, b, base, last + 1, c, T, C, stride_t, factor, half, low, high,
        FOUR, HAS_BIAS, RELU, SQUAREPLUS, BLOCK_C,
    )  # fmt: skip
    d3 = _sum_gradient(
        gradient, y, x, taps, bias, b, base, last + 2, c, T, C, stride_t, factor, half, low, high,
        FOUR, HAS_BIAS, RELU, SQUAREPLUS, BLOCK_C,
    )  # fmt: skip
    d_tap0 = tl.zeros((BLOCK_C,), tl.float32)
    d_tap1 = tl.zeros((BLOCK_C,), tl.float32)
    d_tap2 = tl.zeros((BLOCK_C,), tl.float32)
    d_tap3 = tl.zeros((BLOCK_C,), tl.float32)
    d_bias = tl.zeros((BLOCK_C,), tl.float32)
    for block in range(STEPS // UNROLL):
        for step in tl.static_range(UNROLL):
            t = last - 1 - block * UNROLL - step
            d0 = _sum_gradient(
                gradient, y, x, taps, bias, b, base, t, c, T, C, stride_t, factor, half, low, high,
                FOUR, HAS_BIAS, RELU, SQUAREPLUS, BLOCK_C,
            )  # fmt: skip
            inside = present & (t + c * 0 < T)
            value = tl.load(x + base + t * stride_t + c, mask=inside, other=0.0).to(tl.float32)
            d_tap0 += value * d3
            d_tap1 += value * d2
            d_tap2 += value * d1
            d_tap3 += value * d0
            d_bias += d0
            total = tap3 * d0 + tap2 * d1 + tap1 * d2 + tap0 * d3
            tl.store(d_x + (b.to(tl.int64) * T + t) * C + c, total.to(d_x.dtype.element_ty), mask=inside)
            d3, d2, d1 = d2, d1, d0
    to = d_taps + tl.program_id(0).to(tl.int64) * 5 * C + c
    tl.store(to, d_tap0, mask=present)
    tl.store(to + C, d_tap1, mask=present)
    tl.store(to + 2 * C, d_tap2, mask=present)
    tl.store(to + 3 * C, d_tap3, mask=present)
    tl.store(to + 4 * C, d_bias, mask=present)


def _scalars(a: Activation) -> tuple[float, ...]:
    return 2.0**-a.places, half_unit(a.places), float(a.low), float(a.high)


WIDTH = 4
"""Most taps that the kernels take."""
# Steps and channels of a tile and warps; channels and steps of a program, and steps whose loads overlap.
FORWARD_BLOCKS = (32, 128, 4)
GRADIENT_BLOCKS = (64, 128, 8)


class _ConvRequantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, taps: Tensor, bias: Tensor | None, activation: Activation) -> Tensor:
        if x.stride(-1) != 1:
            x = x.contiguous()
        B, T, C = x.shape
        ctx.width = taps.shape[1]
        # Fewer taps are four with zeros before them.
        taps = functional.pad(taps, (WIDTH - ctx.width, 0)).contiguous()
        y = torch.empty(B, T, C, dtype=narrow_dtype(x.device), device=x.device)
        block_t, block_c, warps = FORWARD_BLOCKS if x.is_cuda else (16, 16, 4)
        _conv_kernel[(B * triton.cdiv(T, block_t), triton.cdiv(C, block_c))](
            x, taps, bias, y, T, C, x.stride(0), x.stride(1), *_scalars(activation),
            FOUR=4 << 2 * activation.frac, HAS_BIAS=bias is not None, SQUAREPLUS=activation.squareplus,
            BLOCK_T=block_t, BLOCK_C=block_c, num_warps=warps,
        )  # fmt: skip
        ctx.save_for_backward(x, taps, bias, y)
        ctx.activation = activation
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, taps, bias, y = ctx.saved_tensors
        B, T, C = x.shape
        block_c, steps, unroll = GRADIENT_BLOCKS if x.is_cuda else (16, 8, 4)
        parts = B * triton.cdiv(T, steps)
        d_x = torch.empty(B, T, C, dtype=x.dtype, device=x.device)
        partial = torch.empty(parts, WIDTH + 1, C, device=x.device)
        _conv_gradient_kernel[(parts, triton.cdiv(C, block_c))](
            gradients[0].contiguous(), y, x, taps, bias, d_x, partial, T, C, x.stride(0), x.stride(1),
            *_scalars(ctx.activation), FOUR=4 << 2 * ctx.activation.frac, HAS_BIAS=bias is not None,
            RELU=ctx.activation.relu, SQUAREPLUS=ctx.activation.squareplus,
            STEPS=steps, UNROLL=unroll, BLOCK_C=block_c, num_warps=1,
        )  # fmt: skip
        sums = partial.sum(0)
        d_taps = sums[WIDTH - ctx.width : WIDTH].t()
        return d_x, d_taps, sums[WIDTH] if bias is not None else None, None


def conv_requantize(x: Tensor, taps: Tensor, bias: Tensor | None, activation: Activation) -> Tensor:
    """``conv`` with the ``shift``, ``relu`` or squareplus, and ``clamp`` behind it.

    Args:
        x: integers [B, T, C], narrow or float32; the sums stay within 2^24.
        taps: integers, float32 [C, K], K up to 4. bias: integers, float32 [C], or None.
        activation: what follows.

    Returns:
        Narrow integers [B, T, C]; gradients straight through, as node by node.
    """
    result: Tensor = _ConvRequantize.apply(x, taps, bias, activation)
    return result
