"""Exact products of narrow activations and narrow weights, rounded and saturated before they are written.

Sums of at most 2^24 in magnitude are exact in the float32 accumulators of the tensor cores, whatever their
order; writing the 8-bit result instead of the 24-bit sum moves a quarter of the bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_kernels.narrow import dot_dtype, narrow_dtype, rows_of
from triton_kernels.rounding import clamp_gradient, half_unit, rounded


@dataclass(frozen=True)
class Rounding:
    """What follows a sum: clamp(floor(sum * 2^-places + 1/2), low, high) on a range of columns.

    Attributes:
        start, stop: the columns. places: of the shift. low, high: of the clamp.
    """

    start: int
    stop: int
    places: int
    low: int
    high: int


@triton.jit
def _linear_kernel(
    x,
    weight,
    bias,
    rounding,
    residual,
    out,
    M,
    N,
    K,
    stride_x,
    stride_out,
    stride_residual,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    EVEN_K: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    # Programs walk down GROUP row blocks before the next column block: their operands stay in the L2 cache.
    program = tl.program_id(0)
    rows, columns = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    group = program // (GROUP * columns)
    height = min(rows - group * GROUP, GROUP)
    row_block = group * GROUP + (program % (GROUP * columns)) % height
    column_block = (program % (GROUP * columns)) // height
    m = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    n = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    m_safe, n_safe = tl.where(m < M, m, 0).to(tl.int64), tl.where(n < N, n, 0).to(tl.int64)
    x_at = x + m_safe[:, None] * stride_x + k[None, :]
    w_at = weight + n_safe[None, :] * K + k[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        if EVEN_K:
            a, b = tl.load(x_at), tl.load(w_at)
        else:
            a = tl.load(x_at, mask=k[None, :] < K - start, other=0.0)
            b = tl.load(w_at, mask=k[:, None] < K - start, other=0.0)
        total = tl.dot(a.to(DOT), b.to(DOT), total)
        x_at += BLOCK_K
        w_at += BLOCK_K
    inside = n < N
    if HAS_BIAS:
        total += tl.load(bias + n, mask=inside, other=0.0)[None, :]
    factor = tl.load(rounding + n, mask=inside, other=0.0)[None, :]
    half = tl.load(rounding + N + n, mask=inside, other=0.0)[None, :]
    low = tl.load(rounding + 2 * N + n, mask=inside, other=0.0)[None, :]
    high = tl.load(rounding + 3 * N + n, mask=inside, other=0.0)[None, :]
    y = rounded(total, factor, half)
    at = m.to(tl.int64)[:, None] * stride_out + n[None, :]
    # Up to the end of the padded row: a mask that ends at a multiple of 16 does not split vectors.
    written = (m[:, None] < M) & (n[None, :] < stride_out)
    if HAS_RESIDUAL:
        held = m.to(tl.int64)[:, None] * stride_residual + n[None, :]
        y += tl.load(residual + held, mask=(m[:, None] < M) & inside[None, :], other=0.0)
    y = tl.minimum(tl.maximum(y, low), high)
    tl.store(out + at, y.to(out.dtype.element_ty), mask=written)


@triton.jit
def _rounding_gradient_kernel(
    gradient,
    y,
    rounding,
    out,
    column_sums,
    residual_gradient,
    M,
    N,
    start,
    width,
    stride,
    stride_gradient,
    WANT_SUMS: tl.constexpr,
    WANT_RESIDUAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Gradient of the sum from that of one range of columns of the result."""
    row_block = tl.program_id(0)
    m = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    local = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    n = start + local
    inside = local < width
    both = (m[:, None] < M) & inside[None, :]
    at = m.to(tl.int64)[:, None] * stride + n[None, :]
    g = tl.load(gradient + m.to(tl.int64)[:, None] * stride_gradient + local[None, :], mask=both, other=0.0)
    g = g.to(tl.float32)
    value = tl.load(y + at, mask=both, other=0.0).to(tl.float32)
    factor = tl.load(rounding + n, mask=inside, other=0.0)[None, :]
    low = tl.load(rounding + 2 * N + n, mask=inside, other=0.0)[None, :]
    high = tl.load(rounding + 3 * N + n, mask=inside, other=0.0)[None, :]
    g = clamp_gradient(value, g, low, high)
    if WANT_RESIDUAL:
        tl.store(residual_gradient + at, g, mask=both)
    g *= factor
    tl.store(out + at, g.to(out.dtype.element_ty), mask=both)
    if WANT_SUMS:
        tl.store(column_sums + row_block * N + n, tl.sum(tl.where(both, g, 0.0), 0), mask=inside)


