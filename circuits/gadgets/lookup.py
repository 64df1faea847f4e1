"""Looking many integers up in one table of constants, by a claim about fractions at a random point.

A one-hot row for every element costs three cells for every entry of the table. Here an element costs seven
and a half, and an entry eight, however many the others are.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from circuits.cells import Cells, Get, Ids, Values, float_parts


def look_up(b: Cells, name: str, x: Ids, entries: Sequence[int]) -> Ids:
    """Cells [n] with ``entries[x]`` of bounded integers x [n], which it proves to be 0 to len(entries) - 1.

    The answers v are private. With two challenges beta and gamma the claim is (Haböck 2022, "Multivariate
    lookups based on logarithmic derivatives", eprint 2022/1530)

        sum_i 1 / (beta - x_i - gamma v_i) = sum_j m_j / (beta - j - gamma entries_j)

    with private multiplicities m. As rational functions in beta and gamma both sides have a pole for each of
    the distinct pairs; the residue at a pair of the left is how often it occurs there, fewer times than the
    field has elements, hence not zero. So every pair (x_i, v_i) of field elements is one of (j, entries_j),
    and no lookup of v is needed; for a given x there is one v, and m is how often each is read.

    Both sides are added up as fractions, pair by pair (Papini & Haböck 2023, eprint 2023/1284), without
    inverses: none could be committed to before the challenges are known. What is claimed is
    n_left d_right = n_right d_left, polynomials of a degree below D = n + len(entries) in each of beta and
    gamma; so gamma = alpha and beta = alpha^(2^s), 2^s >= D, make them one polynomial in alpha, different
    ones different polynomials, of a degree below 2^(2 s + 1).
    """
    values = np.array(entries, dtype=object)
    places = np.arange(len(values))

    def answers(get: Get) -> Values:
        found: Values = values[_inside(get(x), len(values))]
        return found

    def counts(get: Get) -> Values:
        found: Values = np.bincount(_inside(get(x), len(values)), minlength=len(values))
        return found

    v = b.private(f"{name}.looked_up", x.shape, int(values.min()), int(values.max()), answers)
    m = b.private(f"{name}.multiplicities", places.shape, 0, x.size, counts)
    gamma = b.power(1)
    beta = b.power(1 << (x.size + len(values) - 1).bit_length())
    keys = b.sub(beta, b.add(x, b.mul(v, gamma)))

    # beta - j - gamma entries_j, every constant being one that float32 holds.
    parts = [-part for part in float_parts(values)]
    columns = np.stack([np.ones(len(values), dtype=object), -places.astype(object), *parts], 1)
    powers = np.concatenate([beta, b.constant([1]), *[gamma] * len(parts)])
    table = b.dot("k,jk->j", powers, b.constant(columns))

    (above, below), (table_above, table_below) = _fractions(b, None, keys), _fractions(b, m, table)
    crossed = b.mul(np.concatenate([above, table_above]), np.concatenate([table_below, below]))
    b.claim([(crossed[:1], 1), (crossed[1:], -1)])
    return v


def _inside(x: Values, count: int) -> Values:
    """Places in a table, of a liar's x too."""
    clipped: Values = np.clip(x, 0, count - 1).astype(np.int64)
    return clipped


def _fractions(b: Cells, numerators: Ids | None, denominators: Ids) -> tuple[Ids, Ids]:
    """Numerator and denominator [1] of a sum of fractions of random cells; of 1 over each by default.

    a / b + c / d = (a d + c b) / (b d), two halves of the list at a time.
    """
    while len(denominators) > 1:
        half = len(denominators) // 2
        one, other = denominators[:half], denominators[half : 2 * half]
        rest = denominators[2 * half :]
        if numerators is None:
            above = b.add(one, other)
            left_over = b.constant([1])[: len(rest)]
        else:
            above = b.dot(
                "ki,ki->i", np.stack([numerators[:half], numerators[half : 2 * half]]), np.stack([other, one])
            )
            left_over = numerators[2 * half :]
        denominators = np.concatenate([b.mul(one, other), rest])
        numerators = np.concatenate([above, left_over])
    return b.constant([1]) if numerators is None else numerators, denominators
