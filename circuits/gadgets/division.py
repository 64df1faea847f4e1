"""``isqrt`` and ``div``: the answer is private, two inequalities make it unique."""

from __future__ import annotations

from math import isqrt as root_of

import numpy as np

from circuits.cells import Ids, Values
from circuits.gadgets.values import Value, check_range, nonnegative
from mamba_int.graph import TensorType


def isqrt(source: Value, name: str, tensor: TensorType) -> Ids:
    """r with r >= 0, x - r^2 >= 0 and r^2 + 2 r - x >= 0: at most one r fits a given x."""
    b, x = source.builder, source.cells()

    r = b.private(f"{name}.root", x.shape, tensor.low, tensor.high, lambda get: _roots(get(x)))
    check_range(b, r, 0, b.high)
    square = b.mul(r, r)
    slack = 2 * tensor.high + 1
    nonnegative(b, f"{name}.above", [(x, 1), (square, -1)], 0, slack)
    nonnegative(b, f"{name}.below", [(square, 1), (r, 2), (x, -1)], 0, slack)
    return r


def _roots(x: Values) -> Values:
    roots: Values = np.vectorize(lambda v: root_of(int(v)) if v >= 0 else 0, otypes=[np.int64])(x)
    return roots


def div(x_value: Value, d_value: Value, name: str, tensor: TensorType) -> Ids:
    """q with r = x - q d, r >= 0 and d - 1 - r >= 0, for d >= 1: the floor of x / d and no other."""
    b, x, d = x_value.builder, x_value.cells(), d_value.cells()
    q = b.private(f"{name}.quotient", x.shape, tensor.low, tensor.high, lambda get: get(x) // get(d))
    b.check(q)
    product = b.mul(q, d)
    slack = d_value.type.high
    nonnegative(b, f"{name}.remainder", [(x, 1), (product, -1)], 0, slack)
    nonnegative(b, f"{name}.room", [(d, 1), (product, 1), (x, -1)], -1, slack)
    return q
