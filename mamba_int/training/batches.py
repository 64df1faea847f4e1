"""Training batches as a pure function of (seed, step): a resumed run needs no data position."""

from __future__ import annotations

from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from mamba_int.datasets import ClassificationData, TextData, jitter_values, shift_sequences
from mamba_int.errors import MambaintError
from mamba_int.training.config import TrainingConfig

CALIBRATION_SAMPLES = 256


def _generator(seed: int, stream: int, index: int) -> torch.Generator:
    """A CPU generator of its own for every (seed, stream, index), independent of all others."""
    state = np.random.SeedSequence((seed, stream, index)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) & (2**63 - 1))


class Batches(Protocol):
    """Source of training batches.

    Attributes:
        steps_per_epoch: batches until every sample (or as many tokens as there are) was seen.
        sequences_per_batch: sequences of a batch.
        tokens_per_batch: steps of all sequences of a batch.
        predictions_per_batch: targets of a batch.
        bytes_per_token: of text: bytes that a token of the training split stands for in the mean.
    """

    steps_per_epoch: int
    sequences_per_batch: int
    tokens_per_batch: int
    predictions_per_batch: int
    bytes_per_token: float

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        """The inputs and targets of a step."""
        ...

    def calibration(self) -> Tensor:
        """Inputs for the first look at the activations."""
        ...


class ClassificationBatches:
    """Epochs of a seeded permutation, the incomplete last batch of each left out."""

    def __init__(self, data: ClassificationData, config: TrainingConfig, device: torch.device) -> None:
        if config.shift_augmentation and not data.input_low <= 0 <= data.input_high:
            raise MambaintError(
                f"shift_augmentation fills with 0, outside the inputs {data.input_low}..{data.input_high}",
                "set shift_augmentation = 0",
            )
        inputs, labels = data.train_inputs, data.train_labels
        if config.train_on_validation:
            inputs = torch.cat([inputs, data.validation_inputs])
            labels = torch.cat([labels, data.validation_labels])
        self._inputs = inputs.to(device)
        self._labels = labels.to(device)
        self._noise = config.noise_augmentation
        self._domain = data.input_low, data.input_high
        self._seed = config.seed
        self._reach = config.shift_augmentation
        self._batch = min(config.batch_size, len(self._labels))
        self.steps_per_epoch = len(self._labels) // self._batch
        self.tokens_per_batch = self._batch * data.seq_len
        self.predictions_per_batch = self._batch
        self.sequences_per_batch = self._batch
        self.bytes_per_token = 1.0
        self._order = lru_cache(maxsize=1)(self._permutation)

    def _permutation(self, epoch: int) -> Tensor:
        generator = _generator(self._seed, 0, epoch)
        return torch.randperm(len(self._labels), generator=generator).to(self._labels.device)

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        """int64 [batch, T, C] inputs, augmented as configured, and int64 [batch] labels."""
        epoch, position = divmod(step, self.steps_per_epoch)
        rows = self._order(epoch)[position * self._batch : (position + 1) * self._batch]
        inputs = self._inputs[rows]
        if self._reach:
            inputs = shift_sequences(inputs, self._reach, _generator(self._seed, 1, step))
        if self._noise:
            inputs = jitter_values(inputs, self._noise, *self._domain, _generator(self._seed, 2, step))
        return inputs, self._labels[rows]

    def calibration(self) -> Tensor:
        """int64 [up to 256, T, C]."""
        return self._inputs[self._order(0)[:CALIBRATION_SAMPLES]]


class TextBatches:
    """Windows at random places of a text."""

    def __init__(self, data: TextData, config: TrainingConfig, device: torch.device) -> None:
        self._places = len(data.train) - config.sequence_length
        if self._places < 1:
            raise MambaintError(
                f"the training text of {data.name} has {len(data.train)} tokens, too few for a window of "
                f"{config.sequence_length}",
                "give a longer text or a smaller sequence_length",
            )
        self._data = data
        self._device = device
        self._seed = config.seed
        self._length = config.sequence_length
        self.sequences_per_batch = config.batch_size
        self.tokens_per_batch = config.batch_size * config.sequence_length
        self.predictions_per_batch = self.tokens_per_batch
        self.steps_per_epoch = max(1, len(data.train) // self.tokens_per_batch)
        self.bytes_per_token = data.sizes["train"] / len(data.train)

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        """int64 [batch, T] tokens and int64 [batch, T] next tokens."""
        generator = _generator(self._seed, 0, step)
        starts = torch.randint(0, self._places, (self.sequences_per_batch,), generator=generator)
        # The text stays where it is, perhaps on disk: a batch is small enough to be sent.
        windows = self._data.windows("train", starts.numpy(), self._length + 1).to(self._device)
        return windows[:, :-1], windows[:, 1:]

    def calibration(self) -> Tensor:
        """int64 [batch, T]."""
        return self.at(0)[0]


def make_batches(
    data: ClassificationData | TextData, config: TrainingConfig, device: torch.device
) -> Batches:
    """The batches of a data set, on ``device``."""
    if isinstance(data, TextData):
        return TextBatches(data, config, device)
    return ClassificationBatches(data, config, device)
