"""The log-score of one entry of every row of logits, in the notation of :mod:`mamba_int.log_score`."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from circuits.cells import Cells, CircuitTooNarrow, Get, Ids, Values
from circuits.gadgets.lookup import look_up
from mamba_int.log_score import GRID_FRAC, LogScore


def log_score(b: Cells, name: str, score: LogScore, logits: Ids, hot: Ids) -> Ids:
    """Scores [T], in units of 2^-score_frac nats, of what one-hot rows ``hot`` point at.

    r is private. For a given r, q and the remainder of every logit are those of a rounding shift; q is proven
    an integer by the relu of q + last - r, which is also its place in the table: whatever is below the table
    has the weight 0 of its first entry. W(r - q) and W(r - 1 - q) are looked up as one number
    W + 2^w W', so that one sum of products with 1 + y gives S(r) + 2^w S(r - 1), and

        sum = (T - t) + 2^w (T + 1 + p)  with t, p >= 0

    splits it: both halves are shorter than w bits, so T - t is S(r) and T + 1 + p is S(r - 1), and r is the
    one integer with S(r) <= T < S(r - 1), S falling as r rises.

    Args:
        b: a graph with a challenge.
        name: of the private cells.
        score: the specification.
        logits: bounded integers [T, V]. hot: [T, V], proven rows with a single 1.
    """
    k, (steps, choices) = b.window, logits.shape
    low, high = b.bounds(logits)
    q_low, q_high = (int(score.split(np.array([end]))[0][0]) for end in (low, high))
    r_low, r_high = q_low - 2, q_high - 2 + score.reach

    def normaliser(get: Get) -> Values:
        found: Values = score.normaliser(_int64(get(logits)))[0]
        return found

    r = b.check(b.private(f"{name}.normaliser", (steps,), r_low, r_high, normaliser))
    q, factors, m = _split(b, name, score, logits)
    places = b.relu(b.add(q, b.sub(b.constant([score.last]), r)[:, None]))

    weights = [int(weight) for weight in score.weights]
    limb_bits = k - 2
    # T - S(r) and S(r - 1) - T are below T (e^(2h) - 1) and some roundings, less than 2^-4 of 1.
    limbs = -(-(score.score_frac - GRID_FRAC + 1) // limb_bits)
    # Of S: every weight that can be looked up is below 2^(F+1); of what t can reach: a limb is below 2^(k-1).
    w = max(score.vocabulary_bits + score.score_frac + 2, limbs * limb_bits + 2) + 1
    pairs = [one + (other << w) for one, other in pairwise(weights)]
    looked_up = look_up(b, f"{name}.weights", places.ravel(), pairs).reshape(places.shape)
    most = choices * max(pairs) * b.bounds(factors)[1]
    sums = b.dot("tv,tv->t", looked_up, factors, (0, most))

    def excess(get: Get, which: int) -> Values:
        """t, or p, of the honest r."""
        q_value, rest = score.split(_int64(get(logits)))
        # A liar's r may lie beyond the table.
        total = score.sums(q_value, rest, np.maximum(_int64(get(r)) - which, q_value.max(-1) - 2))
        difference: Values = total - score.threshold - 1 if which else score.threshold - total
        return np.maximum(difference, 0)

    def limbs_of(which: int) -> list[Ids]:
        found = []
        for i in range(limbs):

            def limb(get: Get, place: int = i * limb_bits) -> Values:
                part: Values = (excess(get, which) >> place) & ((1 << limb_bits) - 1)
                return part

            letter = "tp"[which]
            private = b.private(f"{name}.{letter}{i}", (steps,), 0, (1 << limb_bits) - 1, limb)
            found.append(b.relu(private))
        return found

    t, p = limbs_of(0), limbs_of(1)
    weigh = b.powers(steps)
    terms = [(sums, 1), *((ids, m << (i * limb_bits)) for i, ids in enumerate(t))]
    terms += [(ids, -m << (w + i * limb_bits)) for i, ids in enumerate(p)]
    parts = [(b.dot("at,t->a", ids[None], weigh), coefficient) for ids, coefficient in terms]
    b.claim([*parts, (b.total_weight(weigh), -m * (score.threshold + ((score.threshold + 1) << w)))])

    chosen = b.dot("tv,tv->t", hot, logits, (low, high))
    to_logit, to_r = score.score_frac - score.frac, score.score_frac - GRID_FRAC
    constant = (1 << score.score_frac) - score.threshold
    ones = np.broadcast_to(b.constant([1]), chosen.shape)
    columns = [chosen, r, *t, ones]
    coefficients = [1 << to_logit, -(1 << to_r), *(1 << (i * limb_bits) for i in range(limbs)), constant]
    bounds = (
        (low << to_logit) - (r_high << to_r) + constant,
        (high << to_logit) - (r_low << to_r) + constant + (1 << (limbs * limb_bits + 2)),
    )
    scores: Ids = b.dot("kt,k->t", np.stack(columns), b.constant(np.array(coefficients, object)), bounds)
    return scores


def _split(b: Cells, name: str, score: LogScore, logits: Ids) -> tuple[Ids, Ids, int]:
    """q, not yet looked up, m (2^f + the remainder), and m."""
    one = 1 << score.factor_frac
    if score.places <= 0:
        q = b.mul(logits, b.constant([1 << -score.places]))
        return q, np.broadcast_to(b.constant([one]), logits.shape), 1
    a = score.places
    if a > b.window - 4:
        raise CircuitTooNarrow(f"{name} (a shift by {a})", 1 << (a + 3))
    m, (low, high) = b.scale(a), (int(score.split(np.array([end]))[0][0]) for end in b.bounds(logits))
    q = b.private(f"{name}.q", logits.shape, low, high, lambda get: score.split(_int64(get(logits)))[0])
    window = m << (a - 1)
    operands, coefficients = np.stack([logits, q]), b.constant(np.array([m, -(m << a)], dtype=object))
    rho = b.check(b.dot("ktv,k->tv", operands, coefficients, (-window, window - m)))
    return q, b.add(rho, b.constant([m * one])), m


def _int64(values: Values) -> Values:
    """Of cells that are bounded in every honest witness; a liar's may be larger, and get what they get."""
    limit = 1 << 40
    clipped: Values = np.clip(values, -limit, limit).astype(np.int64)
    return clipped
