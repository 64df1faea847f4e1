"""Parameters of float models, as arrays."""

from __future__ import annotations

import numpy as np
from torch import Tensor, nn

from quantize.scales import FloatArray


def array(parameter: Tensor) -> FloatArray:
    """In float64, on the CPU."""
    # A copy: of a float64 model it would be the parameter itself.
    return np.array(parameter.detach().double().cpu().numpy())


def bias_of(linear: nn.Linear) -> FloatArray | None:
    """The bias of a matrix, if it has one."""
    # nn.Linear declares its bias a tensor, but it may be absent.
    bias: Tensor | None = linear.bias
    return None if bias is None else array(bias)


def conv_parameters(conv: nn.Conv1d) -> tuple[FloatArray, FloatArray]:
    """Taps [channels, width] and biases [channels] of a depthwise convolution."""
    taps, bias = array(conv.weight)[:, 0], conv.bias
    return taps, np.zeros(len(taps)) if bias is None else array(bias)
