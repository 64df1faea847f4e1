"""``select`` (one of two tensors, by a bit) and ``table`` (one of many constants, by an integer)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from mamba_int.graph import IntArray, Node, TensorType
from mamba_int.operations.base import Operation, Record, check

if TYPE_CHECKING:
    from torch import Tensor

MAX_ENTRIES = 1024
"""Largest table: in the circuit every element pays for every entry."""


class Select(Operation):
    """condition ? a : b for every element; the condition is proven to be 0 or 1."""

    name = "select"

    def infer(self, node: Node, inputs: Sequence[TensorType], seq_len: int) -> TensorType:
        condition, a, b = inputs
        check(condition.shape == a.shape == b.shape, "operands differ in shape")
        check(condition.low >= 0 and condition.high <= 1, "the condition can be other than 0 and 1")
        return TensorType(a.shape, min(a.low, b.low), max(a.high, b.high), condition.magnitude)

    def evaluate(self, node: Node, inputs: Sequence[IntArray], record: Record) -> IntArray:
        return np.where(inputs[0] > 0, inputs[1], inputs[2])

    def execute(self, node: Node, inputs: Sequence[Tensor], record: Record, rounding: bool) -> Tensor:
        # Exact for a condition of 0 or 1, where b + c (a - b) may need one bit more than a float has. What is
        # not chosen gets no gradient; a condition that learns (a clamp, not a compare) gets a - b.
        condition, a, b = inputs
        return condition * a + (1 - condition) * b


class Table(Operation):
    """values[x - low]: constant ``values`` [entries], at most 1024, that cover the whole interval of x.

    The gradient of x is the slope of the table, straight through; see :func:`triton_kernels.table.look_up`.
    """

    name = "table"

    def infer(self, node: Node, inputs: Sequence[TensorType], seq_len: int) -> TensorType:
        (x,), low, values = inputs, node.integer("low"), np.asarray(node.constants["values"])
        check(values.ndim == 1 and len(values) <= MAX_ENTRIES, f"values is not up to {MAX_ENTRIES} entries")
        check(low <= x.low and x.high < low + len(values), f"{x.low}..{x.high} exceeds the table")
        within = self.within(node, x)
        return TensorType(x.shape, int(within.min()), int(within.max()), x.magnitude)

    @staticmethod
    def within(node: Node, x: TensorType) -> IntArray:
        """The entries that x can reach, from that of ``x.low`` to that of ``x.high``."""
        low = node.integer("low")
        reached: IntArray = np.asarray(node.constants["values"])[x.low - low : x.high - low + 1]
        return reached

    def evaluate(self, node: Node, inputs: Sequence[IntArray], record: Record) -> IntArray:
        found: IntArray = np.asarray(node.constants["values"])[inputs[0] - node.integer("low")]
        return found

    def execute(self, node: Node, inputs: Sequence[Tensor], record: Record, rounding: bool) -> Tensor:
        from triton_kernels.table import look_up

        return look_up(inputs[0], node.constants["values"], node.integer("low"), rounding)
