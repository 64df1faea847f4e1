"""The activations of float Mamba blocks and their derivatives, inside kernels and in PyTorch.

Two of them need no exponential: squareplus (x + sqrt(x^2 + 4)) / 2 (Barron 2021, arXiv 2112.11687, equation 1
with b = 4), here of x kept within +-50, and the algebraic sigmoid (1 + x / (1 + |x|)) / 2.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

Activation = Literal["silu", "gelu", "relu", "identity", "squareplus", "algebraic_sigmoid"]


@triton.jit
def activated(x, ACTIVATION: tl.constexpr):
    """The activation of float32 values inside a kernel."""
    if ACTIVATION == "silu":
        x = x * tl.sigmoid(x)
    elif ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "relu":
        x = tl.maximum(x, 0.0)
    elif ACTIVATION == "squareplus":
        x = tl.minimum(tl.maximum(x, -50.0), 50.0)
        root = tl.sqrt_rn(x * x + 4.0)
        # Below zero the sum would cancel: 4 / (root - x) is the same.
        x = tl.where(x >= 0.0, 0.5 * (x + root), 2.0 / (root + tl.abs(x)))
    elif ACTIVATION == "algebraic_sigmoid":
        x = 0.5 + 0.5 * x / (1.0 + tl.abs(x))
    return x


@triton.jit
def activation_slope(x, ACTIVATION: tl.constexpr):
    """The derivative of the activation."""
    if ACTIVATION == "silu":
        sigmoid = tl.sigmoid(x)
        slope = sigmoid * (1.0 + x * (1.0 - sigmoid))
    elif ACTIVATION == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        slope = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * density
    elif ACTIVATION == "relu":
        slope = tl.where(x > 0.0, 1.0, 0.0)
    elif ACTIVATION == "squareplus":
        slope = tl.where(tl.abs(x) <= 50.0, 0.5 + 0.5 * x / tl.sqrt_rn(x * x + 4.0), 0.0)
    elif ACTIVATION == "algebraic_sigmoid":
        divisor = 1.0 + tl.abs(x)
        slope = 0.5 / (divisor * divisor)
    else:
        slope = tl.full(x.shape, 1.0, tl.float32)
    return slope


def activate(x: Tensor, activation: Activation) -> Tensor:
    """x sigmoid(x), x Phi(x), max(x, 0), x itself, squareplus or the algebraic sigmoid."""
    if activation == "silu":
        return F.silu(x)
    if activation == "gelu":
        return F.gelu(x)
    if activation == "squareplus":
        x = x.clamp(-50.0, 50.0)
        root = torch.sqrt(x * x + 4.0)
        return torch.where(x >= 0.0, 0.5 * (x + root), 2.0 / (root + x.abs()))
    if activation == "algebraic_sigmoid":
        return 0.5 + 0.5 * F.softsign(x)
    return F.relu(x) if activation == "relu" else x
