"""Accuracy and bits per byte of a model in eval mode."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from mamba_int.datasets import ClassificationData, TextData
from mamba_int.errors import MambaintError
from mamba_int.training.protocol import TrainableModel

_CLASSIFICATION_BATCH = 256
_TOKENS_PER_BATCH = 8192


@dataclass(frozen=True)
class Score:
    """Result of an evaluation.

    Attributes:
        metric: accuracy (classification) or bits per byte (language model).
        loss: mean cross entropy in nats.
        higher_is_better: whether ``metric`` is an accuracy.
    """

    metric: float
    loss: float
    higher_is_better: bool

    def better_than(self, other: Score | None) -> bool:
        """Whether this beats ``other``; equal accuracies are decided by the loss."""
        if other is None:
            return True
        if self.higher_is_better and self.metric != other.metric:
            return self.metric > other.metric
        return self.loss < other.loss


def evaluate(
    model: TrainableModel,
    data: ClassificationData | TextData,
    split: str,
    device: torch.device,
    window: int = 1024,
    max_tokens: int | None = None,
) -> Score:
    """Score a model on a split, in eval mode; the mode is left at eval.

    Args:
        model: the model, on ``device``.
        data: the data set.
        split: ``train``, ``validation`` or ``test``.
        device: where to compute.
        window: language model: length of the windows the text is cut into (shorter for a short text).
        max_tokens: language model: use about that many tokens, in windows spread evenly over the split.

    Raises:
        MambaintError: if the text split is too short for one prediction, or the loss is not finite.
    """
    model.eval()
    with torch.inference_mode():
        if isinstance(data, TextData):
            score = _evaluate_text(model, getattr(data, split), device, window, max_tokens)
        else:
            inputs, labels = getattr(data, f"{split}_inputs"), getattr(data, f"{split}_labels")
            score = _evaluate_classes(model, inputs, labels, device)
    if not math.isfinite(score.loss):
        raise MambaintError(
            f"the loss on the {split} split is not finite", "lower learning_rate, and train with --restart"
        )
    return score


def _evaluate_classes(model: TrainableModel, inputs: Tensor, labels: Tensor, device: torch.device) -> Score:
    correct = torch.zeros((), dtype=torch.int64, device=device)
    loss = torch.zeros((), dtype=torch.float64, device=device)
    for start in range(0, len(labels), _CLASSIFICATION_BATCH):
        logits = model(inputs[start : start + _CLASSIFICATION_BATCH].to(device))
        targets = labels[start : start + _CLASSIFICATION_BATCH].to(device)
        correct += (logits.argmax(-1) == targets).sum()
        loss += functional.cross_entropy(logits, targets, reduction="sum").double()
    return Score(int(correct) / len(labels), float(loss) / len(labels), higher_is_better=True)


def _evaluate_text(
    model: TrainableModel, text: Tensor, device: torch.device, window: int, max_tokens: int | None
) -> Score:
    window = min(window, len(text) - 1)
    if window < 1:
        raise MambaintError(f"a text split has {len(text)} bytes", "give a longer text")
    count = (len(text) - 1) // window
    starts = torch.arange(count) * window
    if max_tokens is not None and count * window > max_tokens:
        kept = max(1, max_tokens // window)
        starts = starts[torch.arange(kept) * count // kept]
    loss = torch.zeros((), dtype=torch.float64, device=device)
    batch = max(1, _TOKENS_PER_BATCH // window)
    for first in range(0, len(starts), batch):
        chunk = starts[first : first + batch]
        windows = text[chunk[:, None] + torch.arange(window + 1)].long().to(device)
        logits = model(windows[:, :-1])
        loss += functional.cross_entropy(
            logits.flatten(0, 1), windows[:, 1:].flatten(), reduction="sum"
        ).double()
    mean = float(loss) / (len(starts) * window)
    return Score(mean / math.log(2), mean, higher_is_better=False)
