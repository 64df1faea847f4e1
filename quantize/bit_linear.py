"""Ternary matrices as integers: the signs exactly, and their scale as a multiplier of whole numbers.

The activations of eight bits have a scale for every step in the float model. Here it is one power of two,
found from calibration data, as for all other matrices.
"""

from __future__ import annotations

import math

import numpy as np

from mamba_int.errors import MambaintError
from mamba_int.float_models.bit_linear import BitLinear, ternary
from quantize.parameters import array
from quantize.pieces import Pieces
from quantize.scales import rounded

MULTIPLIER_BITS = 12
LEAST_MULTIPLIER_BITS = 6


def bit_linear(
    p: Pieces, name: str, source: str, linear: BitLinear, gain: float = 1.0, rows: int | None = None
) -> str:
    """gain (W_q x) s.

    Args:
        p: the graph so far. name: of the result. source: x.
        linear: the matrix. gain: what the result is multiplied with besides.
        rows: how many outputs are wanted; all if not given.

    Raises:
        MambaintError: if the budget of bits leaves the scale too few.
    """
    b = p.graph
    signs, mean = ternary(linear.weight.detach().double())
    product = b.add(
        f"{name}_signs", "linear", source, frac=b.frac[source], constants={"weight": array(signs)[:rows]}
    )
    scale = float(mean) * gain
    if scale == 0:
        return b.add(name, "mul", product, frac=b.frac[product], constants={"value": 0})
    bits = min(b.max_bits - 1 - b.types[product].magnitude.bit_length(), MULTIPLIER_BITS)
    if bits < LEAST_MULTIPLIER_BITS:
        raise MambaintError(
            f"'{name}' sums {linear.in_features} activations and has {max(bits, 0)} bits left for its scale",
            "lower activation_bits, or raise max_bits",
        )
    places = math.floor(math.log2(((1 << bits) - 1) / abs(scale)))
    multiplier = rounded(np.array(scale), places)
    return b.add(name, "mul", product, frac=b.frac[product] + places, constants={"value": multiplier})
