"""Rows of a matrix as a scale times -1, 0, 1: the nearest for conversion, others to learn with.

Rows that are ternary already are found as they are by both rules.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def nearest_ternary(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Signs and scale of every row with the least square error.

    Of the rows with k entries not zero the best has them where |w| is largest and the mean of those |w| for a
    scale; its error is sum w^2 - (sum of those |w|)^2 / k (Ternary Weight Networks, arXiv 1605.04711,
    equations 4 to 6, with all k tried instead of the paper's estimate of the threshold).

    Args:
        weight: float [outputs, inputs].

    Returns:
        Signs -1, 0 or 1 [outputs, inputs] and scales [outputs, 1], in the dtype of ``weight``; the scale of a
        row of zeros is 0.
    """
    magnitude = weight.abs()
    descending = magnitude.sort(1, descending=True).values
    counts = torch.arange(1, weight.shape[1] + 1, device=weight.device, dtype=weight.dtype)
    explained = descending.cumsum(1).square() / counts
    threshold = descending.gather(1, explained.argmax(1, keepdim=True))
    return _with_scale(weight, magnitude >= threshold)


def absmean_ternary(weight: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`nearest_ternary`, with all entries above half the mean magnitude of their row.

    That is round(w / mean |w|) of BitNet b1.58 (arXiv 2402.17764, equations 1 to 3), for every row rather
    than the matrix, and with the scale that fits the signs. It is farther from the weights and has fewer
    zeros; a model that trains with it becomes better.
    """
    magnitude = weight.abs()
    return _with_scale(weight, magnitude > magnitude.mean(1, keepdim=True) / 2)


def _with_scale(weight: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Signs of what is kept, and the mean magnitude of that."""
    signs = weight.sign() * kept
    count = signs.abs().sum(1, keepdim=True).clamp(min=1)
    return signs, (weight * signs).sum(1, keepdim=True) / count


class Ternarization(nn.Module):
    """A parametrization (``torch.nn.utils.parametrize``) of a weight by its ternary rows.

    The gradient passes straight through to the latent weight (arXiv 1308.3432, section 4).
    """

    def forward(self, weight: Tensor) -> Tensor:
        """The rows of ``weight`` [outputs, inputs] as :func:`absmean_ternary` has them."""
        signs, scale = absmean_ternary(weight.detach())
        # In this order, what is added is exactly zero.
        return signs * scale + (weight - weight.detach())
