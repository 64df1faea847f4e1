"""Shifts of the integer scan: the finest at which it provably stays inside the bit budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from mamba_int.errors import MambaintError
from mamba_int.graph import IntArray, Node, TensorType
from mamba_int.operations import OPERATIONS
from mamba_int.operations.ssd import node_bounds
from quantize.graph_builder import LOWER, located
from quantize.scales import largest_integer

LEAST_BITS = 4
"""Of C . B: fewer say nothing."""
A_U_BITS = 12
"""Binary places, at most, of the decay that meets a state."""


@dataclass(frozen=True)
class ScanFit:
    """Everything of an ``ssd`` node but its inputs.

    Attributes:
        attributes, constants: of the node. frac: binary places of its result.
    """

    attributes: Mapping[str, int]
    constants: Mapping[str, IntArray]
    frac: int


@dataclass(frozen=True)
class ScanShape:
    """What a scan is given.

    Attributes:
        x, B, C, n: types of its inputs; B is also B', for nothing is rotated.
        x_frac, B_frac, C_frac: their binary places.
        headdim, chunk_size, decay_bits, A_bits: as in ``ssd``. M_bits: of M, its sign included.
        largest_G: magnitude of C . B as an integer, beyond which it may saturate.
        seq_len: of the graph. carried: whether a state goes from chunk to chunk.
        max_bits: no intermediate exceeds 2**max_bits.
    """

    x: TensorType
    B: TensorType
    C: TensorType
    n: TensorType
    x_frac: int
    B_frac: int
    C_frac: int
    headdim: int
    chunk_size: int
    decay_bits: int
    A_bits: int
    M_bits: int
    largest_G: int
    seq_len: int
    carried: bool
    max_bits: int

    def node(self, attributes: Mapping[str, int]) -> Node:
        """An ``ssd`` node of these attributes; D is added outside, for it weighs x itself, not x'."""
        constants = {"D": np.zeros(self.n.shape[-1], np.int64)}
        if self.carried:
            half = self.B.shape[-1] // 2
            constants |= {"cos_Q": np.ones(half, np.int64), "sin_Q": np.zeros(half, np.int64)}
        return Node("ssd", "ssd", (), attributes, constants)

    def fits(self, attributes: Mapping[str, int]) -> bool:
        """Whether the scan provably stays inside the budget."""
        inputs = [self.x, self.B, self.C, self.n] + ([self.B] if self.carried else [])
        node = self.node(attributes)
        try:
            y = OPERATIONS["ssd"].infer(node, inputs, self.seq_len)
        except ValueError:
            return False
        if largest_integer(self.M_bits) < node_bounds(node, inputs).M:
            return False
        # The shift of y that follows adds half of its unit.
        return y.peak <= 1 << self.max_bits and y.magnitude <= 1 << (self.max_bits - 1)


def fit_scan(name: str, shape: ScanShape) -> ScanFit:
    """The shifts of a scan.

    G keeps the bits that a product with A leaves it; the state keeps the most places whose carried product
    fits; y has the most places at which all of its sums fit.

    Args:
        name: of the node. shape: what it is given.

    Raises:
        MambaintError: if there are none: the budget is too small for this shape.
    """
    s = shape
    proven = s.B.shape[-1] * s.B.magnitude * s.C.magnitude
    G_bits = s.max_bits - 1 - s.A_bits
    G_shift = max(0, min(proven, s.largest_G).bit_length() - G_bits)
    A_u_bits = min(A_U_BITS, s.A_bits)
    fixed = {
        "chunk_size": s.chunk_size,
        "headdim": s.headdim,
        "decay_bits": s.decay_bits,
        "A_bits": s.A_bits,
        "G_shift": G_shift,
        "G_limit": (1 << max(G_bits, 1)) - 1,
        "A_u_bits": A_u_bits,
        "H_align": 0,
        "rotation_frac": 0,
        "D_align": 0,
    }
    M_frac = s.A_bits + s.B_frac + s.C_frac - G_shift

    def shifts(beta_shift: int, y_frac: int) -> dict[str, int]:
        H_frac = s.x_frac + s.B_frac - beta_shift
        u_shift = A_u_bits + H_frac + s.C_frac - y_frac
        return fixed | {
            "beta_shift": beta_shift,
            "M_shift": s.x_frac + M_frac - y_frac,
            "M_align": 0,
            "u_shift": max(0, u_shift) if s.carried else 0,
            "u_align": max(0, -u_shift) if s.carried else 0,
        }

    # The state first, whose places a long memory lives in: only its own sums limit them, not those of y.
    finest = s.x_frac + M_frac
    for beta_shift in range(s.A_bits + 8 if s.carried else 1) if G_bits >= LEAST_BITS else ():
        for y_frac in range(finest, finest - s.A_bits - G_bits, -1):
            attributes = shifts(beta_shift, y_frac)
            if s.fits(attributes):
                return ScanFit(attributes, s.node(attributes).constants, y_frac)
    raise MambaintError(
        f"{located(name, 'ssd')} fits {s.max_bits} bits with no shifts, at chunk_size = {s.chunk_size}",
        f"lower {LOWER['ssd']}, or raise M_bits or max_bits",
    )
