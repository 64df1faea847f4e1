"""The ratio of signal to quantization noise in decibels, finite whatever the tensors are."""

from __future__ import annotations

import math

LARGEST_DB = 200.0
"""That of tensors that are equal, beyond what float64 can tell; its negative is that of a tensor that should
be zero and is not."""


def sqnr_db(signal: float, noise: float) -> float:
    """10 log10(signal / noise) of two powers, within +-``LARGEST_DB``; two digits after the point."""
    if noise == 0:
        return LARGEST_DB
    if signal == 0:
        return -LARGEST_DB
    return round(min(max(10 * (math.log10(signal) - math.log10(noise)), -LARGEST_DB), LARGEST_DB), 2)
