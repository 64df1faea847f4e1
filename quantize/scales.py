"""Power-of-two scales from observed values: binary places of activations and weights, equalisation."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mamba_int.graph import IntArray

Method = Literal["mse", "percentile", "minmax"]
FloatArray = NDArray[np.float64]
LARGEST_FRAC = 24
"""Values so small that more places would fit are as good as zero."""


def largest_integer(bits: int) -> int:
    """Largest magnitude of integers of so many bits, their sign included."""
    return (1 << (bits - 1)) - 1


def places_for(largest: float, limit: int) -> int:
    """Most binary places at which ``largest`` rounds to at most ``limit``; negative for large numbers."""
    if largest <= 0:
        return LARGEST_FRAC
    return min(math.floor(math.log2((limit + 0.5) / largest)), LARGEST_FRAC)


def rounded(values: FloatArray, frac: FloatArray | float) -> IntArray:
    """floor(v 2^frac + 1/2): the rounding of shifts, of reals."""
    integers: IntArray = np.floor(values * np.exp2(frac) + 0.5).astype(np.int64)
    return integers


def activation_places(samples: FloatArray, largest: float, limit: int, method: Method, share: float) -> int:
    """Binary places of an activation that saturates at +-limit.

    Args:
        samples: values that were seen. largest: magnitude of the largest of all.
        limit: integer.
        method: ``minmax`` saturates nothing that was seen; ``percentile`` may saturate what exceeds the
            ``share`` quantile of magnitudes; ``mse`` takes the least mean square error of the samples.
        share: of ``percentile``.
    """
    safe = places_for(largest, limit)
    if method == "minmax" or not len(samples):
        return safe
    if method == "percentile":
        return max(safe, places_for(float(np.quantile(np.abs(samples), share)), limit))

    def error(frac: int) -> float:
        integers = np.clip(rounded(samples, frac), -limit, limit)
        return float(np.square(integers * 2.0**-frac - samples).mean())

    return min(range(safe, min(safe + 4, LARGEST_FRAC) + 1), key=error)


def activation_scale(samples: FloatArray, limit: int, method: Method, share: float) -> float:
    """What an activation is multiplied with before it saturates at +-limit, where that need be no power of
    two: the choices of :func:`activation_places` in steps of an eighth of an octave.
    """
    magnitudes = np.abs(samples)
    largest = float(magnitudes.max())
    if largest <= 0:
        return 1.0
    if method == "minmax":
        return limit / largest
    if method == "percentile":
        quantile = float(np.quantile(magnitudes, share))
        return limit / (quantile if quantile > 0 else largest)

    def error(scale: float) -> float:
        integers = np.clip(np.floor(samples * scale + 0.5), -limit, limit)
        return float(np.square(integers / scale - samples).mean())

    scales: list[float] = [limit / largest * 2.0 ** (i / 8) for i in range(25)]
    return min(scales, key=error)


def weight_places(weight: FloatArray, limit: int, spread: int) -> IntArray:
    """Binary places of every row of a matrix at integers up to ``limit``, the finest by ``spread`` at most.

    A row in doubt takes the scale of less mean square error.
    """
    largest = np.abs(weight).max(1)
    safe = np.array([places_for(float(row), limit) for row in largest], np.int64)

    def error(frac: IntArray) -> FloatArray:
        integers = np.clip(rounded(weight, frac[:, None].astype(np.float64)), -limit, limit)
        squares: FloatArray = np.square(integers * np.exp2(-frac[:, None]) - weight).mean(1)
        return squares

    places = np.where(error(safe + 1) < error(safe), safe + 1, safe)
    least = places[largest > 0].min() if (largest > 0).any() else 0
    clipped: IntArray = np.minimum(places, least + spread)
    return clipped


def equalisation(activation: FloatArray, weight: FloatArray, spread: int) -> IntArray:
    """By how many places each input of a matrix product is made larger, and its column smaller.

    The power of two next to what SmoothQuant (arXiv 2211.10438, equation 4) takes with alpha = 1/2, up to a
    common factor: channels that are small where their weights are large gain places.

    Args:
        activation: largest magnitude of every input [inputs]. weight: [outputs, inputs].
        spread: most places.

    Returns:
        int64 [inputs], 0..spread.
    """
    columns = np.abs(weight).max(0)
    if not (activation > 0).any() or not (columns > 0).any():
        return np.zeros(len(activation), np.int64)
    floor = 2.0**-20
    a = np.maximum(activation, floor * activation.max())
    w = np.maximum(columns, floor * columns.max())
    places = _balanced(np.log2(w) / 2 - np.log2(a) / 2)
    # No channel may become the new outlier.
    room = np.floor(np.log2(activation.max() / a)).astype(np.int64)
    smaller: IntArray = np.clip(np.minimum(places, room), 0, spread)
    return smaller


def _balanced(exponents: FloatArray) -> IntArray:
    whole: IntArray = np.floor(exponents - exponents.min() + 0.5).astype(np.int64)
    return whole
