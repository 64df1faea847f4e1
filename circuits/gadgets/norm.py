"""``norm``: a one-hot level made unique by two inequalities, then one shift per element."""

from __future__ import annotations

import numpy as np

from circuits.cells import Get, Ids, Values
from circuits.gadgets.choice import one_hot
from circuits.gadgets.values import Accumulation, Computed, Shifted, Summed, Value, nonnegative
from mamba_int.graph import Node, TensorType
from mamba_int.operations.base import shifted
from mamba_int.operations.norm import Norm


def squared_copy(source: Value, node: Node) -> Value:
    """xs = clamp(shift(x, input_shift), +-input_limit), or x itself where that changes nothing."""
    places, limit = node.integer("input_shift"), node.integer("input_limit")
    low, high = shifted(source.type.low, places), shifted(source.type.high, places)
    value = source
    if places:
        value = source.shifted(f"{node.name}.xs", TensorType(source.type.shape, low, high), places)
    if max(-low, high) <= limit:
        return value
    bounds = TensorType(source.type.shape, max(low, -limit), min(high, limit))
    return Computed(source.builder, f"{node.name}.xs_clamped", bounds, lambda: value.clamp(-limit, limit))


def norm(source: Value, node: Node, tensor: TensorType) -> Value:
    """Per step: S = sum xs^2; a one-hot e over the levels j that S can reach, see ``one_hot``;
    S - (lower bound of j) >= 0 and (upper bound of j) - S >= 0. The bounds of neighbouring j do not overlap,
    so e is unique. Then x * multipliers[j], selected by e, is shifted as any sum of products.
    """
    b, x = source.builder, source.cells()
    d, name = tensor.shape[-1], node.name
    xs_value = squared_copy(source, node)
    xs = xs_value.cells()
    most = d * max(xs_value.type.low**2, xs_value.type.high**2)
    thresholds = [t for t in Norm.thresholds(node, d) if t < most]
    choices = len(thresholds) + 1
    lows, highs = [0, *(t + 1 for t in thresholds)], [*thresholds, most]

    with b.part(name):
        S = b.dot("td,td->t", xs, xs, (0, most))

        def level(get: Get) -> Values:
            return sum(((get(S) > t).astype(np.int64) for t in thresholds), np.zeros(len(xs), np.int64))

        e = one_hot(b, name, len(xs), choices, level)
        columns = [e[:, j] for j in range(choices)]
        nonnegative(b, f"{name}.above", [(S, 1), *zip(columns, (-v for v in lows), strict=True)], 0, most)
        nonnegative(b, f"{name}.below", [(S, -1), *zip(columns, highs, strict=True)], 0, most)

    def scale(m: int) -> Ids:
        with b.part(name):
            multipliers = [m * multiplier for multiplier in Norm.multipliers(node)[:choices]]
            factor = b.dot("tk,k->t", e, b.constant(np.array(multipliers, dtype=object)), (0, multipliers[0]))
            return factor[None]

    product = Summed(
        b, f"{name}.scaled", tensor, lambda: Accumulation(x[None], scale, (0,), tensor.low, tensor.high)
    )
    return Shifted(product, name, tensor, Norm.places(node))