def _rounding_table(roundings: Sequence[Rounding], columns: int, device: torch.device) -> Tensor:
    """float32 [4, columns]: factor, half, low, high of every column."""
    table = torch.empty(4, columns)
    for r in roundings:
        values = (2.0**-r.places, half_unit(r.places), float(r.low), float(r.high))
        table[:, r.start : r.stop] = torch.tensor(values)[:, None]
    return table.to(device, non_blocking=True)


_tables: dict[tuple[Any, ...], Tensor] = {}


def _cached_table(roundings: Sequence[Rounding], columns: int, device: torch.device) -> Tensor:
    """The table, made once: a copy to the GPU in every step would break the capture of the step."""
    key = (tuple(roundings), columns, device)
    if key not in _tables:
        if len(_tables) >= 4096:
            _tables.clear()
        _tables[key] = _rounding_table(roundings, columns, device)
    return _tables[key]


def _blocks(M: int, N: int, interpreted: bool) -> dict[str, int]:
    if interpreted:
        return {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "GROUP": 4}
    # Fastest of what was tried on an H200 (docs/log.md): few column blocks want deep ones.
    if M >= 4096 and N > 1024:
        return {"BLOCK_M": 256, "BLOCK_N": 128, "BLOCK_K": 64, "GROUP": 8, "num_warps": 8, "num_stages": 4}
    if M >= 4096 and N >= 512:
        return {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 128, "GROUP": 8, "num_warps": 8, "num_stages": 3}
    return {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "GROUP": 8, "num_warps": 4, "num_stages": 4}


