"""The norm by powers of two as integers: a mean, a variance, and one comparison for each power of two.

The operation ``norm`` goes on below and above its thresholds by itself, where this norm stops: hence its own
ladder. It costs a few integers a step, not a channel.
"""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

from mamba_int.float_models.bit_shift_norm import BitShiftNorm
from quantize.observations import Record
from quantize.parameters import array
from quantize.pieces import Pieces
from quantize.scales import places_for, rounded

MEAN_PLACES = 2
"""Binary places that the mean has more than the stream."""


def record_bit_shift_norm(record: Record, name: str, x: Tensor, norm: BitShiftNorm) -> Tensor:
    """The norm of x before its weights."""
    record(f"{name}.centred", x - x.mean(-1, keepdim=True))
    normed = norm.normed(x)
    record(f"{name}.normed", normed)
    record(name, normed * (norm.weight * norm.step_size))
    return normed


def bit_shift_norm(p: Pieces, name: str, source: str, norm: BitShiftNorm) -> str:
    """(x - mean x) 2^-k times the weights, k the power of two that the variance says.

    With V = sum xs^2 at least d 4^(i + g) for the powers i = min_shift + 1 .. max_shift, g the places of xs:
    the product of x - mean x and 2^(max_shift - min_shift - #{i: V >= d 4^(i + g)}).
    """
    b, c = p.graph, p.config
    d = b.types[source].shape[-1]

    # The mean, its division by d a multiplication.
    fine = b.frac[source] + MEAN_PLACES
    total = b.add(f"{name}_total", "linear", source, frac=b.frac[source], constants=_row(d))
    width = b.max_bits - 1 - b.types[total].magnitude.bit_length()
    places = places_for(1 / d, (1 << min(width, 16)) - 1)
    mean = b.add(
        f"{name}_mean_wide",
        "mul",
        total,
        frac=b.frac[total] + places,
        constants={"value": rounded(np.array(1 / d), places)},
    )
    mean = b.shift(f"{name}_mean", mean, min(fine, b.frac[mean]))
    means = b.add(f"{name}_means", "linear", mean, frac=b.frac[mean], constants=_column(d))
    x = b.shift(f"{name}_fine", source, b.frac[means])
    centred = b.add(f"{name}_deviation", "sub", x, means, frac=b.frac[x])

    # The variance as a sum of squares of fewer bits.
    room = b.max_bits - 1
    limit = math.isqrt((1 << room) // (2 * d))
    seen = p.seen[f"{name}.centred"].largest
    # The stream may double, and what a square loses to saturation falsifies the whole vector.
    square_frac = min(places_for(2 * seen, limit), b.frac[centred])
    xs = b.requantize(f"{name}_xs", centred, square_frac, limit)
    squares = b.add(f"{name}_squares", "mul", xs, xs, frac=2 * square_frac)
    sums = b.add(f"{name}_sum", "linear", squares, frac=2 * square_frac, constants=_row(d))

    # Powers that the sum always or never reaches need no comparison.
    shifts = range(norm.min_shift + 1, norm.max_shift + 1)
    thresholds = [math.ceil(d * 4.0 ** (i + square_frac)) for i in shifts]
    always = sum(threshold <= b.types[sums].low for threshold in thresholds)
    asked = [t for t in thresholds[always:] if t <= b.types[sums].high]
    steps = len(asked)
    multiplier = ""
    for i, threshold in enumerate(asked):
        reached = b.add(f"{name}_reached{i}", "compare", sums, frac=0, constants={"value": threshold})
        # From 2^(steps - i) to half of that.
        lost = {"value": -(1 << (steps - i - 1))}
        less = b.add(f"{name}_less{i}", "mul", reached, frac=0, constants=lost)
        multiplier = b.add(f"{name}_lesses{i}", "add", multiplier, less, frac=0) if multiplier else less
    least = norm.min_shift + always
    if multiplier:
        multiplier = b.add(f"{name}_multiplier", "add", multiplier, frac=0, constants={"value": 1 << steps})

    # What was not seen saturates, so that the product stays inside the budget.
    frac = min(places_for(2 * seen, c.residual_limit), b.frac[centred])
    y = b.requantize(f"{name}_centred", centred, frac, c.residual_limit)
    if multiplier:
        spread = b.add(f"{name}_multipliers", "linear", multiplier, frac=0, constants=_column(d))
        y = b.add(f"{name}_product", "mul", y, spread, frac=frac + least + steps)
    else:
        y = b.add(f"{name}_product", "mul", y, frac=frac + least, constants={"value": 1})
    normed = p.seen[f"{name}.normed"]
    y = b.requantize(
        f"{name}_normed", y, min(places_for(normed.largest, c.internal_limit), b.frac[y]), c.internal_limit
    )
    weight = array(norm.weight) * array(norm.step_size)
    width = b.max_bits - 1 - b.types[y].magnitude.bit_length()
    places = places_for(float(np.abs(weight).max()), (1 << min(width, 12)) - 1)
    y = b.add(
        f"{name}_weighted", "mul", y, frac=b.frac[y] + places, constants={"value": rounded(weight, places)}
    )
    return b.requantize(
        name, y, min(p.places(p.seen[name], c.activation_limit), b.frac[y]), c.activation_limit
    )


def _row(d: int) -> dict[str, object]:
    """Sums over channels."""
    return {"weight": np.ones((1, d), np.int64)}


def _column(d: int) -> dict[str, object]:
    """The same for every channel."""
    return {"weight": np.ones((d, 1), np.int64)}
