"""``input``: what the user gives. ``embedding``: a table row per token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from mamba_int.graph import IntArray, Node, TensorType
from mamba_int.operations.base import Operation, Record, check

if TYPE_CHECKING:
    from torch import Tensor


class Input(Operation):
    """Integers in [low, high]: features [T, features], or token ids [T] if ``features`` is 0."""

    name = "input"

    def infer(self, node: Node, inputs: Sequence[TensorType], seq_len: int) -> TensorType:
        low, high, features = node.integer("low"), node.integer("high"), node.integer("features")
        check(low <= high, "low exceeds high")
        return TensorType((seq_len, features) if features else (seq_len,), low, high)

    def evaluate(self, node: Node, inputs: Sequence[IntArray], record: Record) -> IntArray:
        return inputs[0]

    def execute(self, node: Node, inputs: Sequence[Tensor], record: Record, rounding: bool) -> Tensor:
        return inputs[0]


class Embedding(Operation):
    """Row ``id`` of the constant ``table`` [vocab, d] for every token id."""

    name = "embedding"

    def infer(self, node: Node, inputs: Sequence[TensorType], seq_len: int) -> TensorType:
        table = node.constants["table"]
        check(len(inputs[0].shape) == 1, "needs token ids")
        check(inputs[0].low >= 0 and inputs[0].high < len(table), "token ids exceed the table")
        return TensorType((*inputs[0].shape, table.shape[1]), int(table.min()), int(table.max()))

    def evaluate(self, node: Node, inputs: Sequence[IntArray], record: Record) -> IntArray:
        rows: IntArray = np.asarray(node.constants["table"])[inputs[0]]
        return rows

    def execute(self, node: Node, inputs: Sequence[Tensor], record: Record, rounding: bool) -> Tensor:
        rows: Tensor = node.constants["table"][inputs[0].long()]
        return rows
