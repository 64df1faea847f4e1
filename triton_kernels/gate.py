"""The hard-SiLU gate of the integer block, v = y * z clamp(z + 2, 0, 4) / 4 requantized twice, in one go."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_kernels.narrow import narrow_dtype, rows_of
from triton_kernels.rounding import clamp_gradient, half_unit, rounded


class HardSilu(NamedTuple):
    """The static side of the gate's nodes.

    Attributes:
        two: the constant added to z. four: upper end of the ramp.
        g_places, g_limit: of the requantization of z * ramp. v_places, v_limit: of that of y * g.
    """

    two: int
    four: int
    g_places: int
    g_limit: int
    v_places: int
    v_limit: int


@triton.jit
def _gate(z, two, four, g_factor, g_half, g_limit):
    ramp = tl.minimum(tl.maximum(z + two, 0.0), four)
    g = rounded(z * ramp, g_factor, g_half)
    return ramp, tl.minimum(tl.maximum(g, -g_limit), g_limit)


@triton.jit
def _gate_kernel(
    y, z, out, M, D, stride_y, stride_z, two, four, g_factor, g_half, g_limit, v_factor, v_half, v_limit,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    m = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    n = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    inside = (m < M) & (n < D)
    y_value = tl.load(y + m * stride_y + n, mask=inside, other=0.0).to(tl.float32)
    z_value = tl.load(z + m * stride_z + n, mask=inside, other=0.0).to(tl.float32)
    _, g = _gate(z_value, two, four, g_factor, g_half, g_limit)
    v = rounded(y_value * g, v_factor, v_half)
    v = tl.minimum(tl.maximum(v, -v_limit), v_limit)
    tl.store(out + m * D + n, v.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _gate_gradient_kernel(
    gradient, y, z, d_y, d_z, M, D, stride_g, stride_y, stride_z,
    two, four, g_factor, g_half, g_limit, v_factor, v_half, v_limit,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    m = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    n = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    inside = (m < M) & (n < D)
    d_v = tl.load(gradient + m * stride_g + n, mask=inside, other=0.0).to(tl.float32)
    y_value = tl.load(y + m * stride_y + n, mask=inside, other=0.0).to(tl.float32)
    z_value = tl.load(z + m * stride_z + n, mask=inside, other=0.0).to(tl.float32)
    ramp, g = _gate(z_value, two, four, g_factor, g_half, g_limit)
    v = rounded(y_value * g, v_factor, v_half)
    d_product = (
        clamp_gradient(tl.minimum(tl.maximum(v, -v_limit), v_limit), d_v, -v_limit, v_limit) * v_factor
    )
    d_g = clamp_gradient(g, d_product * y_value, -g_limit, g_limit) * g_factor
    d_ramp = clamp_gradient(ramp, d_g * z_value, 0.0, four)
    tl.store(d_y + m * D + n, (d_product * g).to(d_y.dtype.element_ty), mask=inside)
    tl.store(d_z + m * D + n, (d_g * ramp + d_ramp).to(d_z.dtype.element_ty), mask=inside)


def _scalars(gate: HardSilu) -> tuple[float, ...]:
    return (
        float(gate.two),
        float(gate.four),
        2.0**-gate.g_places,
        half_unit(gate.g_places),
        float(gate.g_limit),
        2.0**-gate.v_places,
        half_unit(gate.v_places),
        float(gate.v_limit),
    )


_ROWS, _BLOCK = 4, 512


class _HardSiluGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, z: Tensor, gate: HardSilu) -> Tensor:
        y_rows, z_rows = rows_of(y), rows_of(z)
        M, D = y_rows.shape
        out = torch.empty(y.shape, dtype=narrow_dtype(y.device), device=y.device)
        _gate_kernel[(triton.cdiv(M, _ROWS), triton.cdiv(D, _BLOCK))](
            y_rows, z_rows, out, M, D, y_rows.stride(0), z_rows.stride(0), *_scalars(gate), _ROWS, _BLOCK
        )
        ctx.save_for_backward(y_rows, z_rows)
        ctx.gate, ctx.shape = gate, y.shape
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        y, z = ctx.saved_tensors
        M, D = y.shape
        g = rows_of(gradients[0])
        d_y = torch.empty(M, D, dtype=y.dtype, device=y.device)
        d_z = torch.empty(M, D, dtype=z.dtype, device=z.device)
        _gate_gradient_kernel[(triton.cdiv(M, _ROWS), triton.cdiv(D, _BLOCK))](
            g, y, z, d_y, d_z, M, D, g.stride(0), y.stride(0), z.stride(0), *_scalars(ctx.gate), _ROWS, _BLOCK
        )
        return d_y.reshape(ctx.shape), d_z.reshape(ctx.shape), None


def hard_silu_gate(y: Tensor, z: Tensor, gate: HardSilu) -> Tensor:
    """The eight nodes from z and y to v of ``mamba_int.native`` with ``gate`` = ``hard_silu``.

    Args:
        y, z: narrow integers [..., D].
        gate: the static side.

    Returns:
        v, narrow integers [..., D]; gradients straight through, as node by node.
    """
    result: Tensor = _HardSiluGate.apply(y, z, gate)
    return result
