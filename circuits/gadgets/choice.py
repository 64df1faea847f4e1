"""``compare``, ``select`` and ``table``: bits, and the one-hot rows that choose among constants."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from circuits.cells import Cells, Get, Ids, Values
from circuits.gadgets.values import LETTERS, Value, nonnegative
from mamba_int.graph import IntArray, TensorType


def one_hot(b: Cells, name: str, rows: int, choices: int, pick: Callable[[Get], Values]) -> Ids:
    """Cells [rows, choices], a single 1 among zeros in every row; ``pick`` gives the honest column [rows].

    Each is the relu of a looked-up cell, hence an integer >= 0, and 2^k (sum - 1) is in the table only if
    it is 0. Which column it is, the caller must prove.
    """

    def hot(get: Get) -> Values:
        honest: Values = (pick(get)[:, None] == np.arange(choices)).astype(np.int64)
        return honest

    e = b.relu(b.private(f"{name}.one_hot", (rows, choices), 0, 1, hot))
    window = 1 << b.window
    ones = np.broadcast_to(b.constant([1]), (rows, 1))
    excess = b.constant(np.array([window] * choices + [-window], dtype=object))
    b.check(b.dot("tk,k->t", np.concatenate([e, ones], 1), excess, (0, 0)))
    return e


def pointer(b: Cells, name: str, x: Ids, low: int, choices: int) -> Ids:
    """Cells [n, choices]: row i is 1 at x[i] - low, for bounded integers x [n], which it proves in range.

    2^k (sum_j (low + j) e_j - x) is in the table only if it is 0, and one e_j only is 1.
    """
    e = one_hot(b, name, len(x), choices, lambda get: get(x) - low)
    window = 1 << b.window
    index = b.constant(np.array([window * (low + j) for j in range(choices)] + [-window], dtype=object))
    b.check(b.dot("tk,k->t", np.concatenate([e, x[:, None]], 1), index, (0, 0)))
    return e


def pointed(source: Value, name: str) -> Ids:
    """Cells [elements, entries]: a row per element of a tensor that points at it, from its lowest value on.

    Made once: all that choose by one tensor share them.
    """
    low, high = source.type.low, source.type.high
    if source.pointer is None:
        source.pointer = pointer(source.builder, name, source.cells().ravel(), low, high - low + 1)
    return source.pointer


def bit(b: Cells, name: str, shape: tuple[int, ...], hint: Callable[[Get], Values]) -> Ids:
    """Private cells proven 0 or 1: by one check if it is tight, or by two lookups: g, hence an integer of the
    table, and -2^(k-1) g.

    The table starts at -2^(k-1) and ends below 2^(k-1): g < 0 and g > 1 both leave it.
    """
    g = b.check(b.private(name, shape, 0, 1, hint))
    if not b.proves(g, 0, 1):
        b.check(b.mul(g, b.constant([b.low])))
    return g


def compare(x: Value, y: Value | IntArray, name: str) -> Ids:
    """g = [D >= 0] for the bounded integer D = x - y.

    Where D and D + 1 fit the table, g = max(D + 1, 0) - max(D, 0): 1 for an integer D >= 0, 0 for one below.
    Five cells, none of them private: there is nothing to lie about.

    Beyond, and where a tight check makes that cheaper, g is a private bit and (2 g - 1) D - (1 - g) >= 0:
    for g = 1 that is D >= 0, for g = 0 it is -D - 1 >= 0, so just one of the two passes. Nothing wraps: D
    is within its proven bounds, g within 0..1.
    """
    b, ids = x.builder, x.cells()
    if isinstance(y, Value):
        difference = b.sub(ids, y.cells())
        low, high = x.type.low - y.type.high, x.type.high - y.type.low
    else:
        difference = b.sub(ids, b.constant(y))
        low, high = x.type.low - int(np.max(y)), x.type.high - int(np.min(y))
    least, most = b.bounds(difference)
    if b.fits(least, most + 1) and not b.tight:
        above = b.add(difference, b.constant([1])) if isinstance(y, Value) else b.sub(ids, b.constant(y - 1))
        return b.sub(b.relu(above), b.relu(difference))

    g = bit(b, f"{name}.bit", ids.shape, lambda get: (get(difference) >= 0).astype(np.int64))
    product = b.mul(g, difference, (min(low, 0), max(high, 0)))
    nonnegative(b, f"{name}.side", [(product, 2), (difference, -1), (g, 1)], -1, max(high, -low - 1))
    return g


def select(condition: Value, first: Value, second: Value, tensor: TensorType) -> Ids:
    """b + c (a - b), as c (a - b) + 1 b in one dot.

    c is the graph's condition for every witness, so 0 or 1 as the graph proves: no private cell is needed.
    """
    b, c, otherwise = condition.builder, condition.cells(), second.cells()
    left = np.stack([b.sub(first.cells(), otherwise), otherwise])
    right = np.stack([c, np.broadcast_to(b.constant([1]), c.shape)])
    letters = LETTERS[: c.ndim]
    return b.dot(f"k{letters},k{letters}->{letters}", left, right, (tensor.low, tensor.high))


def table(source: Value, name: str, tensor: TensorType, values: IntArray) -> Ids:
    """A one-hot row per element that points at it, times the ``values`` of ``source.type.low`` upwards."""
    b, rows = source.builder, pointed(source, name)
    found: Ids = b.dot("tk,k->t", rows, b.constant(values), (tensor.low, tensor.high))
    return found.reshape(source.type.shape)
