"""Tables of real functions on integer indices, each with a proven bound of its error.

An index i of ``index_frac`` places stands for the reals of its cell [(i - 1/2) 2^-f, (i + 1/2) 2^-f], which
the rounding shift maps to it. A function that is monotone between known turning points takes its extremes
over a cell at the ends of the cell and at the turning points inside: the largest distance of an entry from
these bounds the error at every real number of the table's range, the rounding of the index included.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mamba_int.graph import IntArray

FloatArray = NDArray[np.float64]
ROUNDING = 2.0**-40
"""Added to bounds, for the rounding of float64 in the functions themselves; relative beyond 1."""


LAWSON_STEPS = 40
SMALL_STEP = 2.0**-6
"""Errors of smaller steps, times -A, count as if they were this large: little of them enters."""


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

    def saturated(self, bound: float) -> Curve:
        """The function kept within +-bound: monotone where it was."""
        return Curve(lambda x: np.clip(self.evaluate(x), -bound, bound), self.turning_points)

    def error(self, table: TableFit, index_frac: int, frac: int, scale: FloatArray | float = 1.0) -> float:
        """The largest distance between an entry and the function over the entry's cell.

        Args:
            table: entries of ``frac`` binary places. index_frac: binary places of an index.
            scale: of every entry: distances are shares of it.
        """
        below, _, above = _cells(table.low, table.high, index_frac)
        smallest, largest = self.extremes(below, above)
        real = table.values * 2.0**-frac
        error = max(float(((real - smallest) / scale).max()), float(((largest - real) / scale).max()))
        return error + ROUNDING * max(1.0, float(np.abs(real / scale).max()))

    def sizes(self, low: int, high: int, index_frac: int, floor: float) -> FloatArray:
        """Its magnitude at the indices low..high, or ``floor`` if that is more."""
        _, middle, _ = _cells(low, high, index_frac)
        sizes: FloatArray = np.maximum(np.abs(self.evaluate(middle)), floor)
        return sizes


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


SIGMOID = Curve(lambda x: np.exp(-np.logaddexp(0.0, -x)))
"""1 / (1 + e^-x)."""
SOFTPLUS = Curve(lambda x: np.logaddexp(0.0, x))
"""log(1 + e^x)."""


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
        pieces: straight lines that it is made of; 0 for a table.
    """

    low: int
    values: IntArray
    error: float
    pieces: int = 0

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
    return _measured(curve, TableFit(low, values, 0.0), index_frac, frac)


def _measured(curve: Curve, table: TableFit, index_frac: int, frac: int) -> TableFit:
    return dataclasses.replace(table, error=curve.error(table, index_frac, frac))


@dataclass(frozen=True)
class Lines:
    """offset + sum_i slopes[i] max(x - knots[i], 0), at ``slope_frac`` binary places.

    Attributes:
        knots: indices, the first is the first of the range. slopes: what each adds to the slope.
    """

    knots: tuple[int, ...]
    slopes: tuple[int, ...]
    offset: int
    slope_frac: int

    def reach(self, low: int, high: int) -> int:
        """Magnitude that no sum of lines exceeds, in whatever order, for indices low..high."""
        tops = [max(high - knot, 0) for knot in self.knots]
        return abs(self.offset) + sum(abs(s) * top for s, top in zip(self.slopes, tops, strict=True))


@dataclass(frozen=True)
class PiecewiseFit(Lines):
    """A function as straight lines, which are rounded and saturated.

    Attributes:
        table: what they give at every index, and its error.
    """

    table: TableFit


