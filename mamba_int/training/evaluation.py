"""Accuracy and bits per byte of a model in eval mode."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from mamba_int.datasets import ClassificationData, TextData
from mamba_int.errors import MambaintError
from mamba_int.training.data_parallel import ALONE, Ranks


class Predictor(Protocol):
    """What can be scored: real-valued logits of integer inputs, as a model in training has them."""

    def __call__(self, inputs: Tensor) -> Tensor: ...

    def eval(self) -> Any: ...


_CLASSIFICATION_BATCH = 256
_TOKENS_PER_BATCH = 8192


@dataclass(frozen=True)
class Score:
    """Result of an evaluation.

    Attributes:
        metric: accuracy (classification) or bits per byte (language model).
        loss: mean cross entropy in nats per prediction.
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
    model: Predictor,
    data: ClassificationData | TextData,
    split: str,
    device: torch.device,
    window: int = 1024,
    max_tokens: int | None = None,
    ranks: Ranks = ALONE,
) -> Score:
    """Score a model on a split, in eval mode; the mode is left at eval.

    Args:
        model: the model, on ``device``.
        data: the data set.
        split: ``train``, ``validation`` or ``test``.
        device: where to compute.
        window: language model: length of the windows the text is cut into (shorter for a short text).
        max_tokens: language model: use about that many tokens, in windows spread evenly over the split.
        ranks: the processes that share the work; all get the same score.

    Raises:
        MambaintError: if the text split is too short for one prediction, or the loss is not finite.
    """
    model.eval()
    with torch.inference_mode():
        if isinstance(data, TextData):
            score = _evaluate_text(model, data, split, device, window, max_tokens, ranks)
        else:
            inputs, labels = getattr(data, f"{split}_inputs"), getattr(data, f"{split}_labels")
            score = _evaluate_classes(model, inputs, labels, device, ranks)
    if not math.isfinite(score.loss):
        raise MambaintError(
            f"the loss on the {split} split is not finite", "lower learning_rate, and train with --restart"
        )
    return score


def _evaluate_classes(
    model: Predictor, inputs: Tensor, labels: Tensor, device: torch.device, ranks: Ranks
) -> Score:
    totals = torch.zeros(2, dtype=torch.float64, device=device)  # right answers, loss
    batch = _CLASSIFICATION_BATCH
    for start in range(ranks.rank * batch, len(labels), ranks.count * batch):
        logits = model(inputs[start : start + batch].to(device))
        targets = labels[start : start + batch].to(device)
        totals[0] += (logits.argmax(-1) == targets).sum()
        totals[1] += functional.cross_entropy(logits, targets, reduction="sum").double()
    ranks.sum(totals)
    correct, loss = totals.tolist()
    return Score(int(correct) / len(labels), loss / len(labels), higher_is_better=True)


def _evaluate_text(
    model: Predictor,
    data: TextData,
    split: str,
    device: torch.device,
    window: int,
    max_tokens: int | None,
    ranks: Ranks,
) -> Score:
    length = len(getattr(data, split))
    window = min(window, length - 1)
    if window < 1:
        raise MambaintError(f"the {split} split has {length} tokens", "give a longer text")
    count = (length - 1) // window
    starts = np.arange(count) * window
    if max_tokens is not None and count * window > max_tokens:
        kept = max(1, max_tokens // window)
        starts = starts[np.arange(kept) * count // kept]
    totals = torch.zeros(2, dtype=torch.float64, device=device)  # loss, bytes predicted
    batch = max(1, _TOKENS_PER_BATCH // window)
    for first in range(ranks.rank * batch, len(starts), ranks.count * batch):
        windows = data.windows(split, starts[first : first + batch], window + 1)
        targets = windows[:, 1:]
        logits = model(windows[:, :-1].to(device))
        totals[0] += functional.cross_entropy(
            logits.flatten(0, 1), targets.to(device).flatten(), reduction="sum"
        ).double()
        totals[1] += int(data.tokenizer.lengths[targets.numpy()].sum())
    ranks.sum(totals)
    loss, size = totals.tolist()
    return Score(loss / size / math.log(2), loss / (len(starts) * window), higher_is_better=False)
