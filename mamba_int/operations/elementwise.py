"""``add``, ``sub``, ``mul``, ``compare``: elementwise, of two tensors or one and the constant ``value``."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mamba_int.graph import IntArray, Node, TensorType
from mamba_int.operations.base import Operation, Record, check

if TYPE_CHECKING:
    from torch import Tensor


class _Binary(Operation):
    @abstractmethod
    def combine(self, a: Any, b: Any) -> Any:
        """The operation on integers, arrays or tensors."""

    def infer(self, node: Node, inputs: Sequence[TensorType], seq_len: int) -> TensorType:
        if len(inputs) == 1:
            value = np.asarray(node.constants["value"])
            check(value.ndim <= 1, "the constant must be a scalar or a vector")
            other = TensorType(value.shape, int(value.min()), int(value.max()))
            check(
                np.broadcast_shapes(inputs[0].shape, value.shape) == inputs[0].shape, "constant does not fit"
            )
        else:
            check(len(inputs) == 2 and inputs[0].shape == inputs[1].shape, "operands differ in shape")
            other = inputs[1]
        x = inputs[0]
        corners = [int(self.combine(a, b)) for a in (x.low, x.high) for b in (other.low, other.high)]
        return self.bounded(node, x, other, min(corners), max(corners))

    def bounded(self, node: Node, x: TensorType, other: TensorType, low: int, high: int) -> TensorType:
        """The result's type, from the interval that independent operands would give."""
        return TensorType(x.shape, low, high)

    def evaluate(self, node: Node, inputs: Sequence[IntArray], record: Record) -> IntArray:
        result: IntArray = self.combine(inputs[0], inputs[1] if len(inputs) == 2 else node.constants["value"])
        return result

    def execute(self, node: Node, inputs: Sequence[Tensor], record: Record, rounding: bool) -> Tensor:
        result: Tensor = self.combine(inputs[0], inputs[1] if len(inputs) == 2 else node.constants["value"])
        return result


class Add(_Binary):
    """x + y."""

    name = "add"

    def combine(self, a: Any, b: Any) -> Any:
        return a + b


class Sub(_Binary):
    """x - y."""

    name = "sub"

    def combine(self, a: Any, b: Any) -> Any:
        return a - b


class Mul(_Binary):
    """x * y."""

    name = "mul"

    def bounded(self, node: Node, x: TensorType, other: TensorType, low: int, high: int) -> TensorType:
        if len(node.inputs) == 2 and node.inputs[0] == node.inputs[1]:
            # A square is never negative, and at least the square of the end nearest to zero.
            nearest = 0 if x.low <= 0 <= x.high else min(abs(x.low), abs(x.high))
            return TensorType(x.shape, nearest**2, x.magnitude**2)
        return TensorType(x.shape, low, high)

    def combine(self, a: Any, b: Any) -> Any:
        return a * b


class Compare(_Binary):
    """1 where x >= y, else 0; always the same where the intervals of x and y do not overlap.

    It passes no gradient: the slope of a step is 0 wherever it has one.
    """

    name = "compare"

    def bounded(self, node: Node, x: TensorType, other: TensorType, low: int, high: int) -> TensorType:
        # A float must hold both sides: a constant rounded to its neighbour would turn the answer.
        return TensorType(x.shape, low, high, max(x.magnitude, other.magnitude))

    def combine(self, a: Any, b: Any) -> Any:
        return a >= b

    def evaluate(self, node: Node, inputs: Sequence[IntArray], record: Record) -> IntArray:
        return super().evaluate(node, inputs, record).astype(np.int64)

    def execute(self, node: Node, inputs: Sequence[Tensor], record: Record, rounding: bool) -> Tensor:
        return super().execute(node, inputs, record, rounding).to(inputs[0].dtype)
