"""BitNet b1.58 weights: -1, 0 or 1 of every latent weight."""

from __future__ import annotations

import torch
from torch import Tensor

from triton_kernels.straight_through import straight_through

SMALLEST_MEAN = 1e-5
"""A row of zeros stays zero."""


def ternarize(weight: Tensor, frac: int) -> Tensor:
    """clamp(round(W / mean|W|), -1, 1), the mean taken per row (Ma et al. 2024, arXiv 2402.17764).

    Args:
        weight: latent weights, float32 [outputs, inputs].
        frac: binary places of the scale that the following nodes apply: the gradient is of ``W * 2^frac``.

    Returns:
        [outputs, inputs], integers held in float32.
    """
    mean = weight.detach().abs().mean(1, keepdim=True).clamp_min(SMALLEST_MEAN)
    ternary = torch.floor(weight.detach() / mean + 0.5).clamp_(-1, 1)
    return straight_through(weight * 2.0**frac, ternary)
