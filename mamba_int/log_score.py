"""The log-score of tokens in integers: the logarithm of the probability that integer logits give them.

The probability is that of ``eval`` and ``generate``: the softmax of the real logits L_v = l_v 2^-f. So
ln p(v) = L_v - ln sum_w e^(L_w). The logarithm of the sum is *searched* instead of computed, on a grid of
2^-R nats (R = ``GRID_FRAC``, h = 2^-(R+1) half a step of it), so that neither the largest logit nor a table
of logarithms is needed:

    L_v = q_v 2^-R + y_v,  -h <= y_v < h                 the rounding shift, and its remainder
    W(d) = round(2^F e^(-d 2^-R))                        F = bits of the vocabulary + ``GUARD_BITS``
    S(r) = 2^f sum_v W(r - q_v) (1 + y_v)                an integer; falls as r rises; 2^(F+f) is 1
    r    = the smallest integer with S(r) <= T           T = 2^(F+f) e^h, rounded to 16 bits
    ln sum_w e^(L_w) ~ r 2^-R + S(r) 2^-(F+f) - 1        so S(r) 2^-(F+f) is within a step of 1

(For f < R the logits are first multiplied by 2^(R-f), and y_v is 0.) The score of a token is L_v less that,
in units of 2^-score_frac nats, score_frac = F + f: an exact integer, and so is that of a text, their sum.

**Error.** Let s = S(r) 2^-(F+f) and e = (1 + h) V 2^-(F+1), the most that V roundings of W amount to.

- s <= t with t = T 2^-(F+f), and, as r - 1 is too small, s >= s0 = e^(-2h) (t - e (1 + e^(2h))).
- For s - 1 in place of ln s: 0 <= g(s) <= max(g(t), g(s0)) with g(s) = s - 1 - ln s, convex with g(1) = 0.
- For the roundings: |ln(s + e') - ln s| <= e / (s0 - e) for every |e'| <= e.
- For 1 + y in place of e^y, term by term, hence of the sum: 0 <= y - ln(1 + y) <= h^2 / (2 (1 - h)).

The second and the last are of opposite sign, each with a mean near h^2 / 6, so they all but cancel over a
text. In all, a score is within ``error`` < 2^-12 nats (0.00035 bits) of the logarithm of the softmax,
whatever the vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from decimal import ROUND_HALF_EVEN, Context, Decimal
from functools import cached_property

import numpy as np

from mamba_int.errors import MambaintError
from mamba_int.graph import Graph, IntArray
from mamba_int.operations.base import rounding_shift

GRID_FRAC = 5
"""R: binary places of the grid on which the logarithm of the sum is searched."""
GUARD_BITS = 13
"""F less the bits of the vocabulary: V roundings of 2^-(F+1) stay below 2^-14."""
THRESHOLD_BITS = 15
"""Binary places of e^h as it is rounded for T."""
MOST_BITS = 60
"""Of any integer here, so that int64 holds its sums."""
ERROR = 2.0**-12
"""Nats by which a token's score differs from the softmax's logarithm at most; see :attr:`LogScore.error`."""


@dataclass(frozen=True)
class LogScore:
    """How the tokens of one model are scored.

    Attributes:
        vocabulary: V, entries of the logits.
        frac: f, binary places of the logits.
    """

    vocabulary: int
    frac: int

    @staticmethod
    def of(graph: Graph) -> LogScore:
        """For the logits of a language model.

        Raises:
            MambaintError: if their scores might not fit int64.
        """
        logits = graph.types[graph.output]
        score = LogScore(logits.shape[-1], graph.by_name[graph.output].frac)
        widest = max(
            score.vocabulary_bits + score.score_frac,
            (4 * logits.magnitude).bit_length() + score.score_frac - score.frac,
        )
        if widest > MOST_BITS:
            raise MambaintError(
                f"scores of {score.vocabulary} logits of {score.frac} binary places may take {widest} bits",
                "quantize with coarser logits",
            )
        return score

    @property
    def vocabulary_bits(self) -> int:
        """Bits of a token."""
        return (self.vocabulary - 1).bit_length()

    @property
    def places(self) -> int:
        """f - R: bits of a logit below the grid; not positive where the grid is as fine."""
        return self.frac - GRID_FRAC

    @property
    def weight_frac(self) -> int:
        """F: binary places of the table."""
        return self.vocabulary_bits + GUARD_BITS

    @property
    def factor_frac(self) -> int:
        """Binary places of 1 + y."""
        return max(self.frac, GRID_FRAC)

    @property
    def score_frac(self) -> int:
        """Binary places of a score: it is this many times smaller than its integer, in nats."""
        return self.weight_frac + self.factor_frac

    @property
    def threshold(self) -> int:
        """T."""
        step = Decimal(2) ** -(GRID_FRAC + 1)
        return _rounded_exp(step, THRESHOLD_BITS) << (self.score_frac - THRESHOLD_BITS)

    @cached_property
    def weights(self) -> IntArray:
        """W(d) from the d that is one beyond the first with W(d) = 0, down to -2; int64."""
        found = []
        for d in range(-2, 1 << 30):
            found.append(_rounded_exp(-Decimal(d) / (1 << GRID_FRAC), self.weight_frac))
            if not found[-1]:
                break
        return np.array([0, *reversed(found)], np.int64)

    @property
    def last(self) -> int:
        """The d of the first of :attr:`weights`."""
        return len(self.weights) - 3

    def split(self, logits: IntArray) -> tuple[IntArray, IntArray]:
        """q and the remainder y 2^f of int64 logits [..., V]."""
        if self.places <= 0:
            return logits << -self.places, np.zeros_like(logits)
        q = rounding_shift(logits, self.places)
        return q, logits - (q << self.places)

    def sums(self, q: IntArray, rest: IntArray, r: IntArray) -> IntArray:
        """S(r) [n], for every r >= max q - 2.

        Args:
            q, rest: int64 [n, V], of :meth:`split`. r: int64 [n].
        """
        place = np.maximum(q + self.last - r[:, None], 0)
        total: IntArray = (self.weights[place] * ((1 << self.factor_frac) + rest)).sum(-1)
        return total

    def normaliser(self, logits: IntArray) -> tuple[IntArray, IntArray]:
        """r and S(r), int64 [n], of int64 logits [n, V]."""
        q, rest = self.split(logits)
        # S(max q - 2) has a term above T, and at the other end the sum is below e^(-4h) (1 + h) 2^(F+f).
        low = q.max(-1) - 2
        high = low + self.reach
        while (high - low > 1).any():
            middle = (low + high) >> 1
            fits = self.sums(q, rest, middle) <= self.threshold
            low, high = np.where(fits, low, middle), np.where(fits, middle, high)
        return high, self.sums(q, rest, high)

    @property
    def reach(self) -> int:
        """r is at most so much above max q - 2."""
        return math.ceil(math.log(self.vocabulary) * (1 << GRID_FRAC)) + 4

    def __call__(self, logits: IntArray, tokens: IntArray) -> IntArray:
        """Scores int64 [n], in units of 2^-score_frac nats, of the tokens [n] under logits [n, V].

        What ``ln softmax(logits 2^-frac)[token] 2^score_frac`` is, but for :data:`ERROR`.
        """
        r, total = self.normaliser(logits)
        chosen = np.take_along_axis(logits, tokens[:, None], -1)[:, 0]
        scores: IntArray = (
            (chosen << (self.score_frac - self.frac))
            - (r << (self.score_frac - GRID_FRAC))
            + ((1 << self.score_frac) - total)
        )
        return scores

    @property
    def error(self) -> float:
        """Nats by which a score differs from the logarithm of the softmax at most; derived above."""
        h, t = 2.0 ** -(GRID_FRAC + 1), self.threshold / 2.0**self.score_frac
        e = (1 + h) * self.vocabulary / 2.0 ** (self.weight_frac + 1)
        least = math.exp(-2 * h) * (t - e * (1 + math.exp(2 * h)))
        roundings = e / (least - e)
        linear = max(s - 1 - math.log(s) for s in (least, t))
        return max(linear, h * h / (2 * (1 - h))) + roundings


def bits(score: int, score_frac: int) -> float:
    """A score, or a sum of some, in bits."""
    return score / (1 << score_frac) / math.log(2)


_EXACT = Context(prec=50)


def _rounded_exp(x: Decimal, frac: int) -> int:
    """round(2^frac e^x), the same on every machine."""
    product = _EXACT.multiply(_EXACT.exp(x), Decimal(1 << frac))
    return int(product.to_integral_value(ROUND_HALF_EVEN))
