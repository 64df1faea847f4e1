"""Tables of real functions on integer indices, each with a proven bound of its error.

An index i of ``index_frac`` places stands for the reals of its cell [(i - 1/2) 2^-f, (i + 1/2) 2^-f], which
the rounding shift maps to it. A function that is monotone between known turning points takes its extremes
over a cell at the ends of the cell and at the turning points inside: the largest distance of an entry from
these bounds the error at every real number of the table's range, the rounding of the index included.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from mamba_int.graph import IntArray

FloatArray = NDArray[np.float64]
ROUNDING = 2.0**-40
"""Added to bounds, for the rounding of float64 in the functions themselves; relative beyond 1."""


@dataclass(frozen=True)
class Curve:
    """A real function.

    Attributes:
        evaluate: its values, in float64.
        turning_points: where it changes direction; it is monotone between them.
    """

    evaluate: Callable[[FloatArray], FloatArray]
    turning_points: tuple[float, ...] = ()

    def extremes(self, low: FloatArray, high: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Smallest and largest value over each of the intervals [low, high]."""
        seen = [self.evaluate(low), self.evaluate(high)]
        for point in self.turning_points:
            inside = np.clip(np.full_like(low, point), low, high)
            seen.append(self.evaluate(inside))
        return np.min(seen, 0), np.max(seen, 0)


def _silu(x: FloatArray) -> FloatArray:
    # The sigmoid as 1 / (1 + e^-x) by logaddexp, which does not overflow.
    return x * np.exp(-np.logaddexp(0.0, -x))


def _gelu(x: FloatArray) -> FloatArray:
    tail: FloatArray = np.vectorize(math.erfc, otypes=[np.float64])(-x / math.sqrt(2))
    return 0.5 * x * tail


def _squareplus(x: FloatArray) -> FloatArray:
    x = np.clip(x, -50.0, 50.0)
    root = np.sqrt(x * x + 4)
    # Below zero the sum would cancel.
    smooth: FloatArray = np.where(x >= 0, (x + root) / 2, 2 / (root + np.abs(x)))
    return smooth


ACTIVATIONS: dict[str, Curve] = {
    # Zeros of the derivatives.
    "silu": Curve(_silu, (-1.2784645427610738,)),
    "gelu": Curve(_gelu, (-0.7517915246935645,)),
    "relu": Curve(lambda x: np.maximum(x, 0.0)),
    "identity": Curve(lambda x: x),
    "squareplus": Curve(_squareplus),
    "algebraic_sigmoid": Curve(lambda x: 0.5 + 0.5 * x / (1 + np.abs(x))),
}
"""The activations of float models, by their names there."""


def log_step(low: float = 0.0, high: float = 0.0) -> Curve:
    """log(softplus(t)), the logarithm of the step size (arXiv 2312.00752, section 3.6).

    Args:
        low, high: limits of the step size; 0 for none.
    """

    def evaluate(t: FloatArray) -> FloatArray:
        # log(log(1 + e^t)) -> t below; logaddexp itself would underflow there.
        log: FloatArray = np.where(t < -30, t, np.log(np.logaddexp(0.0, np.maximum(t, -30.0))))
        if low > 0:
            log = np.maximum(log, math.log(low))
        return np.minimum(log, math.log(high)) if high > 0 else log

    return Curve(evaluate)


@dataclass(frozen=True)
class TableFit:
    """A function as integers.

    Attributes:
        low: index of the first entry. values: the entries [entries].
        error: no real number of the range is further from its entry, as reals.
    """

    low: int
    values: IntArray
    error: float

    @property
    def high(self) -> int:
        """Index of the last entry."""
        return self.low + len(self.values) - 1


def _cells(low: int, high: int, index_frac: int) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Lower ends, middles and upper ends of the cells of low..high."""
    step = 2.0**-index_frac
    middle: FloatArray = np.arange(low, high + 1, dtype=np.float64) * step
    return middle - step / 2, middle, middle + step / 2


def _round(x: FloatArray) -> IntArray:
    rounded: IntArray = np.floor(x + 0.5).astype(np.int64)
    return rounded


def fit_table(curve: Curve, low: int, high: int, index_frac: int, frac: int, limit: int) -> TableFit:
    """The table of a function.

    Args:
        curve: the function.
        low, high: indices of the first and last entry. index_frac: binary places of an index.
        frac: binary places of the entries. limit: their largest magnitude; beyond it they saturate, which the
            error counts.

    Returns:
        The table and its error.
    """
    _, middle, _ = _cells(low, high, index_frac)
    values = np.clip(_round(curve.evaluate(middle) * 2.0**frac), -limit, limit)
    return TableFit(low, values, _error(curve, low, values, index_frac, frac))


def _error(curve: Curve, low: int, values: IntArray, index_frac: int, frac: int) -> float:
    """The largest distance between an entry and the function over the entry's cell."""
    below, _, above = _cells(low, low + len(values) - 1, index_frac)
    smallest, largest = curve.extremes(below, above)
    real = values * 2.0**-frac
    error = max(float((real - smallest).max()), float((largest - real).max()))
    return error + ROUNDING * max(1.0, float(np.abs(real).max()))


