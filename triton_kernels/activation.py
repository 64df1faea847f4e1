"""The activations of float Mamba blocks and their derivatives, inside kernels and in PyTorch."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

Activation = Literal["silu", "gelu", "relu", "identity"]


@triton.jit
def activated(x, ACTIVATION: tl.constexpr):
    """The activation of float32 values inside a kernel."""
    if ACTIVATION == "silu":
        x = x * tl.sigmoid(x)
    elif ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "relu":
        x = tl.maximum(x, 0.0)
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
    else:
        slope = tl.full(x.shape, 1.0, tl.float32)
    return slope


def activate(x: Tensor, activation: Activation) -> Tensor:
    """x sigmoid(x), x Phi(x), max(x, 0) or x itself."""
    if activation == "silu":
        return F.silu(x)
    if activation == "gelu":
        return F.gelu(x)
    return F.relu(x) if activation == "relu" else x
