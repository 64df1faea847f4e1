"""The Cayley transform of quaternions as integers: one exact quotient for each component.

With u = z / 2 = -A + b, A >= 0 and b imaginary, and N = A + A^2 + |b|^2
(``triton_kernels.quaternion.cayley``)::

    q = (1 + u) (1 - u)^-1 = 1 - 2 (N - b) / (1 + A + N)

A and b are integers of F places, so that N is exact at 2 F. At k places of q and d of the divisor, with
N' = N and b' = b at k + 1 + d places, and D' = 1 + A + N at d places, rounded up::

    re = K - round(N' / D')        im = round(b' / D')        K = 2^k - m

**|q| <= 2^k for every A >= 0 and b**, whatever was rounded. D' is at least 2^k / K times the true divisor, so
that without the last rounding (re, im) = K - w K (1 - q) with 0 <= w <= 1: a mean of K q and K, neither of
which is longer than K. The rounding adds at most 1/2, and that of N' and of D' / 2 a 100th, to each
component: a vector shorter than m, or, where q is real, less than what could pass 2^k = K. So the integers
turn states and never amplify them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from quantize.graph_builder import exceeded
from quantize.pieces import Pieces

MARGINS = {1: 0, 2: 1, 4: 2}
"""m for so many components of q."""
LEAST_DIVISOR_PLACES = 7


@dataclass(frozen=True)
class CayleyFit:
    """Binary places of a Cayley transform.

    Attributes:
        u_frac: F. q_bits: k. divisor_places: d. A_limit, b_limit: u saturates there.
    """

    u_frac: int
    q_bits: int
    divisor_places: int
    A_limit: int
    b_limit: int


def fit_cayley(name: str, A: float, b: float, components: int, q_bits: int, max_bits: int) -> CayleyFit:
    """The finest places that fit a budget.

    Args:
        name: of the node. A, b: largest magnitudes of z / 2 that were seen, real and of each imaginary
            component; a quarter more still fits. components: of q. q_bits: most k; a divisor of too few
            places lowers it. max_bits: no intermediate exceeds 2**max_bits.

    Raises:
        MambaintError: if there are none.
    """
    room = max_bits - 1
    A, b = max(1.25 * A, 2.0**-8), 1.25 * b
    largest = (1 + A) ** 2 + (components - 1) * b * b
    # Half a divisor is added to the numerators.
    places = math.floor(room - 1 - math.log2(1.5 * max(largest, 2 * b)))
    q_bits = min(q_bits, places - LEAST_DIVISOR_PLACES)
    if q_bits < 1:
        raise exceeded(name, "div", math.ceil(largest * 2.0 ** (2 + LEAST_DIVISOR_PLACES)), max_bits)
    u_frac = min(math.floor((room - math.log2(largest)) / 2), places)
    A_limit, b_limit = (max(1, math.ceil(value * 2.0**u_frac)) for value in (A, b))
    return CayleyFit(u_frac, q_bits, places - q_bits, A_limit, b_limit)


def cayley(p: Pieces, name: str, A: str, b: list[str], fit: CayleyFit) -> str:
    """q, components in planes.

    Args:
        p: the graph so far. name: of the result.
        A: node of A, [T, K], at ``fit.u_frac`` places within 0..A_limit. b: nodes of b, as many as are not
            zero. fit: its places.
    """
    g, one, m = p.graph, 1 << fit.q_bits, MARGINS[1 + len(b)]
    F, d, fine = fit.u_frac, fit.divisor_places, fit.q_bits + 1 + fit.divisor_places
    squares = [g.add(f"{name}_square{i}", "mul", part, part, frac=2 * F) for i, part in enumerate([A, *b])]
    total = squares[0]
    for i, square in enumerate(squares[1:]):
        total = g.add(f"{name}_squares{i}", "add", total, square, frac=2 * F)
    wide = g.shift(f"{name}_A", A, 2 * F)
    N = g.add(f"{name}_N", "add", total, wide, frac=2 * F)
    divisor = g.add(f"{name}_divisor_wide", "add", N, wide, frac=2 * F)
    divisor = g.shift(f"{name}_divisor_rounded", divisor, d)
    # Half a unit that rounding may have taken, and the share that leaves the margin.
    up = 1 + math.ceil((g.types[divisor].high + (1 << d)) * m / (one - m))
    divisor = g.add(f"{name}_divisor_half", "add", divisor, frac=d, constants={"value": (1 << d) + up})
    half = g.shift(f"{name}_half", divisor, d - 1)

    def quotient(part: str, source: str) -> str:
        """2^(k + 1) source / divisor, rounded."""
        raised = g.shift(f"{name}_{part}_wide", source, fine)
        raised = g.add(f"{name}_{part}_half", "add", raised, half, frac=fine)
        return g.add(f"{name}_{part}", "div", raised, divisor, frac=fit.q_bits)

    lost = g.add(f"{name}_minus", "mul", quotient("lost", N), frac=fit.q_bits, constants={"value": -1})
    real = g.add(f"{name}_real", "add", lost, frac=fit.q_bits, constants={"value": one - m})
    # No value is beyond: this only says so.
    if not b:
        return g.saturate(name, real, -one, one)
    parts = [real, *(quotient(f"turn{i}", part) for i, part in enumerate(b))]
    parts = [g.saturate(f"{part}_bounded", part, -one, one) for part in parts]
    return g.add(name, "concat", *parts, frac=fit.q_bits)
