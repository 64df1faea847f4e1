"""``slice`` of the last axis and ``reduce`` over time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mamba_int.graph import IntArray, Node, TensorType
from mamba_int.operations.base import Operation, Record, check

if TYPE_CHECKING:
    from torch import Tensor


class Slice(Operation):
    """Elements ``start`` to ``stop`` (exclusive) of the last axis."""

    name = "slice"

    def infer(self, node: Node, inputs: Sequence[TensorType], seq_len: int) -> TensorType:
        (x,), start, stop = inputs, node.integer("start"), node.integer("stop")
        check(0 <= start < stop <= x.shape[-1], "slice exceeds the axis")
        return TensorType((*x.shape[:-1], stop - start), x.low, x.high)

    def evaluate(self, node: Node, inputs: Sequence[IntArray], record: Record) -> IntArray:
        return inputs[0][..., node.integer("start") : node.integer("stop")]

    def execute(self, node: Node, inputs: Sequence[Tensor], record: Record, rounding: bool) -> Tensor:
        return inputs[0][..., node.integer("start") : node.integer("stop")]


class Reduce(Operation):
    """The ``sum`` over time, or the ``last`` step."""

    name = "reduce"
    causal = False

    def infer(self, node: Node, inputs: Sequence[TensorType], seq_len: int) -> TensorType:
        (x,), kind = inputs, node.attributes["kind"]
        check(kind in ("sum", "last"), f"kind = {kind}")
        check(len(x.shape) >= 2, "needs a time axis")
        steps = x.shape[0] if kind == "sum" else 1
        return TensorType(x.shape[1:], x.low * steps, x.high * steps, x.magnitude * steps)

    def evaluate(self, node: Node, inputs: Sequence[IntArray], record: Record) -> IntArray:
        result: IntArray = inputs[0].sum(1) if node.attributes["kind"] == "sum" else inputs[0][:, -1]
        return result

    def execute(self, node: Node, inputs: Sequence[Tensor], record: Record, rounding: bool) -> Tensor:
        return inputs[0].sum(1) if node.attributes["kind"] == "sum" else inputs[0][:, -1]
