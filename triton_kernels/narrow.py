"""Narrow integers: magnitudes up to 256, which bf16 and the tensor cores hold exactly."""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

NARROW = 256
"""Largest magnitude whose every smaller integer is a bf16 number (8 significant bits)."""


def narrow_dtype(device: torch.device) -> torch.dtype:
    """bf16 on a GPU; float32 elsewhere, where Triton's interpreter has no bf16 products."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def dot_dtype(x: Tensor) -> Any:
    """The Triton type in which a kernel multiplies narrow integers of the device of ``x``."""
    return tl.bfloat16 if x.is_cuda else tl.float32


def rows_of(x: Tensor) -> Tensor:
    """[..., d] as [rows, d] whose last axis is contiguous; a view if the layout allows one."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(-1) == 1 else flat.contiguous()
