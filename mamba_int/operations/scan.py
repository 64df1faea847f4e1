"""``scan``: states that the input fades and turns, step by step: real, complex or quaternion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mamba_int.graph import IntArray, Node, TensorType
from mamba_int.operations.base import Memory, Operation, Record, check, nobody, rounding_shift, shift_peak

if TYPE_CHECKING:
    from torch import Tensor

HAMILTON = (
    ((0, 0, 1), (1, 1, -1), (2, 2, -1), (3, 3, -1)),
    ((0, 1, 1), (1, 0, 1), (2, 3, 1), (3, 2, -1)),
    ((0, 2, 1), (2, 0, 1), (3, 1, 1), (1, 3, -1)),
    ((0, 3, 1), (3, 0, 1), (1, 2, 1), (2, 1, -1)),
)
"""Component m of a product a b of quaternions is the sum of sign a_i b_j over these (i, j, sign)."""


def product_terms(component: int, left: int, right: int) -> list[tuple[int, int, int]]:
    """Terms (i, j, sign) of one component of a b, where only the first ``left`` components of a and
    ``right`` of b are not zero."""
    return [(i, j, sign) for i, j, sign in HAMILTON[component] if i < left and j < right]


class ScanShape:
    """Widths of a ``scan``, from its inputs' types.

    Attributes:
        turning: components of q: 1, 2 or 4. components: of B and of a state: 1 or 4.
        groups, channels, states: G, P and N.
    """

    def __init__(self, node: Node, inputs: Sequence[Any]) -> None:
        x, q, B, C = (int(source.shape[-1]) for source in inputs)
        self.groups = node.integer("groups")
        check(self.groups >= 1 and x % self.groups == 0, "x does not fit the groups")
        check(C % (4 * self.groups) == 0, "C is not made of four components of every state")
        self.channels, self.states = x // self.groups, C // 4 // self.groups
        modes = self.groups * self.states
        check(q % modes == 0 and B % modes == 0, "q or B does not fit C")
        self.turning, self.components = q // modes, B // modes
        check(
            (self.turning, self.components) in ((1, 1), (1, 4), (2, 4), (4, 4)),
            f"{self.turning} components of q with {self.components} of B",
        )

    @property
    def state(self) -> tuple[int, ...]:
        """Shape of H."""
        return (self.components, self.groups, self.channels, self.states)


class Scan(Operation):
    """Per group g, its channels p and states n, with products of quaternions from the left::

        H_t[g,p,n] = sat(shift(q_t[g,n] H_{t-1}[g,p,n] + (B_t[g,n] x_t[g,p]) << a, k))
        y_t[g,p]   = sum_n C_t[g,n] H_t[g,p,n]  +  (D[g,p] x_t[g,p]) << b

    sat keeps every component within +-``H_limit``, so that no sequence is too long, whatever q is. q is
    real, complex (1, i) or a quaternion; B and H are real or quaternions, C and y quaternions; x and D are
    real. One rounding per component of the state and step: rounding makes products of q no substitute for
    steps, so the order of time is part of the model. (The recurrence of the quaternion source, mambaqc;
    see ``mamba_int.float_models.quaternion``.)

    Inputs: x [T, G P], q, B and C [T, components G N], components in planes. Constant ``D`` [G P].
    Attributes: ``groups`` G, ``q_bits`` k, ``inflow_align`` a, ``H_limit``, ``D_align`` b.
    Result: y, components in planes, before its shift [T, 4 G P].
    """

    name = "scan"

    def infer(self, node: Node, inputs: Sequence[TensorType], seq_len: int) -> TensorType:
        x, q, B, C = inputs
        shape, D = ScanShape(node, inputs), node.constants["D"]
        k, limit = node.integer("q_bits"), node.integer("H_limit")
        check(all(len(source.shape) == 2 for source in inputs), "needs a time axis")
        check(0 <= k <= 40 and 0 <= node.integer("inflow_align") <= 48, "q_bits or inflow_align")
        check(1 <= limit < 1 << 50 and 0 <= node.integer("D_align") <= 48, "H_limit or D_align")
        check(D.shape == x.shape[-1:], "D does not fit x")
        inflow = B.magnitude * x.magnitude << node.integer("inflow_align")
        carried = shape.turning * q.magnitude * limit
        D_x = int(np.abs(D).max()) * x.magnitude << node.integer("D_align")
        y = shape.components * shape.states * C.magnitude * limit + D_x
        # The skipped x is real.
        peak = max(shift_peak(carried + inflow, k), y)
        return TensorType((x.shape[0], 4 * x.shape[-1]), -y, y, peak)

    @staticmethod
    def planes(shape: ScanShape, inputs: Sequence[Any]) -> tuple[Any, Any, Any, Any]:
        """x [..., G, P], q, B and C [..., components, G, N], of arrays or tensors [..., width]."""
        x, q, B, C = inputs
        lead = tuple(x.shape[:-1])
        modes = (shape.groups, shape.states)
        return (
            x.reshape(*lead, shape.groups, shape.channels),
            q.reshape(*lead, shape.turning, *modes),
            B.reshape(*lead, shape.components, *modes),
            C.reshape(*lead, 4, *modes),
        )

    def evaluate(self, node: Node, inputs: Sequence[IntArray], record: Record) -> IntArray:
        shape = ScanShape(node, inputs)
        x, q, B, C = self.planes(shape, inputs)
        batch, length = x.shape[:2]
        states = np.zeros((batch, length, *shape.state), np.int64)
        H = np.zeros((batch, *shape.state), np.int64)
        for t in range(length):
            H = self._next(node, shape, H, q[:, t], B[:, t], x[:, t])
            states[:, t] = H
        record("H", states)
        return self._read(node, shape, states, C, x)

    @staticmethod
    def _next(node: Node, shape: ScanShape, H: IntArray, q: IntArray, B: IntArray, x: IntArray) -> IntArray:
        """H_t from H_{t-1} [..., components, G, P, N], q and B [..., components, G, N], x [..., G, P]."""
        inflow = B[..., :, :, None, :] * x[..., None, :, :, None] << node.integer("inflow_align")
        for m in range(shape.components):
            for i, j, sign in product_terms(m, shape.turning, shape.components):
                inflow[..., m, :, :, :] += sign * q[..., i, :, None, :] * H[..., j, :, :, :]
        limit = node.integer("H_limit")
        return np.clip(rounding_shift(inflow, node.integer("q_bits")), -limit, limit)

    @staticmethod
    def _read(node: Node, shape: ScanShape, H: IntArray, C: IntArray, x: IntArray) -> IntArray:
        """y [..., 4 G P] of H [..., components, G, P, N], C [..., 4, G, N] and x [..., G, P]."""
        y = np.zeros((*x.shape[:-2], 4, *x.shape[-2:]), np.int64)
        y[..., 0, :, :] = x * node.constants["D"].reshape(x.shape[-2:]) << node.integer("D_align")
        for m in range(4):
            for i, j, sign in product_terms(m, 4, shape.components):
                y[..., m, :, :] += sign * np.einsum(
                    "...gpn,...gn->...gp", H[..., j, :, :, :], C[..., i, :, :]
                )
        return y.reshape(*x.shape[:-2], -1)

    def execute(self, node: Node, inputs: Sequence[Tensor], record: Record, rounding: bool) -> Tensor:
        from triton_kernels.dispatch import runs_on_triton
        from triton_kernels.scan import ScanScales, fused_scan, scan

        operands = self.planes(ScanShape(node, inputs), inputs)
        scales, D = ScanScales.from_attributes(node.attributes), node.constants["D"]
        graded = any(source.requires_grad for source in (*inputs, D))
        if record is nobody and rounding and not graded and runs_on_triton(inputs[0]):
            return fused_scan(*operands, D, scales)
        y, H = scan(*operands, D, scales, rounding)
        record("H", H)
        return y

    # -- one step at a time -------------------------------------------------------------------------------

    def initial_memory(self, node: Node, inputs: Sequence[TensorType]) -> dict[str, IntArray]:
        return {"H": np.zeros(ScanShape(node, inputs).state, np.int64)}

    def evaluate_step(
        self, node: Node, inputs: Sequence[IntArray], memory: Memory, position: IntArray, record: Record
    ) -> IntArray:
        shape = ScanShape(node, inputs)
        x, q, B, C = self.planes(shape, [source[:, 0] for source in inputs])
        memory["H"][:] = self._next(node, shape, memory["H"], q, B, x)
        record("H", memory["H"].copy())
        return self._read(node, shape, memory["H"], C, x)[:, None]

    def execute_step(
        self, node: Node, inputs: Sequence[Tensor], memory: Memory, position: Tensor, record: Record
    ) -> Tensor:
        from triton_kernels.scan import ScanScales, read_states, scan_step

        x, q, B, C = self.planes(ScanShape(node, inputs), [source[:, 0] for source in inputs])
        scales = ScanScales.from_attributes(node.attributes)
        memory["H"].copy_(scan_step(memory["H"], q, B, x, scales, True))
        record("H", memory["H"].clone())
        return read_states(memory["H"], C, x, node.constants["D"], scales)[:, None]

    def memorize(
        self,
        node: Node,
        inputs: Sequence[Any],
        internals: Mapping[str, Any],
        source: Any,
        length: int,
        memory: Memory,
        rows: Any,
    ) -> None:
        memory["H"][rows] = internals["H"][:, length - 1][source]
