"""The causal depthwise convolution of float Mamba blocks with its activation, forward and backward.

    y_t = act(bias + sum_i weight_i x_{t-K+1+i})        x_t = 0 for t < 0

Backward computes the sums again rather than keep them. A program reads the x of its tile at the seven offsets
from t - 3 to t + 3, from which come the sums at t, ..., t + 3 whose gradients meet in the gradient of x_t.

This is the float operation; ``triton_kernels/conv.py`` is the integer one.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from triton_kernels.activation import Activation, activate, activated, activation_slope
from triton_kernels.dispatch import check_operands, device_of, runs_on_triton

WIDTH = 4
"""Most taps; fewer are four with zeros before them."""
TIMES = 32
CHANNELS = 64


@triton.jit
def _at(base, time_stride, t, length, in_channels):
    """Values of a tile at times t, zero outside the sequence."""
    mask = ((t >= 0) & (t < length))[:, None] & in_channels[None, :]
    return tl.load(base + t[:, None].to(tl.int64) * time_stride, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _taps(weight_ptr, bias_ptr, c, in_channels, HAS_BIAS: tl.constexpr):
    """The four taps and the bias of each channel, as rows."""
    w0 = tl.load(weight_ptr + c * 4, mask=in_channels, other=0.0).to(tl.float32)[None, :]
    w1 = tl.load(weight_ptr + c * 4 + 1, mask=in_channels, other=0.0).to(tl.float32)[None, :]
    w2 = tl.load(weight_ptr + c * 4 + 2, mask=in_channels, other=0.0).to(tl.float32)[None, :]
    w3 = tl.load(weight_ptr + c * 4 + 3, mask=in_channels, other=0.0).to(tl.float32)[None, :]
    bias = tl.zeros_like(w0)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + c, mask=in_channels, other=0.0).to(tl.float32)[None, :]
    return w0, w1, w2, w3, bias


@triton.jit
def _forward_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    length,
    channels,
    x_batch_stride,
    x_time_stride,
    TIMES: tl.constexpr,
    CHANNELS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    blocks = tl.cdiv(length, TIMES)
    batch = (tl.program_id(1) // blocks).to(tl.int64)
    t = (tl.program_id(1) % blocks) * TIMES + tl.arange(0, TIMES)
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    in_channels = c < channels
    w0, w1, w2, w3, bias = _taps(weight_ptr, bias_ptr, c, in_channels, HAS_BIAS)
    base = x_ptr + batch * x_batch_stride + c[None, :]
    total = bias + w0 * _at(base, x_time_stride, t - 3, length, in_channels)
    total += w1 * _at(base, x_time_stride, t - 2, length, in_channels)
    total += w2 * _at(base, x_time_stride, t - 1, length, in_channels)
    total += w3 * _at(base, x_time_stride, t, length, in_channels)
    y = activated(total, ACTIVATION).to(y_ptr.dtype.element_ty)
    place = (batch * length + t[:, None]) * channels + c[None, :]
    tl.store(y_ptr + place, y, mask=(t < length)[:, None] & in_channels[None, :])


@triton.jit
def _backward_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    dy_ptr,
    dx_ptr,
    parts_ptr,
    length,
    channels,
    x_batch_stride,
    x_time_stride,
    dy_batch_stride,
    dy_time_stride,
    TIMES: tl.constexpr,
    CHANNELS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """dx, and the parts [tile, 5, channels] of the gradients of the taps and of the bias."""
    blocks = tl.cdiv(length, TIMES)
    batch = (tl.program_id(1) // blocks).to(tl.int64)
    t = (tl.program_id(1) % blocks) * TIMES + tl.arange(0, TIMES)
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    in_channels = c < channels
    w0, w1, w2, w3, bias = _taps(weight_ptr, bias_ptr, c, in_channels, HAS_BIAS)
    base = x_ptr + batch * x_batch_stride + c[None, :]
    x_m3 = _at(base, x_time_stride, t - 3, length, in_channels)
    x_m2 = _at(base, x_time_stride, t - 2, length, in_channels)
    x_m1 = _at(base, x_time_stride, t - 1, length, in_channels)
    x_0 = _at(base, x_time_stride, t, length, in_channels)
    x_1 = _at(base, x_time_stride, t + 1, length, in_channels)
    x_2 = _at(base, x_time_stride, t + 2, length, in_channels)
    x_3 = _at(base, x_time_stride, t + 3, length, in_channels)
    dy_base = dy_ptr + batch * dy_batch_stride + c[None, :]
    d0 = _at(dy_base, dy_time_stride, t, length, in_channels)
    d0 *= activation_slope(bias + w0 * x_m3 + w1 * x_m2 + w2 * x_m1 + w3 * x_0, ACTIVATION)
    d1 = _at(dy_base, dy_time_stride, t + 1, length, in_channels)
    d1 *= activation_slope(bias + w0 * x_m2 + w1 * x_m1 + w2 * x_0 + w3 * x_1, ACTIVATION)
    d2 = _at(dy_base, dy_time_stride, t + 2, length, in_channels)
    d2 *= activation_slope(bias + w0 * x_m1 + w1 * x_0 + w2 * x_1 + w3 * x_2, ACTIVATION)
    d3 = _at(dy_base, dy_time_stride, t + 3, length, in_channels)
    d3 *= activation_slope(bias + w0 * x_0 + w1 * x_1 + w2 * x_2 + w3 * x_3, ACTIVATION)
    dx = (w3 * d0 + w2 * d1 + w1 * d2 + w0 * d3).to(dx_ptr.dtype.element_ty)
    place = (batch * length + t[:, None]) * channels + c[None, :]
    tl.store(dx_ptr + place, dx, mask=(t < length)[:, None] & in_channels[None, :])
    part = parts_ptr + tl.program_id(1).to(tl.int64) * 5 * channels + c
    tl.store(part, tl.sum(d0 * x_m3, 0), mask=in_channels)
    tl.store(part + channels, tl.sum(d0 * x_m2, 0), mask=in_channels)
    tl.store(part + 2 * channels, tl.sum(d0 * x_m1, 0), mask=in_channels)
    tl.store(part + 3 * channels, tl.sum(d0 * x_0, 0), mask=in_channels)
    tl.store(part + 4 * channels, tl.sum(d0, 0), mask=in_channels)


def _dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


class _CausalConv1d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation) -> Tensor:
        x = _dense_rows(x)
        batch, length, channels = x.shape
        taps = F.pad(weight, (WIDTH - weight.shape[1], 0)).contiguous()
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        grid = (triton.cdiv(channels, CHANNELS), batch * triton.cdiv(length, TIMES))
        with device_of(x):
            _forward_kernel[grid](
                x,
                taps,
                bias,
                y,
                length,
                channels,
                x.stride(0),
                x.stride(1),
                TIMES=TIMES,
                CHANNELS=CHANNELS,
                HAS_BIAS=bias is not None,
                ACTIVATION=activation,
                num_warps=8,
            )
        ctx.save_for_backward(x, weight, taps, bias)
        ctx.activation = activation
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, taps, bias = ctx.saved_tensors
        dy = _dense_rows(gradients[0])
        batch, length, channels = x.shape
        tiles = batch * triton.cdiv(length, TIMES)
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        parts = x.new_empty(tiles, WIDTH + 1, channels, dtype=torch.float32)
        with device_of(x):
            _backward_kernel[(triton.cdiv(channels, CHANNELS), tiles)](
                x,
                taps,
                bias,
                dy,
                dx,
                parts,
                length,
                channels,
                x.stride(0),
                x.stride(1),
                dy.stride(0),
                dy.stride(1),
                TIMES=TIMES,
                CHANNELS=CHANNELS,
                HAS_BIAS=bias is not None,
                ACTIVATION=ctx.activation,
                num_warps=8,
            )
        sums = parts.sum(0)
        dweight = sums[WIDTH - weight.shape[1] : WIDTH].t().to(weight.dtype)
        return dx, dweight, None if bias is None else sums[WIDTH].to(bias.dtype), None


def causal_conv1d_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: Activation = "silu"
) -> Tensor:
    """The definition of ``causal_conv1d``; sums are float32, float64 stays float64."""
    wide = torch.promote_types(x.dtype, torch.float32)
    width = weight.shape[1]
    padded = F.pad(x.to(wide), (0, 0, width - 1, 0))
    total = torch.zeros_like(x, dtype=wide)
    for i in range(width):
        total = total + padded[:, i : i + x.shape[1]] * weight[:, i].to(wide)
    if bias is not None:
        total = total + bias.to(wide)
    return activate(total, activation).to(x.dtype)


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: Activation = "silu"
) -> Tensor:
    """y_t = act(bias + sum_i weight_i x_{t-K+1+i}), every channel by itself (arXiv 2312.00752, figure 3).

    Sums are float32; float64 inputs and CPU tensors use ``causal_conv1d_reference``.

    Args:
        x: [batch, T, D]; bfloat16, float16, float32 or float64.
        weight: taps [D, K], the last for the present step, K from 1 to 4; any float dtype.
        bias: [D].
        activation: ``silu``, ``gelu`` (with erf), ``relu`` or ``identity``.

    Returns:
        y like ``x``, with gradients to every argument.

    Raises:
        ValueError: shapes or devices do not fit.
    """
    if x.ndim != 3 or 0 in x.shape:
        raise ValueError(f"x has shape {tuple(x.shape)}; give it as [batch, T, D], none of them 0")
    channels = x.shape[-1]
    if weight.ndim != 2 or not 1 <= weight.shape[1] <= WIDTH:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; give it as [D, K], K from 1 to {WIDTH}")
    check_operands(x, [("weight", weight, (channels, weight.shape[1])), ("bias", bias, (channels,))])
    if not runs_on_triton(x):
        return causal_conv1d_reference(x, weight, bias, activation)
    y: Tensor = _CausalConv1d.apply(x, weight, bias, activation)
    return y