def fit_piecewise(
    curve: Curve,
    low: int,
    high: int,
    index_frac: int,
    frac: int,
    limit: int,
    pieces: int,
    scale: FloatArray | None = None,
) -> PiecewiseFit:
    """At most ``pieces`` straight lines near a function.

    The knots are those of the smallest tolerance at which longest chords from the left suffice; the lines
    between them are nearest in the maximum norm. That lines and roundings are near is not argued but
    computed, at every index.

    Args:
        pieces: at least 1. scale: of every index: near as shares of it; of ones if None. The others are
            :func:`fit_table`'s.
    """
    _, middle, _ = _cells(low, high, index_frac)
    exact = curve.evaluate(middle)
    scale = np.ones(len(exact)) if scale is None else scale
    # A slope is off by half its unit, over a piece by less than half a unit of the result.
    slope_frac = frac + len(exact).bit_length()
    places = slope_frac - frac
    knots = _knots(exact, scale, pieces)
    offset, slopes, total = _lines(exact, scale, knots, slope_frac)
    values = np.clip((total + (1 << places >> 1)) >> places, -limit, limit)
    table = _measured(curve, TableFit(low, values, 0.0, len(knots)), index_frac, frac)
    return PiecewiseFit(
        tuple(int(knot) + low for knot in knots), tuple(slopes.tolist()), offset, slope_frac, table
    )


def _knots(exact: FloatArray, scale: FloatArray, pieces: int) -> IntArray:
    """Where at most so many chords begin whose largest distance, as a share of ``scale``, is least."""
    coarse, fine = float(((exact.max() - exact.min()) / scale).max()) + ROUNDING, 0.0
    ends = [0, len(exact) - 1]
    for _ in range(24):
        tolerance = (coarse + fine) / 2
        found = _longest_pieces(exact, scale * tolerance, pieces)
        if found is None:
            fine = tolerance
        else:
            coarse, ends = tolerance, found
    return np.array(ends[:-1], np.int64)


def _longest_pieces(exact: FloatArray, tolerance: FloatArray, pieces: int) -> list[int] | None:
    """Ends of long chords that leave no point further than the tolerance; None if they are too many."""

    def holds(a: int, b: int) -> bool:
        chord = exact[a] + (exact[b] - exact[a]) / (b - a) * np.arange(b - a + 1)
        return bool((np.abs(chord - exact[a : b + 1]) <= tolerance[a : b + 1]).all())

    ends, last = [0], len(exact) - 1
    while ends[-1] < last:
        if len(ends) > pieces:
            return None
        a = ends[-1]
        # By bisection: far chords may fit again where nearer ones do not, which costs a piece at most.
        near, far = a + 1, last
        while near < far:
            middle = (near + far + 1) // 2
            near, far = (middle, far) if holds(a, middle) else (near, middle - 1)
        ends.append(near)
    return ends if last else [0, 0]


def _lines(
    exact: FloatArray, scale: FloatArray, knots: IntArray, slope_frac: int
) -> tuple[int, IntArray, IntArray]:
    """Offset, slopes and sums at every index of the lines with these knots whose largest error, as a share of
    ``scale``, is least: Lawson's iteration of weighted least squares (Lawson 1961; Rice, The Approximation of
    Functions, volume 2, section 13-12).
    """
    above = np.maximum(np.arange(len(exact))[:, None] - knots, 0)
    basis = np.concatenate([np.ones((len(exact), 1)), above], 1) / scale[:, None]
    target, weights = exact / scale, np.ones(len(exact))
    best: FloatArray = np.zeros(basis.shape[1])
    least = math.inf
    for _ in range(LAWSON_STEPS):
        root = np.sqrt(weights)
        found = np.linalg.lstsq(basis * root[:, None], target * root, rcond=None)[0]
        errors = np.abs(basis @ found - target)
        if errors.max() < least:
            best, least = found.astype(np.float64), float(errors.max())
        if least <= ROUNDING:
            break
        weights = np.maximum(weights * errors, 1e-12)
        weights /= weights.sum()
    # Slopes are rounded as they are, not as what they add, so that errors do not add up.
    slopes = np.diff(_round(np.cumsum(best[1:]) * 2.0**slope_frac), prepend=0)
    offset = int(_round(best[:1] * 2.0**slope_frac)[0])
    return offset, slopes, offset + above @ slopes