@dataclass(frozen=True)
class PiecewiseFit:
    """A function as straight lines: offset + sum_i slopes[i] max(x - knots[i], 0), rounded and saturated.

    Attributes:
        knots: indices, the first is the first of the range.
        slopes: what each adds to the slope, at ``slope_frac`` places. offset: at the first knot, likewise.
        slope_frac: binary places before the rounding.
        table: what it gives at every index, and its error.
    """

    knots: tuple[int, ...]
    slopes: tuple[int, ...]
    offset: int
    slope_frac: int
    table: TableFit


def fit_piecewise(
    curve: Curve, low: int, high: int, index_frac: int, frac: int, limit: int, pieces: int
) -> PiecewiseFit:
    """At most ``pieces`` straight lines between points of a function.

    The knots are those of the smallest tolerance at which longest pieces from the left suffice; that the
    lines and their roundings are near is not argued but computed, at every index.

    Args:
        pieces: at least 1. The others are :func:`fit_table`'s.
    """
    _, middle, _ = _cells(low, high, index_frac)
    exact = curve.evaluate(middle)
    coarse, fine = float(exact.max() - exact.min()) + ROUNDING, 0.0
    ends = [0, len(exact) - 1]
    for _ in range(24):
        tolerance = (coarse + fine) / 2
        found = _longest_pieces(exact, tolerance, pieces)
        if found is None:
            fine = tolerance
        else:
            coarse, ends = tolerance, found
    # A slope is off by half its unit, over a piece by less than half a unit of the result.
    slope_frac = frac + len(exact).bit_length()
    steep = [(exact[b] - exact[a]) / (b - a) if b > a else 0.0 for a, b in pairwise(ends)]
    whole = _round(np.array(steep) * 2.0**slope_frac)
    slopes = np.diff(whole, prepend=0)
    knots = np.array(ends[:-1], np.int64)
    offset = int(_round(exact[:1] * 2.0**slope_frac)[0])
    total = offset + (np.maximum(np.arange(len(exact))[:, None] - knots, 0) * slopes).sum(1)
    places = slope_frac - frac
    values = np.clip((total + (1 << places >> 1)) >> places, -limit, limit)
    table = TableFit(low, values, _error(curve, low, values, index_frac, frac))
    kept = [i for i, slope in enumerate(slopes) if slope or i == 0]
    return PiecewiseFit(
        tuple(int(knots[i]) + low for i in kept),
        tuple(int(slopes[i]) for i in kept),
        offset,
        slope_frac,
        table,
    )


def _longest_pieces(exact: FloatArray, tolerance: float, pieces: int) -> list[int] | None:
    """Ends of longest chords that leave no point further than the tolerance; None if they are too many."""
    ends, last = [0], len(exact) - 1
    while ends[-1] < last:
        if len(ends) > pieces:
            return None
        a = ends[-1]
        # Far chords may fit again where nearer ones do not: the furthest counts.
        for b in range(last, a, -1):
            chord = exact[a] + (exact[b] - exact[a]) / (b - a) * np.arange(b - a + 1)
            if b == a + 1 or float(np.abs(chord - exact[a : b + 1]).max()) <= tolerance:
                ends.append(b)
                break
    return ends if last else [0, 0]


@dataclass(frozen=True)
class DecayFit:
    """Decay and input gain of a state, as two tables of one index v = log(u), u = step size times -A.

    The recurrence h' = e^-u h + dt B x, dt = u / -A, becomes h' = a h + (1 - a) B x' with a = n / 2^k and
    x' = x g / -A: the gain g = u / (1 - a) makes up for what rounding did to a, so that the input keeps its
    weight however coarse the decay.

    Attributes:
        low: index of the first entry. decay: n [entries]. gain: g [entries], of ``gain_frac`` places.
        decay_error: no real u of the range has e^-u further from its n / 2^k.
        step_error: nor (1 - n / 2^k) g relatively further from u itself.
    """

    low: int
    decay: IntArray
    gain: IntArray
    gain_frac: int
    decay_error: float
    step_error: float

    @property
    def high(self) -> int:
        """Index of the last entry."""
        return self.low + len(self.decay) - 1


def fit_decay(
    low: int, high: int, index_frac: int, decay_bits: int, gain_bits: int, stepless: bool = False
) -> DecayFit:
    """The tables of decay and gain.

    Args:
        low, high: indices of the first and last entry. index_frac: binary places of v.
        decay_bits: k. gain_bits: bits of the largest gain.
        stepless: the recurrence is h' = e^-u h + B x, without a step size at x: then g = 1 / (1 - a), and
            ``step_error`` is that of (1 - n / 2^k) g from one.
    """
    below, middle, above = _cells(low, high, index_frac)
    one = 1 << decay_bits
    u = np.exp(middle)
    n = np.clip(_round(np.exp(-u) * one), 0, one - 1)
    enters = 1 - n / one
    exact = (1.0 if stepless else u) / enters
    gain_frac = math.floor(math.log2(((1 << gain_bits) - 1) / float(exact.max())))
    gain = _round(exact * 2.0**gain_frac)
    # Both e^-e^v and e^v are monotone.
    decay_error = float(np.abs(np.exp(-np.exp(np.stack([below, above]))) - n / one).max())
    entered = enters * gain * 2.0**-gain_frac
    steps = np.ones((2, 1)) if stepless else np.exp(np.stack([below, above]))
    step_error = float(np.abs(entered / steps - 1).max())
    return DecayFit(low, n, gain, gain_frac, decay_error + ROUNDING, step_error + ROUNDING)
