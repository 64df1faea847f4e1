"""The straight-through estimator: one value forward, the gradient of another backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, smooth: Tensor, exact: Tensor) -> Tensor:
        return exact

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def straight_through(smooth: Tensor, exact: Tensor) -> Tensor:
    """``exact`` bit for bit, with the gradient of ``smooth`` (Bengio et al. 2013, arXiv 1308.3432)."""
    result: Tensor = _StraightThrough.apply(smooth, exact)
    return result
