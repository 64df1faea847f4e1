"""Cross entropy over a vocabulary, straight from half precision logits: one pass forward, one backward.

    loss = mean over counted rows of  log sum_j e^(x_j) - x_target

Forward keeps the logarithm of the sum of each row, not probabilities: every lane has a running maximum and a
running sum of its own (Milakov & Gimelshein 2018, arXiv 1805.02867), which meet at the end of the row.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from triton_kernels.dispatch import check_operands, device_of, runs_on_triton

IGNORED_LABEL = -100
"""Rows with this target are not counted."""
BLOCK = 2048
"""Most logits a program holds at once."""


@triton.jit
def _forward_kernel(
    logits_ptr,
    targets_ptr,
    logsumexp_ptr,
    losses_ptr,
    classes,
    row_stride,
    BLOCK: tl.constexpr,
    IGNORED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    base = logits_ptr + row * row_stride
    offset = tl.arange(0, BLOCK)
    # Finite, so that lanes beyond the row never subtract infinities.
    largest = tl.full([BLOCK], -1e30, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, classes, BLOCK):
        j = start + offset
        x = tl.load(base + j, mask=j < classes, other=float("-inf")).to(tl.float32)
        larger = tl.maximum(largest, x)
        total = total * tl.exp(largest - larger) + tl.exp(x - larger)
        largest = larger
    peak = tl.max(largest, 0)
    logsumexp = peak + tl.log(tl.sum(total * tl.exp(largest - peak), 0))
    tl.store(logsumexp_ptr + row, logsumexp)
    target = tl.load(targets_ptr + row)
    known = (target >= 0) & (target < classes)
    chosen = tl.load(base + target, mask=known, other=0.0).to(tl.float32)
    loss = tl.where(known, logsumexp - chosen, float("nan"))
    tl.store(losses_ptr + row, tl.where(target == IGNORED, 0.0, loss))


@triton.jit
def _backward_kernel(
    logits_ptr,
    targets_ptr,
    logsumexp_ptr,
    scale_ptr,
    dlogits_ptr,
    classes,
    row_stride,
    BLOCK: tl.constexpr,
    IGNORED: tl.constexpr,
):
    """(softmax - one-hot) scale, one block of one row; zero where the row is not counted."""
    row = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    target = tl.load(targets_ptr + row)
    scale = tl.where(target == IGNORED, 0.0, tl.load(scale_ptr))
    x = tl.load(logits_ptr + row * row_stride + j, mask=j < classes, other=0.0).to(tl.float32)
    probability = tl.exp(x - tl.load(logsumexp_ptr + row))
    d = (probability - tl.where(j == target, 1.0, 0.0)) * scale
    tl.store(dlogits_ptr + row * classes + j, d.to(dlogits_ptr.dtype.element_ty), mask=j < classes)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        if logits.stride(1) != 1:
            logits = logits.contiguous()
        targets = targets.contiguous()
        rows, classes = logits.shape
        logsumexp = logits.new_empty(rows, dtype=torch.float32)
        losses = torch.empty_like(logsumexp)
        with device_of(logits):
            _forward_kernel[(rows,)](
                logits,
                targets,
                logsumexp,
                losses,
                classes,
                logits.stride(0),
                BLOCK=min(BLOCK, triton.next_power_of_2(classes)),
                IGNORED=IGNORED_LABEL,
                num_warps=4,
            )
        count = (targets != IGNORED_LABEL).sum()
        ctx.save_for_backward(logits, targets, logsumexp, count)
        return losses.sum() / count

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        logits, targets, logsumexp, count = ctx.saved_tensors
        rows, classes = logits.shape
        dlogits = torch.empty(rows, classes, dtype=logits.dtype, device=logits.device)
        block = min(BLOCK, triton.next_power_of_2(classes))
        with device_of(logits):
            _backward_kernel[(rows, triton.cdiv(classes, block))](
                logits,
                targets,
                logsumexp,
                gradients[0].float() / count,
                dlogits,
                classes,
                logits.stride(0),
                BLOCK=block,
                IGNORED=IGNORED_LABEL,
                num_warps=4,
            )
        return dlogits, None


def cross_entropy_reference(logits: Tensor, targets: Tensor) -> Tensor:
    """The definition of ``cross_entropy``; float64 stays float64."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.to(wide), targets, ignore_index=IGNORED_LABEL)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean of log sum_j e^(x_j) - x_target over the rows whose target is not ``IGNORED_LABEL``.

    Args:
        logits: [rows, classes]; bfloat16, float16, float32 or float64.
        targets: int64 [rows], each a class or ``IGNORED_LABEL``.

    Returns:
        The loss in nats, a scalar of at least float32, with a gradient to ``logits``. NaN if no row is
        counted; on a GPU also if a target is no class, where elsewhere PyTorch raises.

    Raises:
        ValueError: shapes or devices do not fit.
    """
    if logits.ndim != 2 or 0 in logits.shape:
        raise ValueError(f"logits have shape {tuple(logits.shape)}; give [rows, classes], none of them 0")
    check_operands(logits, [("targets", targets, (logits.shape[0],))])
    if not runs_on_triton(logits):
        return cross_entropy_reference(logits, targets)
    loss: Tensor = _CrossEntropy.apply(logits, targets)
    return loss
