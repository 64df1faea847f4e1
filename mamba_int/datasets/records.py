"""What a loaded data set is, and how real features become the integers a model reads."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mamba_int.datasets.tokenizer import Tokenizer
from mamba_int.errors import MambaintError

FEATURE_LIMIT = 127
"""Largest magnitude of an input integer: inputs are int8 without -128."""


@dataclass(frozen=True, eq=False)
class ClassificationData:
    """Labelled integer sequences, split in three.

    Attributes:
        train_inputs, validation_inputs, test_inputs: int64 [n, T, C], inside ``input_low..input_high``.
        train_labels, validation_labels, test_labels: int64 [n], indices into ``class_names``.
        class_names: label texts, in the order of the logits.
        feature_offset, feature_scale: per channel; integer = round((real - offset) * scale).
        input_low, input_high: the domain of the integers.
        name: what to call the data set.
    """

    train_inputs: Tensor
    train_labels: Tensor
    validation_inputs: Tensor
    validation_labels: Tensor
    test_inputs: Tensor
    test_labels: Tensor
    class_names: tuple[str, ...]
    feature_offset: tuple[float, ...]
    feature_scale: tuple[float, ...]
    input_low: int
    input_high: int
    name: str

    @property
    def seq_len(self) -> int:
        """Steps per sequence, T."""
        return self.train_inputs.shape[1]

    @property
    def n_features(self) -> int:
        """Channels per step, C."""
        return self.train_inputs.shape[2]

    @property
    def n_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    def fingerprint(self) -> str:
        """SHA-256 of every split: tells whether a file has changed since a checkpoint was made."""
        return _sha256(
            self.train_inputs,
            self.train_labels,
            self.validation_inputs,
            self.validation_labels,
            self.test_inputs,
            self.test_labels,
        )


SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, eq=False)
class TextData:
    """Text as tokens, split in three contiguous parts.

    Attributes:
        train, validation, test: uint8, uint16 or uint32 [n], in memory or mapped from a token file.
        name: what to call the data set.
        tokenizer: what the tokens mean.
        sizes: bytes of text in every split.
        digest: SHA-256 that a token file states for itself; empty for text in memory.
    """

    train: Tensor
    validation: Tensor
    test: Tensor
    name: str
    tokenizer: Tokenizer
    sizes: Mapping[str, int]
    digest: str

    @property
    def vocab_size(self) -> int:
        """Number of different tokens."""
        return self.tokenizer.vocab_size

    def windows(self, split: str, starts: npt.NDArray[np.int64], length: int) -> Tensor:
        """Tokens int64 [n, length] of a split, from each of the places ``starts`` [n] on.

        Raises:
            MambaintError: if a token is not in the vocabulary: the file is damaged.
        """
        tokens: npt.NDArray[np.unsignedinteger[Any]] = getattr(self, split).numpy()
        found = tokens[starts[:, None] + np.arange(length)].astype(np.int64)
        if found.size and int(found.max()) >= self.vocab_size:
            raise MambaintError(
                f"the data {self.name} holds the token {int(found.max())}, its vocabulary has "
                f"{self.vocab_size}",
                "make the file again with 'mambaint tokenize'",
            )
        return torch.from_numpy(found)

    def fingerprint(self) -> str:
        """SHA-256 of every split: tells whether a file has changed since a checkpoint was made.

        A token file states its own digest, and may be too large to read for nothing else.
        """
        return self.digest or _sha256(self.train, self.validation, self.test)


def _sha256(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {list(tensor.shape)};".encode())
        digest.update(np.ascontiguousarray(tensor.cpu().numpy()).tobytes())
    return digest.hexdigest()


def quantize_features(
    real: npt.ArrayLike | Tensor,
    offset: Sequence[float],
    scale: Sequence[float],
    low: int,
    high: int,
) -> Tensor:
    """Turn features into input integers: clamp(round((real - offset) * scale), low, high).

    Where every offset is 0 and every scale 1 the features *are* the integers, so anything that is
    not an integer inside low..high is refused instead of rounded.

    Args:
        real: [T, C], or [n, T, C] for a batch; any real dtype.
        offset: C offsets.
        scale: C scales.
        low: smallest integer of the domain.
        high: largest integer of the domain.

    Returns:
        int64, shape of ``real``, on the CPU.

    Raises:
        MambaintError: for a wrong shape, text, NaN or infinity, and (scale 1, offset 0) for a value
            that is no integer of the domain, naming its index.
    """
    values = _as_float64(real)
    channels = len(offset)
    if values.ndim not in (2, 3) or values.shape[-1] != channels:
        raise MambaintError(
            f"the input has shape {list(values.shape)}, not [steps, {channels}]",
            f"give one row of {channels} numbers per step",
        )
    _refuse_at(~np.isfinite(values), values, "is not a finite number", "replace or remove it")
    offsets = np.asarray(offset, dtype=np.float64)
    scales = np.asarray(scale, dtype=np.float64)
    if np.all(offsets == 0.0) and np.all(scales == 1.0):
        remedy = f"give integers from {low} to {high}"
        _refuse_at(values != np.rint(values), values, "is not an integer", remedy)
        _refuse_at((values < low) | (values > high), values, f"is outside {low}..{high}", remedy)
        return torch.from_numpy(values.astype(np.int64))
    # An overflow to infinity is clamped like any other large value.
    with np.errstate(over="ignore"):
        integers = np.clip(np.rint((values - offsets) * scales), low, high)
    return torch.from_numpy(integers.astype(np.int64))


def _as_float64(real: npt.ArrayLike | Tensor) -> npt.NDArray[np.float64]:
    array = real.detach().cpu().numpy() if isinstance(real, Tensor) else real
    try:
        return np.asarray(array, dtype=np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise MambaintError(
            f"the input is not a table of numbers ({error})", "give rows of equal length holding numbers"
        ) from error


def _refuse_at(
    faults: npt.NDArray[np.bool_], values: npt.NDArray[np.float64], complaint: str, remedy: str
) -> None:
    if not faults.any():
        return
    index = tuple(int(i) for i in np.argwhere(faults)[0])
    place = "".join(f"[{i}]" for i in index)
    raise MambaintError(f"input{place} = {values[index]:g} {complaint}", remedy)
