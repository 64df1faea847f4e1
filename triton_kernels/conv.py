"""Causal depthwise convolution, activation and requantization in one pass."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_kernels.narrow import narrow_dtype
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
def _sums(  # type: ignore[no-untyped-def]
    x, taps, bias, base, t, c, T, C, stride_t, HAS_BIAS: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    total = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    for i in tl.static_range(WIDTH):
        source = t - (WIDTH - 1 - i)
        mask = ((source >= 0) & (source < T))[:, None] & (c < C)[None, :]
        value = tl.load(x + base + source[:, None] * stride_t + c[None, :], mask=mask, other=0.0)
        tap = tl.load(taps + c * WIDTH + i, mask=c < C, other=0.0)
        total += value.to(tl.float32) * tap[None, :]
    if HAS_BIAS:
        total += tl.load(bias + c, mask=c < C, other=0.0)[None, :]
    return total


@triton.jit
def _conv_kernel(  # type: ignore[no-untyped-def]
    x, taps, bias, out, T, C, stride_b, stride_t, factor, half, low, high,
    FOUR: tl.constexpr, HAS_BIAS: tl.constexpr, SQUAREPLUS: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(T, BLOCK_T)
    b = tl.program_id(0) // blocks
    t = (tl.program_id(0) % blocks) * BLOCK_T + tl.arange(0, BLOCK_T)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    base = b.to(tl.int64) * stride_b
    y = _sums(x, taps, bias, base, t, c, T, C, stride_t, HAS_BIAS, WIDTH, BLOCK_T, BLOCK_C)
    y = tl.floor(y * factor + half)
    y = tl.minimum(tl.maximum(y, low), high)
    if SQUAREPLUS:
        y = squareplus_of(y.to(tl.int32), FOUR).to(tl.float32)
        y = tl.minimum(tl.maximum(y, low), high)
    at = (b.to(tl.int64) * T + t)[:, None] * C + c[None, :]
    tl.store(out + at, y.to(out.dtype.element_ty), mask=(t < T)[:, None] & (c < C)[None, :])


@triton.jit
def _sum_gradient(  # type: ignore[no-untyped-def]
    gradient, y, x, taps, bias, b, base, t, c, T, C, stride_t, factor, half, low, high,
    FOUR: tl.constexpr, HAS_BIAS: tl.constexpr, RELU: tl.constexpr, SQUAREPLUS: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Gradient of the sums at steps t, zero outside 0..T-1."""
    mask = ((t >= 0) & (t < T))[:, None] & (c < C)[None, :]
    at = (b.to(tl.int64) * T + t)[:, None] * C + c[None, :]
    g = tl.load(gradient + at, mask=mask, other=0.0).to(tl.float32)
    value = tl.load(y + at, mask=mask, other=0.0).to(tl.float32)
    if RELU:
        g = tl.where(((value >= high) & (g < 0)) | (value <= 0), 0.0, g)
    else:
        g = tl.where(((value >= high) & (g < 0)) | ((value <= low) & (g > 0)), 0.0, g)
    if SQUAREPLUS:
        # The slope of (x + sqrt(x^2 + 4)) / 2 at the integer x.
        inner = _sums(x, taps, bias, base, t, c, T, C, stride_t, HAS_BIAS, WIDTH, BLOCK_T, BLOCK_C)
        inner = tl.floor(inner * factor + half)
        inner = tl.minimum(tl.maximum(inner, low), high)
        g = g * 0.5 * (1.0 + inner / tl.sqrt_rn(inner * inner + FOUR))
        g = tl.where(((inner >= high) & (g < 0)) | ((inner <= low) & (g > 0)), 0.0, g)
    return g * factor


