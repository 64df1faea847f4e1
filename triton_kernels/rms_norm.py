"""Root mean square norms of float Mamba blocks with what stands before them, forward and backward.

    add_rms_norm:    r' = r + x           y = r' / sqrt(mean(r'^2) + eps) weight
    gated_rms_norm:  v = x act(z)        y = v / sqrt(mean(v^2) + eps) weight, the mean within a group

(Zhang & Sennrich 2019, arXiv 1910.07467; the second is the norm of Mamba-2, arXiv 2405.21060, section 7.)

A row is a group of channels of one step. With v^ = v / rms, the gradient of v is
(g - v^ mean(g v^)) / rms, g = dy weight. Backward programs walk over many rows and keep the gradient of the
weight in registers.

This is the float operation; ``triton_kernels/norm.py`` is the integer one.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_kernels.activation import Activation, activate, activated, activation_slope
from triton_kernels.dispatch import check_operands, device_of, runs_on_triton

PROGRAMS = 528
"""Programs of the backward kernels: four for each multiprocessor of an H100 or H200."""
MAX_GROUP = 16384
"""Most channels of a group: a program keeps a whole row in registers."""


@triton.jit
def _add_forward_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    sum_ptr,
    y_ptr,
    rstd_ptr,
    rows,
    width,
    x_stride,
    eps,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    n = tl.arange(0, BLOCK)
    mask = (m[:, None] < rows) & (n[None, :] < width)
    place = m[:, None].to(tl.int64) * width + n[None, :]
    v = tl.load(x_ptr + m[:, None].to(tl.int64) * x_stride + n[None, :], mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        v += tl.load(residual_ptr + place, mask=mask, other=0.0).to(tl.float32)
    rounded = v.to(sum_ptr.dtype.element_ty)
    tl.store(sum_ptr + place, rounded, mask=mask)
    v = rounded.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(v * v, 1) / width + eps)
    tl.store(rstd_ptr + m, rstd, mask=m < rows)
    weight = tl.load(weight_ptr + n, mask=n < width, other=0.0).to(tl.float32)
    tl.store(y_ptr + place, (v * rstd[:, None] * weight[None, :]).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _add_backward_kernel(
    sum_ptr,
    weight_ptr,
    rstd_ptr,
    dy_ptr,
    dsum_ptr,
    dx_ptr,
    dresidual_ptr,
    dweight_ptr,
    rows,
    width,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_DSUM: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    n = tl.arange(0, BLOCK)
    weight = tl.load(weight_ptr + n, mask=n < width, other=0.0).to(tl.float32)
    dweight = tl.zeros([ROWS, BLOCK], tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        m = block * ROWS + tl.arange(0, ROWS)
        mask = (m[:, None] < rows) & (n[None, :] < width)
        place = m[:, None].to(tl.int64) * width + n[None, :]
        rstd = tl.load(rstd_ptr + m, mask=m < rows, other=0.0)
        normed = tl.load(sum_ptr + place, mask=mask, other=0.0).to(tl.float32) * rstd[:, None]
        dy = tl.load(dy_ptr + place, mask=mask, other=0.0).to(tl.float32)
        dweight += dy * normed
        g = dy * weight[None, :]
        d = (g - normed * (tl.sum(g * normed, 1) / width)[:, None]) * rstd[:, None]
        if HAS_DSUM:
            d += tl.load(dsum_ptr + place, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + place, d.to(dx_ptr.dtype.element_ty), mask=mask)
        if HAS_RESIDUAL:
            tl.store(dresidual_ptr + place, d.to(dresidual_ptr.dtype.element_ty), mask=mask)
    tl.store(dweight_ptr + tl.program_id(0) * width + n, tl.sum(dweight, 0), mask=n < width)


@triton.jit
def _gated_forward_kernel(
    x_ptr,
    z_ptr,
    weight_ptr,
    y_ptr,
    rstd_ptr,
    rows,
    width,
    groups,
    x_stride,
    z_stride,
    eps,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    group = tl.program_id(1)
    m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    n = tl.arange(0, BLOCK)
    mask = (m[:, None] < rows) & (n[None, :] < width)
    row = m[:, None].to(tl.int64)
    column = group * width + n
    x = tl.load(x_ptr + row * x_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
    z = tl.load(z_ptr + row * z_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
    v = x * activated(z, ACTIVATION)
    rstd = tl.rsqrt(tl.sum(v * v, 1) / width + eps)
    tl.store(rstd_ptr + m * groups + group, rstd, mask=m < rows)
    weight = tl.load(weight_ptr + column, mask=n < width, other=0.0).to(tl.float32)
    y = (v * rstd[:, None] * weight[None, :]).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + row * groups * width + column[None, :], y, mask=mask)


@triton.jit
def _gated_backward_kernel(
    x_ptr,
    z_ptr,
    weight_ptr,
    rstd_ptr,
    dy_ptr,
    dx_ptr,
    dz_ptr,
    dweight_ptr,
    rows,
    width,
    groups,
    x_stride,
    z_stride,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    group = tl.program_id(1)
    n = tl.arange(0, BLOCK)
    column = group * width + n
    weight = tl.load(weight_ptr + column, mask=n < width, other=0.0).to(tl.float32)
    dweight = tl.zeros([ROWS, BLOCK], tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        m = block * ROWS + tl.arange(0, ROWS)
        mask = (m[:, None] < rows) & (n[None, :] < width)
        row = m[:, None].to(tl.int64)
        place = row * groups * width + column[None, :]
        rstd = tl.load(rstd_ptr + m * groups + group, mask=m < rows, other=0.0)
        x = tl.load(x_ptr + row * x_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
        z = tl.load(z_ptr + row * z_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
        gate = activated(z, ACTIVATION)
        normed = x * gate * rstd[:, None]
        dy = tl.load(dy_ptr + place, mask=mask, other=0.0).to(tl.float32)
        dweight += dy * normed
        g = dy * weight[None, :]
        d = (g - normed * (tl.sum(g * normed, 1) / width)[:, None]) * rstd[:, None]
        tl.store(dx_ptr + place, (d * gate).to(dx_ptr.dtype.element_ty), mask=mask)
        dz = d * x * activation_slope(z, ACTIVATION)
        tl.store(dz_ptr + place, dz.to(dz_ptr.dtype.element_ty), mask=mask)
    tl.store(dweight_ptr + tl.program_id(0) * groups * width + column, tl.sum(dweight, 0), mask=n < width)


def _launch(width: int) -> dict[str, int]:
    """Small rows go several to a program."""
    block = triton.next_power_of_2(width)
    return {"ROWS": max(1, 1024 // block), "BLOCK": block, "num_warps": min(16, max(4, block // 256))}


def _rows(x: Tensor) -> Tensor:
    """As [rows, D] with dense rows: a view where there is one, so that slices are not copied."""
    flat = x.flatten(0, -2)
    return flat if flat.stride(-1) == 1 else flat.contiguous()


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        residual: Tensor | None,
        eps: float,
        out_dtype: torch.dtype,
        residual_dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        flat = _rows(x)
        rows, width = flat.shape
        if residual is not None:
            residual = residual.contiguous()
        total = torch.empty(x.shape, dtype=residual_dtype, device=x.device)
        y = torch.empty(x.shape, dtype=out_dtype, device=x.device)
        rstd = x.new_empty(rows, dtype=torch.float32)
        launch = _launch(width)
        with device_of(x):
            _add_forward_kernel[(triton.cdiv(rows, launch["ROWS"]),)](
                flat,
                residual,
                weight,
                total,
                y,
                rstd,
                rows,
                width,
                flat.stride(0),
                eps,
                HAS_RESIDUAL=residual is not None,
                **launch,
            )
        ctx.save_for_backward(total, weight, rstd)
        ctx.x_dtype = x.dtype
        ctx.residual_dtype = None if residual is None else residual.dtype
        ctx.set_materialize_grads(False)
        return y, total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        total, weight, rstd = ctx.saved_tensors
        dy, dsum = (None if g is None else g.contiguous() for g in gradients)
        if dy is None:
            assert dsum is not None, "autograd calls no backward without a gradient"
            dresidual = None if ctx.residual_dtype is None else dsum.to(ctx.residual_dtype)
            return dsum.to(ctx.x_dtype), None, dresidual, None, None, None
        width = total.shape[-1]
        launch = _launch(width)
        programs = min(PROGRAMS, triton.cdiv(len(rstd), launch["ROWS"]))
        dx = torch.empty(total.shape, dtype=ctx.x_dtype, device=total.device)
        dresidual = None
        if ctx.residual_dtype == ctx.x_dtype:
            dresidual = dx
        elif ctx.residual_dtype is not None:
            dresidual = torch.empty(total.shape, dtype=ctx.residual_dtype, device=total.device)
        dweight = rstd.new_empty(programs, width)
        with device_of(total):
            _add_backward_kernel[(programs,)](
                total,
                weight,
                rstd,
                dy,
                dsum,
                dx,
                dresidual,
                dweight,
                len(rstd),
                width,
                HAS_DSUM=dsum is not None,
                HAS_RESIDUAL=dresidual is not None and dresidual is not dx,
                **launch,
            )
        return dx, dweight.sum(0).to(weight.dtype), dresidual, None, None, None


class _GatedRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, z: Tensor, weight: Tensor, eps: float, groups: int, activation: Activation
    ) -> Tensor:
        flat, gate = _rows(x), _rows(z)
        rows = len(flat)
        width = x.shape[-1] // groups
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        rstd = x.new_empty(rows, groups, dtype=torch.float32)
        launch = _launch(width)
        with device_of(x):
            _gated_forward_kernel[(triton.cdiv(rows, launch["ROWS"]), groups)](
                flat,
                gate,
                weight,
                y,
                rstd,
                rows,
                width,
                groups,
                flat.stride(0),
                gate.stride(0),
                eps,
                ACTIVATION=activation,
                **launch,
            )
        ctx.save_for_backward(flat, gate, weight, rstd)
        ctx.shape, ctx.activation = x.shape, activation
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        flat, gate, weight, rstd = ctx.saved_tensors
        rows, groups = rstd.shape
        width = flat.shape[-1] // groups
        launch = _launch(width)
        programs = min(max(1, PROGRAMS // groups), triton.cdiv(rows, launch["ROWS"]))
        dx = torch.empty(ctx.shape, dtype=flat.dtype, device=flat.device)
        dz = torch.empty(ctx.shape, dtype=gate.dtype, device=gate.device)
        dweight = rstd.new_empty(programs, groups * width)
        with device_of(flat):
            _gated_backward_kernel[(programs, groups)](
                flat,
                gate,
                weight,
                rstd,
                gradients[0].contiguous(),
                dx,
                dz,
                dweight,
                rows,
                width,
                groups,
                flat.stride(0),
                gate.stride(0),
                ACTIVATION=ctx.activation,
                **launch,
            )
        return dx, dz, dweight.sum(0).to(weight.dtype), None, None, None


def add_rms_norm_reference(
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    out_dtype: torch.dtype | None = None,
    residual_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition of ``add_rms_norm``; float64 stays float64."""
    wide = torch.promote_types(x.dtype, torch.float32)
    total = x.to(wide) if residual is None else x.to(wide) + residual.to(wide)
    total = total.to(residual_dtype or wide)
    v = total.to(wide)
    y = v * torch.rsqrt(v.square().mean(-1, keepdim=True) + eps) * weight.to(wide)
    return y.to(out_dtype or x.dtype), total


