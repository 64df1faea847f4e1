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
class Moments:
    """Sums over all rows of a tensor.

    Attributes:
        count: rows. total: their sum [channels]. products: of their products [channels, channels].
    """

    count: int
    total: FloatArray
    products: FloatArray

    @classmethod
    def of(cls, rows: FloatArray) -> Moments:
        """Of rows [n, channels]."""
        return cls(len(rows), rows.sum(0), rows.T @ rows)

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.count + other.count, self.total + other.total, self.products + other.products)

    @property
    def mean(self) -> FloatArray:
        """Of every channel [channels]."""
        mean: FloatArray = self.total / self.count
        return mean

    @property
    def covariance(self) -> FloatArray:
        """Of the channels [channels, channels]."""
        covariance: FloatArray = self.products / self.count - np.outer(self.mean, self.mean)
        return covariance


@dataclass
class Observed:
    """What a tensor was seen to hold.

    Attributes:
        low, high: smallest and largest value.
        channels: largest magnitude of every entry of the last axis.
        samples: some of the rows along the last axis.
        moments: of all rows, where they were asked for.
    """

    low: float
    high: float
    channels: FloatArray
    samples: list[FloatArray] = field(default_factory=list)
    moments: Moments | None = None

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