def _aligned(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An empty [rows, columns] whose rows begin at multiples of 16 elements: Triton loads them in vectors."""
    return torch.empty(rows, triton.cdiv(columns, 16) * 16, dtype=dtype, device=device)[:, :columns]


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b with float32 accumulation, in ``dtype``."""
    if a.dtype == dtype:
        return a @ b
    return torch.mm(a, b, out_dtype=dtype)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        roundings: tuple[Rounding, ...],
    ) -> tuple[Tensor, ...]:
        rows = rows_of(x).to(narrow_dtype(x.device))
        weight = weight.to(rows.dtype)
        (M, K), N = rows.shape, len(weight)
        table = _cached_table(roundings, N, x.device)
        dtype = narrow_dtype(x.device) if residual is None else torch.float32
        out = _aligned(M, N, dtype, x.device)
        residual = rows_of(residual) if residual is not None else None
        blocks = _blocks(M, N, not x.is_cuda)
        grid = (triton.cdiv(M, blocks["BLOCK_M"]) * triton.cdiv(N, blocks["BLOCK_N"]),)
        _linear_kernel[grid](
            rows,
            weight,
            bias,
            table,
            residual,
            out,
            M,
            N,
            K,
            rows.stride(0),
            out.stride(0),
            residual.stride(0) if residual is not None else 0,
            HAS_BIAS=bias is not None,
            HAS_RESIDUAL=residual is not None,
            EVEN_K=K % blocks["BLOCK_K"] == 0,
            DOT=dot_dtype(x),
            **blocks,
        )
        ctx.save_for_backward(rows, weight, out)
        ctx.roundings, ctx.shape = roundings, x.shape
        ctx.has_bias, ctx.has_residual = bias is not None, residual is not None
        return tuple(out[:, r.start : r.stop].unflatten(0, x.shape[:-1]) for r in roundings)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        rows, weight, out = ctx.saved_tensors
        M, N = len(rows), len(weight)
        table = _cached_table(ctx.roundings, N, out.device)
        narrow = narrow_dtype(out.device)
        inner = _aligned(M, N, narrow, out.device)
        block_m, block_n = (64, 128) if out.is_cuda else (64, 64)
        blocks = triton.cdiv(M, block_m)
        sums = torch.zeros(blocks, N, device=out.device) if ctx.has_bias else None
        d_residual = _aligned(M, N, torch.float32, out.device) if ctx.has_residual else None
        for rounding, gradient in zip(ctx.roundings, gradients, strict=True):
            width = rounding.stop - rounding.start
            if gradient is None:
                inner[:, rounding.start : rounding.stop] = 0
                continue
            g = rows_of(gradient)
            _rounding_gradient_kernel[(blocks, triton.cdiv(width, block_n))](
                g, out, table, inner, sums, d_residual,
                M, N, rounding.start, width, out.stride(0), g.stride(0),
                WANT_SUMS=sums is not None, WANT_RESIDUAL=ctx.has_residual,
                BLOCK_M=block_m, BLOCK_N=block_n,
            )  # fmt: skip
        d_x = _product(inner, weight, narrow).reshape(ctx.shape) if ctx.needs_input_grad[0] else None
        d_weight = _product(inner.t(), rows, narrow) if ctx.needs_input_grad[1] else None
        if d_residual is not None:
            d_residual = d_residual.unflatten(0, ctx.shape[:-1])
        return d_x, d_weight, sums.sum(0) if sums is not None else None, d_residual, None


def linear_requantize(
    x: Tensor, weight: Tensor, bias: Tensor | None, roundings: Sequence[Rounding]
) -> tuple[Tensor, ...]:
    """``linear``, ``slice``, ``shift``, ``relu`` and ``clamp`` of the integer graph in one kernel.

    Args:
        x: narrow integers [..., K].
        weight: narrow integers [N, K], ternary or int8.
        bias: integers [N], or None.
        roundings: for consecutive ranges of columns that cover 0..N.

    Returns:
        For every range, narrow integers [..., width]; gradients straight through, as node by node. They are
        views of one tensor.
    """
    result: tuple[Tensor, ...] = _Linear.apply(x, weight, bias, None, tuple(roundings))
    return result


def linear_residual(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, places: int, low: int, high: int
) -> Tensor:
    """clamp(shift(x W^T + bias, places) + residual, low, high), float32 [..., N].

    Args:
        x: narrow integers [..., K]. weight: narrow integers [N, K]. bias: integers [N], or None.
        residual: integers [..., N], float32.
        places, low, high: of the shift and of the clamp.
    """
    rounding = Rounding(0, len(weight), places, low, high)
    (result,) = _Linear.apply(x, weight, bias, residual, (rounding,))
    wide: Tensor = result
    return wide


class _WideLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        rows = rows_of(x).to(narrow_dtype(x.device))
        weight = weight.to(rows.dtype)
        ctx.save_for_backward(rows, weight)
        ctx.shape, ctx.has_bias = x.shape, bias is not None
        y = _product(rows, weight.t(), torch.float32)
        if bias is not None:
            y += bias
        return y.reshape(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        wide = rows_of(gradients[0])
        g = wide.to(rows.dtype)
        d_x = _product(g, weight, rows.dtype).reshape(ctx.shape)
        d_weight = _product(g.t(), rows, torch.float32)
        return d_x, d_weight, wide.sum(0) if ctx.has_bias else None


def wide_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + bias of narrow integers, exact in float32: [..., K] and [N, K] to [..., N]."""
    result: Tensor = _WideLinear.apply(x, weight, bias)
    return result
