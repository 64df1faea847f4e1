"""``linear``: a matrix of ternary or int8 weights. ``conv``: causal depthwise convolution over time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from mamba_int.graph import IntArray, Node, TensorType
from mamba_int.operations.base import Operation, Record, check

if TYPE_CHECKING:
    from torch import Tensor


def _dot_bounds(weight: IntArray, bias: IntArray | None, x: TensorType) -> tuple[int, int, int]:
    """Low, high and peak of ``weight [outputs, terms] . x + bias``: exact interval arithmetic."""
    # Python integers from here on: a foreign file must not make the bounds themselves wrap.
    positive = np.maximum(weight, 0).astype(object).sum(1)
    negative = np.minimum(weight, 0).astype(object).sum(1)
    offset = (bias if bias is not None else np.zeros(len(weight), np.int64)).astype(object)
    low = (positive * x.low + negative * x.high + offset).min()
    high = (positive * x.high + negative * x.low + offset).max()
    peak = ((positive - negative) * x.magnitude + np.abs(offset)).max()
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
        (x,), taps = inputs, node.constants["taps"]
        length, width = x.shape[1], taps.shape[1]
        padded = np.pad(x, ((0, 0), (width - 1, 0), (0, 0)))
        y: IntArray = sum(
            (padded[:, i : i + length] * taps[:, i] for i in range(width)), np.zeros_like(x, dtype=np.int64)
        )
        return y + node.constants["bias"] if "bias" in node.constants else y

    def execute(self, node: Node, inputs: Sequence[Tensor], record: Record, rounding: bool) -> Tensor:
        # Shifted products rather than conv1d: no Winograd or FFT algorithm may touch exact integers.
        from torch.nn.functional import pad

        (x,), taps = inputs, node.constants["taps"]
        length, width = x.shape[1], taps.shape[1]
        padded = pad(x, (0, 0, width - 1, 0))
        y: Tensor = x * taps[:, -1]
        for i in range(width - 1):
            y = y + padded[:, i : i + length] * taps[:, i]
        return y + node.constants["bias"] if "bias" in node.constants else y
