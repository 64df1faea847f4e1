"""The integers of a matrix: int8 or ternary rows, by rounding or by reconstruction."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from mamba_int.graph import IntArray
from quantize.reconstruction import reconstruct, reconstruct_ternary
from quantize.scales import FloatArray, places_for, rounded, weight_places
from quantize.ternary import nearest_ternary

MOST_LOST_PLACES = 4
"""So much coarser than its bits allow may the coarsest int8 row of a matrix become."""
FACTOR_BITS = 10
"""Most bits of the factor that a ternary row is multiplied with."""


@dataclass(frozen=True)
class IntegerRows:
    """A matrix as factors * integers * 2**-places.

    Attributes:
        integers: int64 [outputs, inputs]. factors: positive, int64 [outputs]. places: common to all rows.
    """

    integers: IntArray
    factors: IntArray
    places: int

    @property
    def units(self) -> FloatArray:
        """What an integer of each row stands for [outputs]."""
        units: FloatArray = self.factors.astype(np.float64) * 2.0**-self.places
        return units

    @property
    def reals(self) -> FloatArray:
        """The matrix [outputs, inputs] that the integers are."""
        reals: FloatArray = self.units[:, None] * self.integers
        return reals


def int8_rows(
    weight: FloatArray, limit: int, spread: int, covariance: FloatArray | None = None
) -> Iterator[IntegerRows]:
    """Rows of integers up to ``limit``, with a power-of-two scale for each: ever coarser ones.

    Args:
        weight: [outputs, inputs]. limit: largest magnitude of the integers.
        spread: most places between the coarsest and the finest row.
        covariance: of the inputs, for reconstruction; None for plain rounding.
    """
    finest = weight_places(weight, limit, spread)
    for lost in range(finest.max() - finest.min() + MOST_LOST_PLACES):
        places = np.minimum(finest, finest.max() - lost)
        if covariance is None:
            integers = np.clip(rounded(weight, places[:, None].astype(np.float64)), -limit, limit)
        else:
            integers = reconstruct(weight, np.exp2(-places.astype(np.float64)), limit, covariance)
        yield IntegerRows(integers, 1 << (places.max() - places), int(places.max()))


def ternary_rows(weight: FloatArray, covariance: FloatArray | None = None) -> Iterator[IntegerRows]:
    """Rows of -1, 0 and 1, with a scale for each that is an integer of few bits times a common power of two:
    of ever fewer bits.

    Args:
        weight: [outputs, inputs].
        covariance: of the inputs, for reconstruction; None for the least error of the weights themselves.
    """
    if covariance is None:
        signs, scale = (tensor.numpy() for tensor in nearest_ternary(torch.from_numpy(weight)))
        integers, units = signs.astype(np.int64), scale[:, 0]
    else:
        integers, units = reconstruct_ternary(weight, covariance)
    for bits in range(FACTOR_BITS, 0, -1):
        places = places_for(float(units.max()), (1 << bits) - 1)
        yield IntegerRows(integers, np.maximum(rounded(units, places), 1), places)
