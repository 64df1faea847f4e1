"""The gate sigmoid(g) x of gated units (arXiv 1612.08083, section 2), entry by entry.

One pass over memory forward and one backward, for three and five as separate operations; bytes in half
precision: forward 6 an entry, backward 10, and nothing is kept but g and x.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_kernels.dispatch import check_operands, device_of, runs_on_triton

ROWS = 4
COLUMNS = 512
"""Tile of a program."""


@triton.jit
def _gate_kernel(
    g_ptr,
    x_ptr,
    y_ptr,
    dy_ptr,
    dg_ptr,
    dx_ptr,
    rows,
    width,
    g_stride,
    x_stride,
    dy_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BACKWARD: tl.constexpr,
):
    """y, or, BACKWARD, the gradients of g and x from ``dy``; y, dg and dx are dense."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None].to(tl.int64)
    d = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    mask = (row < rows) & (d < width)
    g = tl.load(g_ptr + row * g_stride + d, mask=mask, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + row * x_stride + d, mask=mask, other=0.0).to(tl.float32)
    opening = tl.sigmoid(g)
    place = row * width + d
    if BACKWARD:
        dy = tl.load(dy_ptr + row * dy_stride + d, mask=mask, other=0.0).to(tl.float32)
        dg = dy * x * opening * (1.0 - opening)
        tl.store(dg_ptr + place, dg.to(dg_ptr.dtype.element_ty), mask=mask)
        tl.store(dx_ptr + place, (dy * opening).to(dx_ptr.dtype.element_ty), mask=mask)
    else:
        tl.store(y_ptr + place, (opening * x).to(y_ptr.dtype.element_ty), mask=mask)


def _rows(x: Tensor) -> Tensor:
    """As [rows, D] with entries side by side: a view if there is one."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()


def _launch(g: Tensor, x: Tensor, y: Tensor | None, dy: Tensor | None, *gradients: Tensor | None) -> None:
    flat = _rows(g), _rows(x)
    given = None if dy is None else _rows(dy)
    dg, dx = gradients
    rows, width = flat[0].shape
    with device_of(g):
        _gate_kernel[(triton.cdiv(rows, ROWS), triton.cdiv(width, COLUMNS))](
            *flat,
            y,
            given,
            dg,
            dx,
            rows,
            width,
            flat[0].stride(0),
            flat[1].stride(0),
            0 if given is None else given.stride(0),
            ROWS=ROWS,
            COLUMNS=COLUMNS,
            BACKWARD=dy is not None,
        )


class _SigmoidGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor) -> Tensor:
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        _launch(g, x, y, None, None, None)
        ctx.save_for_backward(g, x)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        g, x = ctx.saved_tensors
        dg, dx = (torch.empty(v.shape, dtype=v.dtype, device=v.device) for v in (g, x))
        _launch(g, x, None, gradients[0], dg, dx)
        return dg, dx


def sigmoid_gate_reference(g: Tensor, x: Tensor) -> Tensor:
    """The definition of ``sigmoid_gate``; float64 stays float64."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return (torch.sigmoid(g.to(wide)) * x.to(wide)).to(x.dtype)


def sigmoid_gate(g: Tensor, x: Tensor) -> Tensor:
    """sigmoid(g) x.

    Kernels compute in float32; float64 inputs and CPU tensors use ``sigmoid_gate_reference``. Parts of wider
    tensors, [..., :D], are read where they are.

    Args:
        g, x: [..., D]; bfloat16, float16, float32 or float64.

    Returns:
        like ``x``, with gradients to both.

    Raises:
        ValueError: shapes or devices do not fit.
    """
    if x.ndim < 1 or 0 in x.shape:
        raise ValueError(f"x has shape {tuple(x.shape)}; give it as [..., D], none of them 0")
    check_operands(x, [("g", g, tuple(x.shape))])
    if not runs_on_triton(x):
        return sigmoid_gate_reference(g, x)
    y: Tensor = _SigmoidGate.apply(g, x)
    return y
