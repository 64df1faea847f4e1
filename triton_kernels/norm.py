"""BitShiftNorm and the int8 clamp behind it in one pass over the residual."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_kernels.narrow import narrow_dtype
from triton_kernels.rounding import clamp_gradient, half_unit, rounded


class Ladder(NamedTuple):
    """The static side of a ``norm`` node and its clamp; see ``mamba_int.operations.norm``.

    Attributes:
        input_shift, input_limit: how the copy that is squared is made.
        thresholds, multipliers, places: level = #{sum > threshold},
            y = shift(x * multipliers[level], places).
        low, high: of the clamp.
    """

    input_shift: int
    input_limit: int
    thresholds: tuple[int, ...]
    multipliers: tuple[int, ...]
    places: int
    low: int
    high: int


@triton.jit
def _factor(
    x, ladder, FACTOR_IN: tl.constexpr, HALF: tl.constexpr, LIMIT: tl.constexpr, LEVELS: tl.constexpr
):
    """What each row is multiplied by, [rows, 1]."""
    xs = rounded(x, FACTOR_IN, HALF)
    xs = tl.minimum(tl.maximum(xs, -LIMIT), LIMIT)
    squares = tl.sum(xs * xs, 1, keep_dims=True)
    level = tl.zeros_like(squares).to(tl.int32)
    for i in range(LEVELS):
        level += (squares > tl.load(ladder + i)).to(tl.int32)
    return tl.load(ladder + LEVELS + level)


@triton.jit
def _norm_kernel(
    x_at, ladder, out, M, D, low, high,
    FACTOR_IN: tl.constexpr, HALF: tl.constexpr, LIMIT: tl.constexpr, LEVELS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    n = tl.arange(0, BLOCK)
    inside = (m[:, None] < M) & (n[None, :] < D)
    at = m.to(tl.int64)[:, None] * D + n[None, :]
    x = tl.load(x_at + at, mask=inside, other=0.0)
    factor = _factor(x, ladder, FACTOR_IN, HALF, LIMIT, LEVELS)
    y = rounded(x, factor, 0.5)
    y = tl.minimum(tl.maximum(y, low), high)
    tl.store(out + at, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _norm_gradient_kernel(
    gradient, x_at, y_at, ladder, out, M, D, low, high,
    FACTOR_IN: tl.constexpr, HALF: tl.constexpr, LIMIT: tl.constexpr, LEVELS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    n = tl.arange(0, BLOCK)
    inside = (m[:, None] < M) & (n[None, :] < D)
    at = m.to(tl.int64)[:, None] * D + n[None, :]
    x = tl.load(x_at + at, mask=inside, other=0.0)
    y = tl.load(y_at + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32)
    factor = _factor(x, ladder, FACTOR_IN, HALF, LIMIT, LEVELS)
    g = clamp_gradient(y, g, low, high)
    along = tl.sum(g * x, 1, keep_dims=True) / (tl.sum(x * x, 1, keep_dims=True) + 1e-6)
    tl.store(out + at, factor * (g - x * along), mask=inside)


_tables: dict[tuple[Ladder, torch.device], Tensor] = {}


def _table(ladder: Ladder, device: torch.device) -> Tensor:
    """float32: the thresholds, then the factor of every level."""
    if (ladder, device) not in _tables:
        factors = [multiplier * 2.0**-ladder.places for multiplier in ladder.multipliers]
        _tables[ladder, device] = torch.tensor([*ladder.thresholds, *factors], dtype=torch.float32).to(device)
    return _tables[ladder, device]


def _launch(D: int) -> dict[str, Any]:
    block = triton.next_power_of_2(D)
    return {"ROWS": max(1, 1024 // block), "BLOCK": block, "num_warps": 4 if block <= 2048 else 8}


class _NormRequantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ladder: Ladder) -> Tensor:
        x = x.contiguous()
        D = x.shape[-1]
        M = x.numel() // D
        y = torch.empty_like(x, dtype=narrow_dtype(x.device))
        launch = _launch(D)
        static = (
            2.0**-ladder.input_shift,
            half_unit(ladder.input_shift),
            float(ladder.input_limit),
            len(ladder.thresholds),
        )
        _norm_kernel[(triton.cdiv(M, launch["ROWS"]),)](
            x, _table(ladder, x.device), y, M, D, float(ladder.low), float(ladder.high), *static, **launch
        )
        ctx.save_for_backward(x, y)
        ctx.ladder, ctx.static = ladder, static
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        x, y = ctx.saved_tensors
        D = x.shape[-1]
        M = x.numel() // D
        d_x = torch.empty_like(x)
        launch = _launch(D)
        _norm_gradient_kernel[(triton.cdiv(M, launch["ROWS"]),)](
            gradients[0].contiguous(), x, y, _table(ctx.ladder, x.device), d_x, M, D,
            float(ctx.ladder.low), float(ctx.ladder.high), *ctx.static, **launch,
        )  # fmt: skip
        return d_x, None


def norm_requantize(x: Tensor, ladder: Ladder) -> Tensor:
    """``norm`` and ``clamp`` of the integer graph; gradients as ``triton_kernels.bit_shift_norm``.

    Args:
        x: integers, float32 [..., d]. Its squares, shifted and limited, sum to at most 2^24.
        ladder: the node's static side.

    Returns:
        Narrow integers [..., d].
    """
    result: Tensor = _NormRequantize.apply(x, ladder)
    return result