@triton.jit
def _conv_gradient_kernel(  # type: ignore[no-untyped-def]
    gradient, y, x, taps, bias, d_x, d_taps, T, C, stride_b, stride_t, factor, half, low, high,
    steps,
    FOUR: tl.constexpr, HAS_BIAS: tl.constexpr, RELU: tl.constexpr, SQUAREPLUS: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    parts = tl.cdiv(T, steps)
    b = tl.program_id(0) // parts
    first = (tl.program_id(0) % parts) * steps
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    base = b.to(tl.int64) * stride_b
    slot = tl.arange(0, SLOTS)
    # Slots 0..WIDTH-1 are the taps', slot WIDTH the bias's.
    d_taps_sum = tl.zeros((SLOTS, BLOCK_C), tl.float32)
    for start in range(0, steps, BLOCK_T):
        t = first + start + tl.arange(0, BLOCK_T)
        total = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
        for i in tl.static_range(WIDTH):
            later = _sum_gradient(
                gradient, y, x, taps, bias, b, base, t + (WIDTH - 1 - i), c, T, C, stride_t, factor, half,
                low, high, FOUR, HAS_BIAS, RELU, SQUAREPLUS, WIDTH, BLOCK_T, BLOCK_C,
            )  # fmt: skip
            tap = tl.load(taps + c * WIDTH + i, mask=c < C, other=0.0)
            total += later * tap[None, :]
            if i == WIDTH - 1:
                for j in tl.static_range(WIDTH):
                    source = t - (WIDTH - 1 - j)
                    mask = ((source >= 0) & (source < T))[:, None] & (c < C)[None, :]
                    value = tl.load(x + base + source[:, None] * stride_t + c[None, :], mask=mask, other=0.0)
                    part = tl.sum(value.to(tl.float32) * later, 0)
                    d_taps_sum += tl.where(slot == j, 1.0, 0.0)[:, None] * part[None, :]
                d_taps_sum += tl.where(slot == WIDTH, 1.0, 0.0)[:, None] * tl.sum(later, 0)[None, :]
        at = (b.to(tl.int64) * T + t)[:, None] * C + c[None, :]
        tl.store(d_x + at, total.to(d_x.dtype.element_ty), mask=(t < T)[:, None] & (c < C)[None, :])
    to = d_taps + tl.program_id(0).to(tl.int64) * SLOTS * C + slot[:, None] * C + c[None, :]
    tl.store(to, d_taps_sum, mask=(slot < SLOTS)[:, None] & (c < C)[None, :])


def _scalars(a: Activation) -> tuple[float, ...]:
    half = 0.5 if a.places > 0 else 0.0
    return 2.0**-a.places, half, float(a.low), float(a.high)


class _ConvRequantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, taps: Tensor, bias: Tensor | None, activation: Activation) -> Tensor:
        if x.stride(-1) != 1:
            x = x.contiguous()
        (B, T, C), width = x.shape, taps.shape[1]
        taps = taps.contiguous()
        y = torch.empty(B, T, C, dtype=narrow_dtype(x.device), device=x.device)
        block_t, block_c = (32, 64) if x.is_cuda else (16, 16)
        _conv_kernel[(B * triton.cdiv(T, block_t), triton.cdiv(C, block_c))](
            x, taps, bias, y, T, C, x.stride(0), x.stride(1), *_scalars(activation),
            FOUR=4 << 2 * activation.frac, HAS_BIAS=bias is not None, SQUAREPLUS=activation.squareplus, WIDTH=width,
            BLOCK_T=block_t, BLOCK_C=block_c,
        )  # fmt: skip
        ctx.save_for_backward(x, taps, bias, y)
        ctx.activation = activation
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, taps, bias, y = ctx.saved_tensors
        (B, T, C), width = x.shape, taps.shape[1]
        block_t, block_c = (32, 64) if x.is_cuda else (16, 16)
        # Enough programs to fill a GPU, few enough that their partial sums are little to write.
        steps = max(block_t, triton.cdiv(T, max(1, 32 // B)))
        steps = triton.cdiv(steps, block_t) * block_t
        parts = B * triton.cdiv(T, steps)
        slots = triton.next_power_of_2(width + 1)
        d_x = torch.empty(B, T, C, dtype=x.dtype, device=x.device)
        partial = torch.empty(parts, slots, C, device=x.device)
        _conv_gradient_kernel[(parts, triton.cdiv(C, block_c))](
            gradients[0].contiguous(), y, x, taps, bias, d_x, partial, T, C, x.stride(0), x.stride(1),
            *_scalars(ctx.activation), steps,
            FOUR=4 << 2 * ctx.activation.frac, HAS_BIAS=bias is not None, RELU=ctx.activation.relu, SQUAREPLUS=ctx.activation.squareplus, WIDTH=width,
            BLOCK_T=block_t, BLOCK_C=block_c, SLOTS=slots,
        )  # fmt: skip
        sums = partial.sum(0)
        return d_x, sums[:width].t(), sums[width] if bias is not None else None, None


def conv_requantize(x: Tensor, taps: Tensor, bias: Tensor | None, activation: Activation) -> Tensor:
    """``conv`` with the ``shift``, ``relu`` or squareplus, and ``clamp`` behind it.

    Args:
        x: integers [B, T, C], narrow or float32; the sums stay within 2^24.
        taps: integers, float32 [C, K]. bias: integers, float32 [C], or None.
        activation: what follows.

    Returns:
        Narrow integers [B, T, C]; gradients straight through, as node by node.
    """
    result: Tensor = _ConvRequantize.apply(x, taps, bias, activation)
    return result
