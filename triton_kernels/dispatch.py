"""The one rule that says where an operation runs: kernels on CUDA, references elsewhere."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from triton import knobs

KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.complex64)


def runs_on_triton(x: Tensor) -> bool:
    """True if an operation on ``x`` launches its Triton kernels, False if it computes its PyTorch reference.

    CUDA tensors launch kernels, and so do CPU tensors under Triton's interpreter (``TRITON_INTERPRET=1``),
    bfloat16 excepted: the interpreter's ``tl.dot`` multiplies its bit patterns as integers. Kernels
    accumulate in float32, so float64 always goes to the reference.
    """
    if x.dtype not in KERNEL_DTYPES:
        return False
    return x.is_cuda or (bool(knobs.runtime.interpret) and x.dtype != torch.bfloat16)


def device_of(x: Tensor) -> AbstractContextManager[object]:
    """Make the device of ``x`` the current one: Triton launches there, wherever the tensors lie."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def check_operands(x: Tensor, expected: list[tuple[str, Tensor | None, tuple[int, ...]]]) -> None:
    """Refuse operands of a wrong shape or on another device than ``x``; ``None`` stands for one not given."""
    for name, operand, shape in expected:
        if operand is None:
            continue
        if tuple(operand.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(operand.shape)}; give it as {shape}")
        if operand.device != x.device:
            raise ValueError(f"{name} is on {operand.device} and x on {x.device}; move them to one device")
