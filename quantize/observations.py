"""What tensors of a float model were seen to hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from quantize.scales import FloatArray

Record = Callable[[str, Tensor], None]
"""Told name and value of a tensor, channels last."""


@dataclass
class Observed:
    """What a tensor was seen to hold.

    Attributes:
        low, high: smallest and largest value.
        channels: largest magnitude of every entry of the last axis.
        samples: some of the rows along the last axis.
    """

    low: float
    high: float
    channels: FloatArray
    samples: list[FloatArray] = field(default_factory=list)

    @property
    def largest(self) -> float:
        """Largest magnitude."""
        return max(abs(self.low), abs(self.high))

    @property
    def sample(self) -> FloatArray:
        """The kept rows, [n, channels]."""
        return np.concatenate(self.samples)


Observations = dict[str, Observed]
"""By name of the tensor, as ``quantize.calibration.trace`` names them."""


def record_norm(record: Record, name: str, x: Tensor, eps: float) -> Tensor:
    """x over its root mean square: the norm of arXiv 1910.07467 before its weight."""
    square = x.square().mean(-1, keepdim=True)
    record(f"{name}.source", x)
    record(f"{name}.square", square)
    normed = x * torch.rsqrt(square + eps)
    record(name, normed)
    return normed
