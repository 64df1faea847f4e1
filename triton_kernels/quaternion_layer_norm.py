"""Layer norm of quaternions: magnitudes are normalized over channels, directions are kept.

    s = mean_d |y_d|^2 + eps         out_d = gamma_d y_d / sqrt(s) + beta_d

The factor is positive, so without beta every out_d points where gamma_d y_d does: nothing is turned or
flipped, and a rotation of all y is one of all outputs.

``centered`` is the norm of the quaternion source (mambaqc; ``source-systems.md``, 1.1.1), for its
checkpoints:

    n_d = sqrt(|y_d|^2 + eps)        out_d = gamma_d (n_d - mean n) / sqrt(var n + eps) y_d / (n_d + eps) +
    beta_d

It takes the mean off the magnitudes, so that every channel of less than the mean magnitude is flipped.

A row, [4, D], is read once and kept in registers. Backward programs walk over many rows and keep the
gradients of gamma and beta; bytes: forward 8 D, backward 12 D per row in half precision.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_kernels.dispatch import check_operands, device_of, runs_on_triton
from triton_kernels.quaternion import load_quaternion, store_quaternion

PROGRAMS = 132
"""Programs of the backward kernel: one, which fills its registers, for each multiprocessor of an H200."""
MAX_CHANNELS = 8192
"""A program keeps a whole row in registers."""


@triton.jit
def _forward_kernel(
    y_ptr,
    gamma_ptr,
    beta_ptr,
    out_ptr,
    statistics_ptr,
    width,
    y_row,
    y_channel,
    y_component,
    out_row,
    out_channel,
    out_component,
    eps,
    BLOCK: tl.constexpr,
    CENTERED: tl.constexpr,
):
    """``statistics`` of a row: the mean of the magnitudes (centered) and the reciprocal deviation."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    mask = d < width
    y0, y1, y2, y3 = load_quaternion(y_ptr + row * y_row, d * y_channel, y_component, mask)
    square = y0 * y0 + y1 * y1 + y2 * y2 + y3 * y3
    gamma = tl.load(gamma_ptr + d, mask=mask, other=0.0).to(tl.float32)
    if CENTERED:
        norm = tl.where(mask, tl.sqrt(square + eps), 0.0)
        mean = tl.sum(norm, 0) / width
        above = tl.where(mask, norm - mean, 0.0)
        rstd = tl.rsqrt(tl.sum(above * above, 0) / width + eps)
        tl.store(statistics_ptr + 2 * row, mean)
        scale = gamma * above * rstd / (norm + eps)
    else:
        rstd = tl.rsqrt(tl.sum(square, 0) / width + eps)
        scale = gamma * rstd
    tl.store(statistics_ptr + 2 * row + 1, rstd)
    b0, b1, b2, b3 = load_quaternion(beta_ptr, d, width, mask)
    store_quaternion(
        out_ptr + row * out_row,
        d * out_channel,
        out_component,
        scale * y0 + b0,
        scale * y1 + b1,
        scale * y2 + b2,
        scale * y3 + b3,
        mask,
    )


@triton.jit
def _load_row(ptr, offset, component_stride, mask):
    """Four components as they are in memory."""
    return (
        tl.load(ptr + offset, mask=mask, other=0.0),
        tl.load(ptr + offset + component_stride, mask=mask, other=0.0),
        tl.load(ptr + offset + 2 * component_stride, mask=mask, other=0.0),
        tl.load(ptr + offset + 3 * component_stride, mask=mask, other=0.0),
    )


@triton.jit
def _widen(q):
    return q[0].to(tl.float32), q[1].to(tl.float32), q[2].to(tl.float32), q[3].to(tl.float32)


@triton.jit
def _backward_kernel(
    y_ptr,
    gamma_ptr,
    statistics_ptr,
    g_ptr,
    dy_ptr,
    dgamma_ptr,
    dbeta_ptr,
    rows,
    width,
    y_row,
    y_channel,
    y_component,
    g_row,
    g_channel,
    g_component,
    dy_row,
    dy_channel,
    dy_component,
    eps,
    BLOCK: tl.constexpr,
    CENTERED: tl.constexpr,
):
    d = tl.arange(0, BLOCK)
    mask = d < width
    gamma = tl.load(gamma_ptr + d, mask=mask, other=0.0).to(tl.float32)
    dgamma = tl.zeros([BLOCK], tl.float32)
    dbeta0 = tl.zeros([BLOCK], tl.float32)
    dbeta1 = tl.zeros([BLOCK], tl.float32)
    dbeta2 = tl.zeros([BLOCK], tl.float32)
    dbeta3 = tl.zeros([BLOCK], tl.float32)
    first = tl.program_id(0).to(tl.int64)
    next_y = _load_row(y_ptr + first * y_row, d * y_channel, y_component, mask)
    next_g = _load_row(g_ptr + first * g_row, d * g_channel, g_component, mask)
    for i in range(tl.program_id(0), rows, tl.num_programs(0)):
        row = tl.cast(i, tl.int64)
        y0, y1, y2, y3 = _widen(next_y)
        g0, g1, g2, g3 = _widen(next_g)
        # The row after this one is on its way while this one is computed.
        after = row + tl.num_programs(0)
        more = mask & (after + d * 0 < rows)
        next_y = _load_row(y_ptr + after * y_row, d * y_channel, y_component, more)
        next_g = _load_row(g_ptr + after * g_row, d * g_channel, g_component, more)
        rstd = tl.load(statistics_ptr + 2 * row + 1)
        along = y0 * g0 + y1 * g1 + y2 * g2 + y3 * g3
        if CENTERED:
            norm = tl.sqrt(y0 * y0 + y1 * y1 + y2 * y2 + y3 * y3 + eps)
            normed = tl.where(mask, (norm - tl.load(statistics_ptr + 2 * row)) * rstd, 0.0)
            along = along / (norm + eps)
            dgamma += normed * along
            dnormed = gamma * along
            mean = tl.sum(dnormed, 0) / width
            mean_along = tl.sum(dnormed * normed, 0) / width
            dnorm = (dnormed - mean - normed * mean_along) * rstd - dnormed * normed / (norm + eps)
            scale = gamma * normed / (norm + eps)
            radial = dnorm / norm
        else:
            dgamma += along * rstd
            scale = gamma * rstd
            radial = -tl.sum(scale * along, 0) / width * rstd * rstd
        dbeta0 += g0
        dbeta1 += g1
        dbeta2 += g2
        dbeta3 += g3
        store_quaternion(
            dy_ptr + row * dy_row,
            d * dy_channel,
            dy_component,
            scale * g0 + radial * y0,
            scale * g1 + radial * y1,
            scale * g2 + radial * y2,
            scale * g3 + radial * y3,
            mask,
        )
    part = tl.program_id(0) * width
    tl.store(dgamma_ptr + part + d, dgamma, mask=mask)
    store_quaternion(dbeta_ptr + 4 * part, d, width, dbeta0, dbeta1, dbeta2, dbeta3, mask)


