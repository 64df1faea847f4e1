"""The index of the largest entry of every row; of equal ones, the first."""

from __future__ import annotations

import numpy as np

from circuits.cells import Cells, Get, Ids, Values
from circuits.gadgets.choice import one_hot
from circuits.gadgets.values import nonnegative


def argmax(b: Cells, name: str, x: Ids) -> Ids:
    """Cells [rows] with the index that ``numpy.argmax`` gives of bounded integers x [rows, choices].

    A one-hot row e points at an entry c = sum e x. With R_v = sum of e up to v, c - x_v - (1 - R_v) >= 0 for
    every v: entries after the one pointed at are at most c, entries before it at most c - 1. So it is the
    first of the largest, and the only one for which that holds.
    """
    rows, choices = x.shape
    low, high = b.bounds(x)

    def pick(get: Get) -> Values:
        found: Values = np.asarray(get(x)).argmax(-1)
        return found

    e = one_hot(b, name, rows, choices, pick)
    chosen = b.dot("tv,tv->t", e, x, (low, high))
    reached = [e[:, 0]]
    for v in range(1, choices):
        reached.append(b.add(reached[-1], e[:, v], (0, 1)))
    R = np.stack(reached, 1)
    terms = [(np.broadcast_to(chosen[:, None], x.shape), 1), (x, -1), (R, 1)]
    nonnegative(b, f"{name}.largest", terms, -1, high - low)
    index: Ids = b.dot("tv,v->t", e, b.constant(np.arange(choices)), (0, choices - 1))
    return index
