"""What a graph does on the test split, by the NumPy interpreter: quality, observed ranges, saturation."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mamba_int.errors import MambaintError
from mamba_int.graph import Graph, IntArray
from mamba_int.interpreter import check_input, evaluate

if TYPE_CHECKING:
    from mamba_int.datasets import ClassificationData, TextData

SEQUENCES = 64
TOKENS = 1024
"""A batch of classification; the tokens of a batch of text."""
LARGEST_TEXT = 1 << 17
"""Tokens of a longer test text are read in windows spread evenly over it."""
LARGEST_WORK = 1 << 35
"""Products of weights and activations that a measurement in int64 may take, some minutes: fewer tokens of
large models."""


@dataclass
class Observed:
    """What a tensor was seen to hold.

    Attributes:
        low, high: smallest and largest integer.
        values: how many there were.
        saturated: of a clamp: how many were at one of its ends.
    """

    low: int
    high: int
    values: int = 0
    saturated: int = 0


@dataclass
class Measurement:
    """A graph on the test split.

    Attributes:
        metric: ``accuracy`` or ``bits_per_byte``. value: its value.
        loss: mean cross entropy in nats per prediction: its exponential is a language model's perplexity.
        examples: sequences, or tokens of text, that it was measured on.
        confusion: [class][predicted class] counts; empty for text.
        observed: by node name.
    """

    metric: str
    value: float
    loss: float
    examples: int
    confusion: list[list[int]]
    observed: dict[str, Observed] = field(default_factory=dict)


def text_tokens(graph: Graph) -> int:
    """About so many tokens of a text are read to measure a model."""
    weights = sum(int(array.size) for node in graph.nodes for array in node.constants.values())
    return max(1, min(LARGEST_TEXT, LARGEST_WORK // max(1, weights)))


def measure(graph: Graph, data: ClassificationData | TextData, window: int) -> Measurement:
    """Run the test split, or :func:`text_tokens` of it.

    Args:
        graph: the model.
        data: its data.
        window: text: tokens per window, as in training.

    Raises:
        MambaintError: if the data does not fit the model.
    """
    if graph.card["task"] == "classification":
        return _measure_classes(graph, data)
    return _measure_text(graph, data, window)


def sample_inputs(graph: Graph, data: ClassificationData | TextData, classes: int, texts: int) -> IntArray:
    """Inputs of ``graph.seq_len`` steps for comparing backends, spread evenly over the test split.

    Args:
        graph: the model. data: its data.
        classes: at most that many sequences of a classification. texts: at most that many windows of a text.

    Returns:
        int64 [n, T, ...]; the whole split if it is no longer than asked for.
    """
    if graph.card["task"] == "classification":
        inputs: NDArray[Any] = _split(data, "test_inputs")
        limit = classes
    else:
        text = _split(data, "test")
        count = len(text) // graph.seq_len
        if not count:
            raise MambaintError(
                f"the test split has {len(text)} tokens, one window has {graph.seq_len}", "give a longer text"
            )
        inputs, limit = text[: count * graph.seq_len].reshape(count, graph.seq_len), texts
    rows = np.arange(min(len(inputs), limit)) * len(inputs) // min(len(inputs), limit)
    return check_input(graph, inputs[rows].astype(np.int64))


def _split(data: Any, name: str) -> NDArray[Any]:
    if not hasattr(data, name):
        raise MambaintError("the data is of another kind than the model's", "give the data of its training")
    values: NDArray[Any] = getattr(data, name).numpy()
    return values


class _Ranges(dict[str, Any]):
    """A trace that keeps of every node what it was seen to hold, :class:`Observed`, and no tensor.

    Args:
        graph: the model.
    """

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self._graph = graph

    def __setitem__(self, name: str, values: IntArray) -> None:
        node = self._graph.by_name.get(name)
        if node is None:
            return
        low, high = int(values.min()), int(values.max())
        if name not in self:
            super().__setitem__(name, Observed(low, high))
        seen: Observed = self[name]
        seen.low, seen.high = min(seen.low, low), max(seen.high, high)
        seen.values += values.size
        if node.op == "clamp":
            ends = (values == node.integer("low")) | (values == node.integer("high"))
            seen.saturated += int(np.count_nonzero(ends))


def _measure_classes(graph: Graph, data: Any) -> Measurement:
    inputs, labels = _split(data, "test_inputs"), _split(data, "test_labels")
    classes = graph.types[graph.output].shape[-1]
    confusion = np.zeros((classes, classes), np.int64)
    ranges = _Ranges(graph)
    scale = 2.0 ** -graph.by_name[graph.output].frac
    loss = 0.0
    for start in range(0, len(labels), SEQUENCES):
        batch = check_input(graph, inputs[start : start + SEQUENCES])
        targets = labels[start : start + SEQUENCES]
        logits = evaluate(graph, batch, ranges)
        loss += _cross_entropy(logits * scale, targets)
        np.add.at(confusion, (targets, logits.argmax(-1)), 1)
    accuracy = int(np.trace(confusion)) / len(labels)
    return Measurement(
        "accuracy", accuracy, loss / len(labels), len(labels), confusion.tolist(), dict(ranges)
    )


def _measure_text(graph: Graph, data: Any, window: int) -> Measurement:
    length = len(_split(data, "test"))
    tokens = text_tokens(graph)
    window = min(window, length - 1, tokens)
    if window < 1:
        raise MambaintError(f"the test split has {length} tokens", "give a longer text")
    starts = np.arange((length - 1) // window) * window
    kept = max(1, tokens // window)
    if len(starts) > kept:
        starts = starts[np.arange(kept) * len(starts) // kept]
    ranges = _Ranges(graph)
    scale = 2.0 ** -graph.by_name[graph.output].frac
    loss, predicted, size = 0.0, 0, max(1, TOKENS // window)
    for first in range(0, len(starts), size):
        windows = data.windows("test", starts[first : first + size], window + 1).numpy()
        logits = evaluate(graph, check_input(graph, windows[:, :-1]), ranges)
        loss += _cross_entropy(logits * scale, windows[:, 1:])
        predicted += int(data.tokenizer.lengths[windows[:, 1:]].sum())
    tokens = len(starts) * window
    bits = loss / predicted / math.log(2)
    return Measurement("bits_per_byte", bits, loss / tokens, tokens, [], dict(ranges))


def _cross_entropy(logits: NDArray[np.floating[Any]], targets: IntArray) -> float:
    """Sum over all positions, in nats."""
    shifted = logits - logits.max(-1, keepdims=True)
    chosen = np.take_along_axis(shifted, targets[..., None], -1)[..., 0]
    return float((np.log(np.exp(shifted).sum(-1)) - chosen).sum())