def _rows(x: Tensor) -> Tensor:
    """As [rows, D, 4]: a view if there is one."""
    return x.flatten(0, -3) if x.ndim > 3 else x.reshape(-1, *x.shape[-2:])


def _warps(block: int) -> int:
    return min(16, max(4, block // 256))


class _QuaternionLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, gamma: Tensor, beta: Tensor, eps: float, centered: bool) -> Tensor:
        flat = _rows(y)
        rows, width = flat.shape[:2]
        out = torch.empty_like(y)
        statistics = torch.empty(rows, 2, dtype=torch.float32, device=y.device)
        block = triton.next_power_of_2(width)
        target = _rows(out)
        with device_of(y):
            _forward_kernel[(rows,)](
                flat,
                gamma,
                # side by side, every row's program would read it in steps of four numbers
                beta.t().contiguous(),
                target,
                statistics,
                width,
                *flat.stride(),
                *target.stride(),
                eps,
                BLOCK=block,
                CENTERED=centered,
                num_warps=_warps(block),
            )
        ctx.save_for_backward(y, gamma, beta, statistics)
        ctx.eps, ctx.centered = eps, centered
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        y, gamma, beta, statistics = ctx.saved_tensors
        flat, g = _rows(y), _rows(gradients[0])
        rows, width = flat.shape[:2]
        programs = min(PROGRAMS, rows)
        dy = torch.empty_like(y)
        target = _rows(dy)
        dgamma = statistics.new_empty(programs, width)
        dbeta = statistics.new_empty(programs, 4, width)
        block = triton.next_power_of_2(width)
        with device_of(y):
            _backward_kernel[(programs,)](
                flat,
                gamma,
                statistics,
                g,
                target,
                dgamma,
                dbeta,
                rows,
                width,
                *flat.stride(),
                *g.stride(),
                *target.stride(),
                ctx.eps,
                BLOCK=block,
                CENTERED=ctx.centered,
                num_warps=_warps(block),
            )
        return dy, dgamma.sum(0).to(gamma.dtype), dbeta.sum(0).t().to(beta.dtype), None, None


def quaternion_layer_norm_reference(
    y: Tensor, gamma: Tensor, beta: Tensor, eps: float = 1e-5, centered: bool = False
) -> Tensor:
    """The definition of ``quaternion_layer_norm``; float64 stays float64."""
    wide = y.to(torch.promote_types(y.dtype, torch.float32))
    scale = gamma.to(wide.dtype)
    square = wide.square().sum(-1)
    if centered:
        norm = torch.sqrt(square + eps)
        above = norm - norm.mean(-1, keepdim=True)
        scale = scale * above * torch.rsqrt(above.square().mean(-1, keepdim=True) + eps) / (norm + eps)
    else:
        scale = scale * torch.rsqrt(square.mean(-1, keepdim=True) + eps)
    return (scale[..., None] * wide + beta.to(wide.dtype)).to(y.dtype)


def quaternion_layer_norm(
    y: Tensor, gamma: Tensor, beta: Tensor, eps: float = 1e-5, centered: bool = False
) -> Tensor:
    """gamma_d y_d / sqrt(mean |y|^2 + eps) + beta_d: magnitudes are normalized, directions kept.

    Kernels compute in float32; float64 inputs and CPU tensors use ``quaternion_layer_norm_reference``.

    Args:
        y: [..., D, 4]; bfloat16, float16, float32 or float64. Memory in planes, [..., 4, D], is read fastest.
        gamma: [D]. beta: [D, 4]; both of any float dtype.
        eps: added to the mean square (``centered``: to the squares, the norms and the variance).
        centered: the source's form, which flips channels (see the module).

    Returns:
        like ``y``, also in memory, with gradients to all tensors.

    Raises:
        ValueError: shapes or devices do not fit, or D is above 8192.
    """
    if y.ndim < 2 or y.shape[-1] != 4 or 0 in y.shape:
        raise ValueError(f"y has shape {tuple(y.shape)}; give it as [..., D, 4], none of them 0")
    width = y.shape[-2]
    if width > MAX_CHANNELS:
        raise ValueError(f"y has {width} channels; choose at most {MAX_CHANNELS}")
    check_operands(y, [("gamma", gamma, (width,)), ("beta", beta, (width, 4))])
    if not runs_on_triton(y):
        return quaternion_layer_norm_reference(y, gamma, beta, eps, centered)
    out: Tensor = _QuaternionLayerNorm.apply(y, gamma, beta, eps, centered)
    return out
