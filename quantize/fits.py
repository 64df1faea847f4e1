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


ACTIVATIONS: dict[str, Curve] = {
    # Zeros of the derivatives.
    "silu": Curve(_silu, (-1.2784645427610738,)),
    "gelu": Curve(_gelu, (-0.7517915246935645,)),
    "relu": Curve(lambda x: np.maximum(x, 0.0)),
    "identity": Curve(lambda x: x),
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
    below, middle, above = _cells(low, high, index_frac)
    values = np.clip(_round(curve.evaluate(middle) * 2.0**frac), -limit, limit)
    smallest, largest = curve.extremes(below, above)
    real = values * 2.0**-frac
    error = max(float((real - smallest).max()), float((largest - real).max()))
    return TableFit(low, values, error + ROUNDING * max(1.0, float(np.abs(real).max())))


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


def fit_decay(low: int, high: int, index_frac: int, decay_bits: int, gain_bits: int) -> DecayFit:
    """The tables of decay and gain.

    Args:
        low, high: indices of the first and last entry. index_frac: binary places of v.
        decay_bits: k. gain_bits: bits of the largest gain.
    """
    below, middle, above = _cells(low, high, index_frac)
    one = 1 << decay_bits
    u = np.exp(middle)
    n = np.clip(_round(np.exp(-u) * one), 0, one - 1)
    enters = 1 - n / one
    exact = u / enters
    gain_frac = math.floor(math.log2(((1 << gain_bits) - 1) / float(exact.max())))
    gain = _round(exact * 2.0**gain_frac)
    # Both e^-e^v and e^v are monotone.
    decay_error = float(np.abs(np.exp(-np.exp(np.stack([below, above]))) - n / one).max())
    entered = enters * gain * 2.0**-gain_frac
    step_error = float(np.abs(entered / np.exp(np.stack([below, above])) - 1).max())
    return DecayFit(low, n, gain, gain_frac, decay_error + ROUNDING, step_error + ROUNDING)
