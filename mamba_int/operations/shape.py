"""``slice`` and ``concat`` of the last axis, ``reduce`` over time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

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


class Concat(Operation):
    """Tensors [..., C_i], two or more and alike but for C_i, one after the other: [..., sum of the C_i]."""

    name = "concat"

    def infer(self, node: Node, inputs: Sequence[TensorType], seq_len: int) -> TensorType:
        leading = inputs[0].shape[:-1]
        check(len(inputs) >= 2, "needs two inputs or more")
        check(all(x.shape and x.shape[:-1] == leading for x in inputs), "only last axes may differ")
        width = sum(x.shape[-1] for x in inputs)
        return TensorType((*leading, width), min(x.low for x in inputs), max(x.high for x in inputs))

    def evaluate(self, node: Node, inputs: Sequence[IntArray], record: Record) -> IntArray:
        return np.concatenate(inputs, -1)

    def execute(self, node: Node, inputs: Sequence[Tensor], record: Record, rounding: bool) -> Tensor:
        import torch

        return torch.cat(list(inputs), -1)


class Reduce(Operation):
    """The ``sum`` or the ``max`` over time, or the ``last`` step."""

    name = "reduce"
    causal = False

    def infer(self, node: Node, inputs: Sequence[TensorType], seq_len: int) -> TensorType:
        (x,), kind = inputs, node.attributes["kind"]
        check(kind in ("sum", "max", "last"), f"kind = {kind}")
        check(len(x.shape) >= 2, "needs a time axis")
        steps = x.shape[0] if kind == "sum" else 1
        return TensorType(x.shape[1:], x.low * steps, x.high * steps, x.magnitude * steps)

    def evaluate(self, node: Node, inputs: Sequence[IntArray], record: Record) -> IntArray:
        x, kind = inputs[0], node.attributes["kind"]
        result: IntArray = x.sum(1) if kind == "sum" else x.max(1) if kind == "max" else x[:, -1]
        return result

    def execute(self, node: Node, inputs: Sequence[Tensor], record: Record, rounding: bool) -> Tensor:
        x, kind = inputs[0], node.attributes["kind"]
        return x.sum(1) if kind == "sum" else x.amax(1) if kind == "max" else x[:, -1]
