"""The training recipe as a value."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, Self

from mamba_int.config import dataclass_from_dict
from mamba_int.errors import MambaintError
from mamba_int.training.schedule import Schedule


@dataclass(frozen=True)
class TrainingConfig:
    """How to train.

    Attributes:
        steps: length of training; 0 to count in epochs.
        epochs: length of training where ``steps`` is 0.
        batch_size: sequences per step (fewer if the data has fewer), over all processes.
        micro_batches: parts a process cuts its share of a batch into, one after the other in memory; the
            gradients add up, so the step is the same up to the rounding of floats.
        gradient_checkpointing: compute the inside of every layer anew in the backward pass instead of
            keeping it: less memory, about a third more time, the same numbers.
        sequence_length: language model: tokens per sequence.
        learning_rate: peak rate; ternary weights want about twice that of a float model.
        twin_learning_rate: peak rate of the float twin; 0 for half of ``learning_rate``.
        warmup_steps: steps of linear warm-up.
        schedule: how the rate moves apart from the warm-up; see
            :func:`~mamba_int.training.schedule.learning_rate_factor`.
        final_rate: what the rate tends to at the end, as a share of its peak.
        decay_rate_factor: learning rate of the heads' decays, as a multiple of ``learning_rate``.
        weight_decay, beta1, beta2: of AdamW.
        weight_decay_on: ``all`` parameters, or ``matrices``: projections alone, not embeddings, taps, biases,
            angles or decays.
        gradient_clip: largest norm of the gradient of a step.
        non_finite_limit: a batch whose loss or gradient is not finite is left out, and what it did undone;
            the run gives up at this many.
        freeze_at: fraction of training after which the activation scales are frozen.
        observe_every: steps between looks at the activations that set their scales, until they are frozen; on
            a GPU the steps between run as CUDA graphs.
        autocast: float models on a GPU: dtype of matrix products and activations in training steps
            (``torch.autocast``); ``none`` for float32. Weights, states and scores are float32 in any case.
        label_smoothing: of the cross entropy.
        shift_augmentation: classification: reach of random shifts in step and feature.
        noise_augmentation: classification: non-zero inputs move by a random integer up to this, clamped.
        train_on_validation: classification: train on the validation split too and keep the last weights:
            for a recipe whose choices have been made.
        average_from: fraction of training from which the weights are averaged uniformly, and the
            average instead of the last weights is validated and kept; 0 for never.
        seed: of initial weights, order of the data and augmentation.
        validate_every: steps between validations; 0 for twenty in all.
        validation_tokens: language model: tokens of the validation split used while training.
        evaluation_length: language model: window in which validation and test text is read.
        checkpoint_every: steps between saves of the state for resuming, and for going back to if the
            weights are no longer finite.
        threads: CPU threads; 0 leaves PyTorch's choice. Models of this size gain nothing from a second
            thread, and lose a factor of 25 to it (2.3 s against 59 s for 200 steps of digits, on 2 cores)
            where another process wants the same cores.
    """

    steps: int = 0
    epochs: int = 60
    batch_size: int = 32
    micro_batches: int = 1
    gradient_checkpointing: bool = False
    sequence_length: int = 128
    learning_rate: float = 2e-2
    twin_learning_rate: float = 0.0
    warmup_steps: int = 50
    schedule: Schedule = "linear"
    final_rate: float = 0.0
    decay_rate_factor: float = 1.0
    weight_decay: float = 0.0
    weight_decay_on: Literal["all", "matrices"] = "all"
    beta1: float = 0.9
    beta2: float = 0.98
    gradient_clip: float = 1.0
    non_finite_limit: int = 3
    freeze_at: float = 0.5
    observe_every: int = 1
    autocast: Literal["none", "bfloat16"] = "none"
    label_smoothing: float = 0.0
    shift_augmentation: int = 0
    noise_augmentation: int = 0
    train_on_validation: bool = False
    average_from: float = 0.0
    seed: int = 0
    validate_every: int = 0
    validation_tokens: int = 16384
    evaluation_length: int = 1024
    checkpoint_every: int = 200
    threads: int = 1

    def __post_init__(self) -> None:
        def need(condition: bool, key: str, remedy: str) -> None:
            if not condition:
                raise MambaintError(f"[training] {key} = {getattr(self, key)}", remedy)

        for key in (
            "batch_size",
            "micro_batches",
            "non_finite_limit",
            "observe_every",
            "sequence_length",
            "validation_tokens",
            "evaluation_length",
            "checkpoint_every",
        ):
            need(getattr(self, key) >= 1, key, "give a positive integer")
        for key in (
            "steps",
            "epochs",
            "warmup_steps",
            "shift_augmentation",
            "noise_augmentation",
            "validate_every",
            "threads",
        ):
            need(getattr(self, key) >= 0, key, "give 0 or more")
        need(self.steps > 0 or self.epochs > 0, "epochs", "give steps or epochs above 0")
        need(0 <= self.seed < 2**63, "seed", "give an integer from 0 to 2^63 - 1")
        for key in ("learning_rate", "decay_rate_factor"):
            value = getattr(self, key)
            need(math.isfinite(value) and value > 0, key, "give a positive number")
        for key in ("twin_learning_rate", "weight_decay"):
            need(math.isfinite(getattr(self, key)) and getattr(self, key) >= 0, key, "give 0 or more")
        need(self.gradient_clip > 0, "gradient_clip", "give a positive number")
        for key in ("beta1", "beta2", "label_smoothing", "final_rate"):
            need(0 <= getattr(self, key) < 1, key, "give a number from 0 up to, not including, 1")
        need(0 <= self.freeze_at <= 1, "freeze_at", "give a fraction of training from 0 to 1")
        need(
            self.average_from == 0 or self.freeze_at <= self.average_from < 1,
            "average_from",
            "give 0, or a fraction of training from freeze_at up to, not including, 1",
        )

    def twin(self) -> Self:
        """The recipe of the float twin: the same, at its own learning rate."""
        rate = self.twin_learning_rate or self.learning_rate / 2
        return dataclasses.replace(self, learning_rate=rate)

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON-able values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Inverse of :meth:`to_dict`; raises MambaintError on unknown keys or wrong values."""
        return dataclass_from_dict(cls, values, "[training]")
