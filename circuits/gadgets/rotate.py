"""``rotate``: by a table of cosines and sines, or by three shears."""

from __future__ import annotations

import numpy as np

from circuits.cells import Ids
from circuits.gadgets.values import Accumulation, Combination, Computed, Summed, Value
from mamba_int.graph import Node, TensorType
from mamba_int.operations.base import shifted


def rotate(source: Value, node: Node, tensor: TensorType) -> Value:
    """Table: every element is the shift of a dot of two with constants. Steps that turn nothing are free."""
    frac = node.integer("constant_frac")
    rows = np.arange(tensor.shape[0]) % node.integer("period")
    constants = {key: np.asarray(value)[rows] for key, value in node.constants.items()}
    emit = _table if node.attributes["form"] == "table" else _shear
    return Computed(
        source.builder, node.name, tensor, lambda: emit(source, node.name, tensor, constants, frac)
    )


def _table(source: Value, name: str, tensor: TensorType, constants: dict[str, np.ndarray], frac: int) -> Ids:
    b, x = source.builder, source.cells()
    half = x.shape[1] // 2
    cos, sin = constants["cos"], constants["sin"]
    still = ((cos == 1 << frac) & (sin == 0)).all(1)
    turned = x[~still]
    if not len(turned):
        return x
    v1, v2, c, s = turned[:, :half], turned[:, half:], cos[~still], sin[~still]
    left = np.stack([np.concatenate([v1, v1], 1), np.concatenate([v2, v2], 1)])
    right = np.stack([np.concatenate([c, s], 1), np.concatenate([-s, c], 1)]).astype(object)
    shape = (len(turned), 2 * half)
    bounds = TensorType(shape, tensor.low << frac, tensor.high << frac)
    total = Summed(
        b,
        f"{name}.turned",
        bounds,
        lambda: Accumulation(left, lambda m: b.constant(right * m), (0, 1), bounds.low, bounds.high),
    )
    result = x.copy()
    result[~still] = total.shifted(name, TensorType(shape, tensor.low, tensor.high), frac).cells()
    return result


def _shear(source: Value, name: str, tensor: TensorType, constants: dict[str, np.ndarray], frac: int) -> Ids:
    """v1 += shift(lam v2), v2 += shift(gam v1), v1 += shift(lam v2), then the sign."""
    b, x = source.builder, source.cells()
    half = x.shape[1] // 2
    v1, v2 = x[:, :half], x[:, half:]
    most = source.type.magnitude
    reach = most + shifted(int(np.abs(constants["lam"]).max()) * most, frac)

    def step(target: Ids, by: Ids, factor: np.ndarray, index: int, most: int, reach: int) -> Ids:
        """target + shift(factor by), for |by| <= most, whose result is at most ``reach``."""
        bound = shifted(int(np.abs(factor).max()) * most, frac)
        product = Summed(
            b,
            f"{name}.product{index}",
            TensorType(by.shape, -(bound << frac), bound << frac),
            lambda: Accumulation(
                by[None],
                lambda m: b.constant(factor.astype(object)[None] * m),
                (0, 1),
                -(bound << frac),
                bound << frac,
            ),
        )
        moved = product.shifted(f"{name}.shear{index}", TensorType(by.shape, -bound, bound), frac)
        total = TensorType(by.shape, -reach, reach)
        return Combination(b, f"{name}.sum{index}", total, lambda: [(target, 1), (moved.cells(), 1)]).cells()

    # The second and the third step give the two halves of the result, up to sign.
    v1 = step(v1, v2, constants["lam"], 0, most, reach)
    v2 = step(v2, v1, constants["gam"], 1, reach, tensor.magnitude)
    v1 = step(v1, v2, constants["lam"], 2, tensor.magnitude, tensor.magnitude)
    result = np.concatenate([v1, v2], 1)
    sign = np.concatenate([constants["sign"], constants["sign"]], 1)
    if (sign < 0).any():
        result = result.copy()
        result[sign < 0] = b.mul(result[sign < 0], b.constant([-1]))
    return result