@dataclass(frozen=True)
class DecayFit:
    """Decay and input gain of a state, as two tables of one index v = log(u), u = step size times -A.

    The recurrence h' = e^-u h + dt B x, dt = u / -A, becomes h' = a h + (1 - a) B x' with a = n / 2^k and
    x' = x g / -A: the gain g = u / (1 - a) makes up for what rounding did to a, so that the input keeps its
    weight however coarse the decay.

    Attributes:
        low: index of the first entry. decay: n [entries]. gain: g [entries], of ``gain_frac`` places.
        decay_error: no real u of the range has e^-u further from its n / 2^k.
        step_error: nor (1 - n / 2^k) g further from u itself, as a share of u, or of ``SMALL_STEP`` if u is
            less.
        pieces: straight lines that each is made of; 0 for tables.
    """

    low: int
    decay: IntArray
    gain: IntArray
    gain_frac: int
    decay_error: float
    step_error: float
    pieces: int = 0

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
    _, middle, _ = _cells(low, high, index_frac)
    one = 1 << decay_bits
    u = np.exp(middle)
    n = np.clip(_round(np.exp(-u) * one), 0, one - 1)
    exact = (1.0 if stepless else u) / (1 - n / one)
    gain_frac = _gain_frac(exact, gain_bits)
    gain = _round(exact * 2.0**gain_frac)
    return _decay_fit(low, index_frac, decay_bits, n, gain, gain_frac, stepless=stepless)


def _gain_frac(exact: FloatArray, gain_bits: int) -> int:
    return math.floor(math.log2(((1 << gain_bits) - 1) / float(exact.max())))


def _decay_fit(
    low: int,
    index_frac: int,
    decay_bits: int,
    n: IntArray,
    gain: IntArray,
    gain_frac: int,
    pieces: int = 0,
    stepless: bool = False,
) -> DecayFit:
    below, _, above = _cells(low, low + len(n) - 1, index_frac)
    decay = n * 2.0**-decay_bits
    ends = np.exp(np.stack([below, above]))
    # Both e^-e^v and e^v are monotone.
    decay_error = float(np.abs(np.exp(-ends) - decay).max())
    entered = (1 - decay) * gain * 2.0**-gain_frac
    steps = np.ones_like(ends) if stepless else ends
    step_error = float((np.abs(entered - steps) / np.maximum(steps, SMALL_STEP)).max())
    return DecayFit(low, n, gain, gain_frac, decay_error + ROUNDING, step_error + ROUNDING, pieces)


@dataclass(frozen=True)
class DecayLines:
    """Decay and gain as straight lines with the same knots.

    Attributes:
        decay, gain: lines, to be rounded to the places of the decay and of ``fit.gain_frac``, and kept within
            0..2^k - 1 and the bits of the gain.
        fit: what they give at every index, and their errors.
    """

    decay: Lines
    gain: Lines
    fit: DecayFit


def fit_decay_lines(
    low: int, high: int, index_frac: int, decay_bits: int, gain_bits: int, pieces: int
) -> DecayLines:
    """At most ``pieces`` lines for each, nearest in 1 - n / 2^k and in what it lets enter, as shares.

    Args:
        pieces: at least 1. The others are :func:`fit_decay`'s.
    """
    _, middle, _ = _cells(low, high, index_frac)
    one, u = 1 << decay_bits, np.exp(middle)
    enters = -np.expm1(-u)
    scale = np.maximum(enters, SMALL_STEP)
    knots = _knots(enters, scale, pieces)
    bits = len(u).bit_length()
    decay_frac = decay_bits + bits
    offset, slopes, total = _lines(enters, scale, knots, decay_frac)
    # a = 1 - w, line by line.
    decay_offset, decay_slopes = (1 << decay_frac) - offset, -slopes
    total = (1 << decay_frac) - total
    n = np.clip((total + (1 << bits >> 1)) >> bits, 0, one - 1)
    exact = u / (1 - n / one)
    gain_frac = _gain_frac(exact, gain_bits)
    scale = np.maximum(u, SMALL_STEP) / (1 - n / one)
    gain_offset, gain_slopes, total = _lines(exact, scale, knots, gain_frac + bits)
    gain = np.clip((total + (1 << bits >> 1)) >> bits, 0, (1 << gain_bits) - 1)
    places = tuple(int(knot) + low for knot in knots)
    return DecayLines(
        Lines(places, tuple(decay_slopes.tolist()), decay_offset, decay_frac),
        Lines(places, tuple(gain_slopes.tolist()), gain_offset, gain_frac + bits),
        _decay_fit(low, index_frac, decay_bits, n, gain, gain_frac, len(knots)),
    )
