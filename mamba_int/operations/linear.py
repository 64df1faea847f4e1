"""``linear``: a matrix of ternary or int8 weights. ``conv``: causal depthwise convolution over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mamba_int.graph import IntArray, Node, TensorType
from mamba_int.operations.base import Memory, Operation, Record, check

if TYPE_CHECKING:
    from torch import Tensor


BLOCK = 1 << 22
"""Weights whose magnitudes are held at a time."""


def _dot_bounds(weight: IntArray, bias: IntArray | None, x: TensorType) -> tuple[int, int, int]:
    """Low, high and peak of ``weight [outputs, terms] . x + bias``: exact interval arithmetic."""
    outputs, terms = weight.shape
    largest = max(int(weight.max()), -int(weight.min()))
    # A foreign file must not make the bounds themselves wrap: sums in int64 where those are exact, and
    # Python integers from there on.
    exact = weight.astype(np.int64 if largest * terms < 1 << 62 else object, copy=False)
    rows = max(1, BLOCK // terms)
    total = exact.sum(1).astype(object)
    magnitude = np.concatenate(
        [np.abs(exact[i : i + rows]).sum(1).astype(object) for i in range(0, outputs, rows)]
    )
    positive, negative = (magnitude + total) // 2, (total - magnitude) // 2
    offset = (bias if bias is not None else np.zeros(outputs, np.int64)).astype(object)
    low = (positive * x.low + negative * x.high + offset).min()
    high = (positive * x.high + negative * x.low + offset).max()
    peak = (magnitude * x.magnitude + np.abs(offset)).max()
    return int(low), int(high), int(peak)


class Linear(Operation):
    """y = x W^T + b on the last axis: ``weight`` [outputs, inputs], optional ``bias`` [outputs]."""

    name = "linear"

    def infer(self, node: Node, inputs: Sequence[TensorType], seq_len: int) -> TensorType:
        (x,) = inputs
        weight, bias = node.constants["weight"], node.constants.get("bias")
        check(weight.ndim == 2 and weight.shape[1] == x.shape[-1], "weight does not fit the input")
        check(bias is None or bias.shape == weight.shape[:1], "bias does not fit the weight")
        low, high, peak = _dot_bounds(weight, bias, x)
        return TensorType((*x.shape[:-1], len(weight)), low, high, peak)

    def evaluate(self, node: Node, inputs: Sequence[IntArray], record: Record) -> IntArray:
        y: IntArray = inputs[0] @ node.constants["weight"].T
        return y + node.constants["bias"] if "bias" in node.constants else y

    def execute(self, node: Node, inputs: Sequence[Tensor], record: Record, rounding: bool) -> Tensor:
        y: Tensor = inputs[0] @ node.constants["weight"].to(inputs[0].dtype).mT
        return y + node.constants["bias"] if "bias" in node.constants else y


class Conv(Operation):
    """y[t, c] = sum_i taps[c, i] x[t - K + 1 + i, c] + bias[c]; steps before the first are zero."""

    name = "conv"

    def infer(self, node: Node, inputs: Sequence[TensorType], seq_len: int) -> TensorType:
        (x,) = inputs
        taps, bias = node.constants["taps"], node.constants.get("bias")
        check(taps.ndim == 2 and len(x.shape) == 2 and len(taps) == x.shape[-1], "taps do not fit the input")
        padded = TensorType(x.shape, min(x.low, 0), max(x.high, 0))
        low, high, peak = _dot_bounds(taps, bias, padded)
        return TensorType(x.shape, low, high, peak)

    def evaluate(self, node: Node, inputs: Sequence[IntArray], record: Record) -> IntArray:
        (x,), width = inputs, node.constants["taps"].shape[1]
        return self._slide(node, np.pad(x, ((0, 0), (width - 1, 0), (0, 0))))

    @staticmethod
    def _slide(node: Node, x: IntArray) -> IntArray:
        """The taps at every place where all of them meet a step: [batch, T + K - 1, C] to [batch, T, C]."""
        taps = node.constants["taps"]
        width = taps.shape[1]
        length = x.shape[1] - width + 1
        y: IntArray = sum(
            (x[:, i : i + length] * taps[:, i] for i in range(width)),
            np.zeros((len(x), length, len(taps)), np.int64),
        )
        return y + node.constants["bias"] if "bias" in node.constants else y

    def execute(self, node: Node, inputs: Sequence[Tensor], record: Record, rounding: bool) -> Tensor:
        from torch.nn.functional import pad

        (x,), width = inputs, node.constants["taps"].shape[1]
        return self._slide_tensor(node, pad(x, (0, 0, width - 1, 0)))

    @staticmethod
    def _slide_tensor(node: Node, x: Tensor) -> Tensor:
        # Shifted products rather than conv1d: no Winograd or FFT algorithm may touch exact integers.
        taps = node.constants["taps"]
        width = taps.shape[1]
        length = x.shape[1] - width + 1
        y: Tensor = x[:, width - 1 :] * taps[:, -1]
        for i in range(width - 1):
            y = y + x[:, i : i + length] * taps[:, i]
        return y + node.constants["bias"] if "bias" in node.constants else y

    def initial_memory(self, node: Node, inputs: Sequence[TensorType]) -> dict[str, IntArray]:
        channels, width = node.constants["taps"].shape
        return {"window": np.zeros((width - 1, channels), np.int64)}

    def evaluate_step(
        self, node: Node, inputs: Sequence[IntArray], memory: Memory, position: IntArray, record: Record
    ) -> IntArray:
        seen = np.concatenate([memory["window"], inputs[0]], 1)
        memory["window"][:] = seen[:, 1:]
        return self._slide(node, seen)

    def execute_step(
        self, node: Node, inputs: Sequence[Tensor], memory: Memory, position: Tensor, record: Record
    ) -> Tensor:
        import torch

        seen = torch.cat([memory["window"], inputs[0]], 1)
        memory["window"].copy_(seen[:, 1:])
        return self._slide_tensor(node, seen)

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
        window = memory["window"]
        kept = min(window.shape[1], length)
        window[rows, window.shape[1] - kept :] = inputs[0][:, length - kept : length][source]
