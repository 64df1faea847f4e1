"""``scan`` as ONNX nodes: the steps are unrolled, all states and components of a step are one tensor.

Letters and layouts as in ``mamba_int/operations/scan.py``. A product with a quaternion from the left is one
with its matrix [4, 4], whose entries are gathered for all steps at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from circuits.runtime.builder import Builder
from circuits.runtime.clock import Clock
from mamba_int.graph import Node
from mamba_int.operations.scan import ScanShape, product_terms


def scan(b: Builder, node: Node, inputs: Sequence[str]) -> str:
    """The scan of a whole sequence.

    Args:
        b: receives the nodes. node: the scan.
        inputs: x [batch, T, G P], q, B and C [batch, T, components G N].
    """
    parts = _Parts(b, node, inputs, b.length)
    states: list[str] = []
    for t in range(b.length):
        inflow = b.slice(parts.inflow, t, t + 1, axis=1) if b.length > 1 else parts.inflow
        turn = b.slice(parts.turn, t, t + 1, axis=1) if b.length > 1 else parts.turn
        states.append(parts.next(states[-1] if states else None, turn, inflow))
    H = b.call(b.concat(states, 1), f"{node.name}.H")
    return parts.read(H)


def scan_step(
    b: Builder, node: Node, inputs: Sequence[str], memory: Mapping[str, str], clock: Clock
) -> tuple[str, dict[str, str]]:
    """One step of the scan.

    Args:
        b: receives the nodes. node: the scan. inputs: as :func:`scan`, of one step.
        memory: H [batch, components, G, P, N]. clock: of the step; it does not matter here.

    Returns:
        y [batch, 1, 4 G P], and what of the memory changes.
    """
    parts = _Parts(b, node, inputs, 1)
    H = parts.next(b.unsqueeze(memory["H"], 1), parts.turn, parts.inflow)
    after = b.call(b.reshape(H, 0, *parts.shape.state), f"{node.name}.H")
    return parts.read(H), {"H": after}


class _Parts:
    """What the steps of a scan read.

    Attributes:
        shape: widths. turn: matrices of q [batch, T, components, components, G, 1, N], rows first; empty for
            a real q, which is [batch, T, 1, G, 1, N].
        inflow: (B x) << a [batch, T, components, G, P, N].
    """

    def __init__(self, b: Builder, node: Node, inputs: Sequence[str], length: int) -> None:
        types = [b.graph.types[name] for name in node.inputs]
        self.shape = s = ScanShape(node, types)
        self._b, self._node, self._length = b, node, length
        self._x, q, B, self._C = inputs
        self._C_bound = types[3].magnitude
        x = b.reshape(self._x, 0, length, 1, s.groups, s.channels, 1)
        entering = b.reshape(B, 0, length, s.components, s.groups, 1, s.states)
        self.inflow = b.scale(b.mul(x, entering), node.integer("inflow_align"))
        if s.turning == 1:
            self.turn = b.reshape(q, 0, length, 1, s.groups, 1, s.states)
        else:
            matrix = self._matrix(q, s.turning, s.components)
            self.turn = b.reshape(matrix, 0, length, 4, s.components, s.groups, 1, s.states)

    def _matrix(self, left: str, components: int, columns: int) -> str:
        """Matrices of products from the left [batch, T, 4 columns, G, N] of [batch, T, components G N]."""
        b, s = self._b, self.shape
        place, signs = np.zeros((4, columns), np.int64), np.zeros((4, columns), np.int64)
        for row in range(4):
            for i, j, sign in product_terms(row, components, columns):
                place[row, j], signs[row, j] = i, sign
        planes = b.reshape(left, 0, self._length, components, s.groups, s.states)
        spread = b.op("Gather", planes, b.initializer(place.ravel()), axis=2)
        return b.mul(spread, b.constant(signs.reshape(-1, 1, 1)))

    def next(self, H: str | None, turn: str, inflow: str) -> str:
        """H_t [batch, 1, components, G, P, N] from H_{t-1}, or from zeros."""
        b, node, limit = self._b, self._node, self._node.integer("H_limit")
        if H is None:
            total = inflow
        elif self.shape.turning == 1:
            total = b.add(b.mul(turn, H), inflow)
        else:
            turned = b.sum(b.mul(turn, b.unsqueeze(H, 2)), 3, keep=False)
            total = b.add(turned, inflow)
        return b.clip(b.shift(total, node.integer("q_bits")), -limit, limit)

    def read(self, H: str) -> str:
        """y [batch, T, 4 G P] of the states [batch, T, components, G, P, N]."""
        b, s, node = self._b, self.shape, self._node
        terms = s.components * s.states
        # [batch, T, G, 4, components N] times [batch, T, G, components N, P]
        matrix = self._matrix(self._C, 4, s.components)
        matrix = b.reshape(matrix, 0, self._length, 4, s.components, s.groups, s.states)
        matrix = b.transpose(matrix, 0, 1, 4, 2, 3, 5)
        matrix = b.reshape(matrix, 0, self._length, s.groups, 4, terms)
        states = b.transpose(H, 0, 1, 3, 2, 5, 4)
        states = b.reshape(states, 0, self._length, s.groups, terms, s.channels)
        limit = node.integer("H_limit")
        y = b.matmul(matrix, states, max(terms * self._C_bound * limit, self._C_bound, limit))
        y = b.reshape(b.transpose(y, 0, 1, 3, 2, 4), 0, self._length, 4 * s.groups * s.channels)
        D = np.asarray(node.constants["D"])
        if not D.any():
            return y
        skipped = b.mul(self._x, b.constant(D << node.integer("D_align")))
        return b.add(y, b.pad(skipped, 3, -1, 0, 3 * s.groups * s.channels))
