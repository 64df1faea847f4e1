"""The checkpoint: one safetensors file with weights, frozen integers and everything needed to use them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from mamba_int.datasets import ClassificationData, DataSource, TextData, Tokenizer
from mamba_int.errors import MambaintError
from mamba_int.files import read_bytes
from mamba_int.training.config import TrainingConfig
from mamba_int.training.container import read_container, require_keys, write_container
from mamba_int.training.model_config import ModelConfig, model_config_from_dict

FORMAT = "mambaint-checkpoint"
VERSION = 2
_REMEDY = "give a checkpoint written by 'mambaint train'"
_ENTRIES: dict[str, type] = {
    "format": str,
    "version": int,
    "model": dict,
    "training": dict,
    "data": dict,
    "results": dict,
}
_DATA_ENTRIES: dict[str, type] = {
    "name": str,
    "source": dict,
    "fingerprint": str,
    "class_names": list,
    "feature_offset": list,
    "feature_scale": list,
    "input_low": int,
    "input_high": int,
    "tokenizer": dict,
}
_RESULTS = (
    "test_accuracy",
    "validation_accuracy",
    "test_bits_per_byte",
    "validation_bits_per_byte",
    "step",
    "train_seconds",
)


@dataclass(frozen=True)
class DataDescription:
    """What a checkpoint remembers of its data.

    Attributes:
        name: name of the data set.
        source: how to load it again, so that the test split is at hand for calibration.
        fingerprint: SHA-256 of the splits as they were.
        class_names: label texts in the order of the logits; empty for text.
        feature_offset, feature_scale: for ``quantize_features``; empty for text.
        input_low, input_high: domain of the input integers (token ids of text).
        tokenizer: of text; None for classification.
    """

    name: str
    source: DataSource
    fingerprint: str
    class_names: tuple[str, ...]
    feature_offset: tuple[float, ...]
    feature_scale: tuple[float, ...]
    input_low: int
    input_high: int
    tokenizer: Tokenizer | None = None

    @classmethod
    def of(cls, data: ClassificationData | TextData, source: DataSource) -> Self:
        """Describe a loaded data set."""
        if isinstance(data, TextData):
            top = data.vocab_size - 1
            return cls(data.name, source, data.fingerprint(), (), (), (), 0, top, data.tokenizer)
        return cls(
            data.name,
            source,
            data.fingerprint(),
            data.class_names,
            data.feature_offset,
            data.feature_scale,
            data.input_low,
            data.input_high,
            None,
        )

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON-able values."""
        return {
            "name": self.name,
            "source": self.source.to_dict(),
            "fingerprint": self.fingerprint,
            "class_names": list(self.class_names),
            "feature_offset": list(self.feature_offset),
            "feature_scale": list(self.feature_scale),
            "input_low": self.input_low,
            "input_high": self.input_high,
            "tokenizer": self.tokenizer.to_dict() if self.tokenizer else {},
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Inverse of :meth:`to_dict`; raises MambaintError for anything else."""
        require_keys(values, _DATA_ENTRIES, "the checkpoint's data", _REMEDY)
        offset, scale, names = values["feature_offset"], values["feature_scale"], values["class_names"]
        numbers_valid = all(type(v) in (int, float) and math.isfinite(v) for v in (*offset, *scale))
        if not numbers_valid or len(offset) != len(scale) or not all(isinstance(name, str) for name in names):
            raise MambaintError("the checkpoint's data description is inconsistent", _REMEDY)
        return cls(
            values["name"],
            DataSource.from_dict(values["source"]),
            values["fingerprint"],
            tuple(names),
            tuple(map(float, offset)),
            tuple(map(float, scale)),
            values["input_low"],
            values["input_high"],
            Tokenizer.from_dict(values["tokenizer"], "the checkpoint") if values["tokenizer"] else None,
        )


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A checkpoint in memory.

    Attributes:
        model_config: the configuration of the native or float model.
        training_config: the recipe it was trained with.
        data: its data.
        results: measured numbers by name, such as ``test_accuracy``.
        model_state: for ``model.load_state_dict``.
        integers: the frozen integers, int64, by name; empty for a float twin and a float model.
        sha256: hex digest of the file.
    """

    model_config: ModelConfig
    training_config: TrainingConfig
    data: DataDescription
    results: dict[str, float]
    model_state: dict[str, Tensor]
    integers: dict[str, Tensor]
    sha256: str


def save_checkpoint(
    path: Path,
    model_config: ModelConfig,
    training_config: TrainingConfig,
    data: DataDescription,
    results: Mapping[str, float],
    model_state: Mapping[str, Tensor],
    integers: Mapping[str, Tensor],
) -> None:
    """Write a checkpoint atomically; the arguments are fields of :class:`Checkpoint`.

    Raises:
        MambaintError: if ``path`` cannot be written.
    """
    tensors = {f"model.{name}": tensor for name, tensor in model_state.items()}
    tensors |= {f"integer.{name}": tensor for name, tensor in integers.items()}
    description = {
        "format": FORMAT,
        "version": VERSION,
        "model": model_config.to_dict(),
        "training": training_config.to_dict(),
        "data": data.to_dict(),
        "results": dict(results),
    }
    write_container(path, tensors, description)


def load_checkpoint(path: Path) -> Checkpoint:
    """Read and check a checkpoint.

    Raises:
        MambaintError: if it is missing, damaged, foreign, of another version, or holds anything
            unexpected.
    """
    tensors, description = read_container(path, _REMEDY)
    if description.get("format") != FORMAT:
        raise MambaintError(f"{path} is not a checkpoint but '{description.get('format')}'", _REMEDY)
    if description.get("version") != VERSION:
        raise MambaintError(
            f"{path} has checkpoint version {description.get('version')}, this program reads {VERSION}",
            "train again, or use the version of mambaint that wrote it",
        )
    require_keys(description, _ENTRIES, str(path), _REMEDY)
    model_state: dict[str, Tensor] = {}
    integers: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        kind, _, short = name.partition(".")
        if kind == "model" and short and not (tensor.is_floating_point() and not tensor.isfinite().all()):
            model_state[short] = tensor
        elif kind == "integer" and short and tensor.dtype == torch.int64:
            integers[short] = tensor
        else:
            raise MambaintError(f"{path} holds an unexpected or non-finite tensor '{name}'", _REMEDY)
    results = description["results"]
    if not all(name in _RESULTS and type(value) in (int, float) for name, value in results.items()):
        raise MambaintError(f"{path} holds unexpected results", _REMEDY)
    return Checkpoint(
        model_config_from_dict(description["model"]),
        TrainingConfig.from_dict(description["training"]),
        DataDescription.from_dict(description["data"]),
        results,
        model_state,
        integers,
        hashlib.sha256(read_bytes(path, _REMEDY)).hexdigest(),
    )