def add_rms_norm(
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    out_dtype: torch.dtype | None = None,
    residual_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """r' = residual + x; y = r' / sqrt(mean(r'^2) + eps) weight (arXiv 1910.07467).

    Kernels compute in float32; float64 inputs and CPU tensors use ``add_rms_norm_reference``.

    Args:
        x: [..., D]; bfloat16, float16, float32 or float64.
        weight: [D]. residual: [..., D], nothing if not given; both of any float dtype.
        eps: added to the mean square.
        out_dtype: of y, that of ``x`` if not given.
        residual_dtype: of r', at least float32 if not given.

    Returns:
        y and r', both with gradients to every tensor.

    Raises:
        ValueError: shapes or devices do not fit, or D is above 16384.
    """
    _check(x, weight, 1, [("residual", residual, tuple(x.shape))])
    if not runs_on_triton(x):
        return add_rms_norm_reference(x, weight, residual, eps, out_dtype, residual_dtype)
    result: tuple[Tensor, Tensor] = _AddRMSNorm.apply(
        x, weight, residual, eps, out_dtype or x.dtype, residual_dtype or torch.float32
    )
    return result


def gated_rms_norm_reference(
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    eps: float = 1e-5,
    groups: int = 1,
    activation: Activation = "silu",
) -> Tensor:
    """The definition of ``gated_rms_norm``; float64 stays float64."""
    wide = torch.promote_types(x.dtype, torch.float32)
    v = (x.to(wide) * activate(z.to(wide), activation)).unflatten(-1, (groups, -1))
    v = v * torch.rsqrt(v.square().mean(-1, keepdim=True) + eps)
    y: Tensor = (v.flatten(-2) * weight.to(wide)).to(x.dtype)
    return y


def gated_rms_norm(
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    eps: float = 1e-5,
    groups: int = 1,
    activation: Activation = "silu",
) -> Tensor:
    """v = x act(z); y = v / sqrt(mean(v^2) + eps) weight, means within groups (arXiv 2405.21060, section 7).

    Kernels compute in float32; float64 inputs and CPU tensors use ``gated_rms_norm_reference``.

    Args:
        x: [..., D]; bfloat16, float16, float32 or float64.
        z: gate [..., D]. weight: [D]; both of any float dtype.
        eps: added to the mean square.
        groups: consecutive channels share a mean in so many groups, a divisor of D.
        activation: of the gate: ``silu``, ``gelu``, ``relu`` or ``identity``.

    Returns:
        y like ``x``, with gradients to every tensor.

    Raises:
        ValueError: shapes or devices do not fit, or a group has more than 16384 channels.
    """
    _check(x, weight, groups, [("z", z, tuple(x.shape))])
    if not runs_on_triton(x):
        return gated_rms_norm_reference(x, z, weight, eps, groups, activation)
    y: Tensor = _GatedRMSNorm.apply(x, z, weight, eps, groups, activation)
    return y


def _check(
    x: Tensor, weight: Tensor, groups: int, others: list[tuple[str, Tensor | None, tuple[int, ...]]]
) -> None:
    if x.ndim < 2 or 0 in x.shape:
        raise ValueError(f"x has shape {tuple(x.shape)}; give it as [..., D], none of them 0")
    width = x.shape[-1]
    if groups < 1 or width % groups:
        raise ValueError(f"{width} channels cannot be cut into {groups} groups; choose a divisor")
    if width // groups > MAX_GROUP:
        raise ValueError(f"a group has {width // groups} channels; choose at most {MAX_GROUP}")
    check_operands(x, [("weight", weight, (width,)), *others])
