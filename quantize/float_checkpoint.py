"""Float checkpoints of any program, paired with data: what conversion, comparison and scoring need of them.

The data's integers are what the converted graph reads. A model trained here reads them as they are, times a
power of two. A model of another program reads real features; data files come with an offset and a scale that
make integers of them, which are taken into the model's first linear map. So one forward serves for both.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mamba_int.datasets import ClassificationData, TextData, load_data, source_from_path
from mamba_int.datasets.tokenizer import TOKENIZER_FILE
from mamba_int.errors import MambaintError
from mamba_int.float_models.mixer import Mixer
from mamba_int.float_models.models import MambaForCausalLM, MambaForSequenceClassification
from mamba_int.training import Checkpoint, load_checkpoint
from mamba_int.training.container import METADATA_KEY
from mamba_int.training.float_model import input_places, restored_float_model
from quantize.calibration import Convertible, FloatModel
from quantize.conversion_config import InputFormat
from quantize.importers import load_float_model
from quantize.importers.source import TORCH_SUFFIXES
from quantize.latest import CHECKPOINT_FILE
from quantize.model_data import ModelInputs, load_model_data, load_tokens

RUN = "mambaint-run"
"""Format of what ``mambaint train`` writes."""
WINDOW = 256
"""Tokens of a calibration sequence for models whose recipe is not known."""
EVALUATION_WINDOW = 1024
SEQUENCES, WINDOWS = 256, 64
"""Calibration inputs by default: sequences to classify, windows of text."""


def is_foreign(path: Path) -> bool:
    """Whether a path is a float checkpoint of another program rather than one of ``mambaint train``."""
    if path.is_dir():
        return not (path / CHECKPOINT_FILE).is_file()
    if path.suffix in (*TORCH_SUFFIXES, ".npz"):
        return True
    if path.suffix != ".safetensors" or not path.is_file():
        return False
    try:
        with safe_open(path, "np") as file:
            return METADATA_KEY not in (file.metadata() or {})
    except (SafetensorError, OSError):
        # Damaged: the reader of our own says how.
        return False


@dataclass(frozen=True, eq=False)
class FloatCheckpoint:
    """A float model as it was found.

    Attributes:
        path: a folder or file.
        format: ``mambaint-run``, or a key of ``quantize.importers.IMPORTERS``.
        model: float32, on the CPU, in eval mode.
        sha256: of the run's file, or of the parameters in float32.
        notes: what differs from the source, or had to be assumed.
        run: of a model trained here.
    """

    path: Path
    format: str
    model: Convertible
    sha256: str
    notes: tuple[str, ...]
    run: Checkpoint | None

    @property
    def folder(self) -> Path:
        """Where it lies."""
        return self.path if self.path.is_dir() else self.path.parent


def run_checkpoint(path: Path, run: Checkpoint) -> FloatCheckpoint:
    """The float model that ``mambaint train`` left.

    Raises:
        MambaintError: if the checkpoint is of a native model, or does not fit together.
    """
    return FloatCheckpoint(path, RUN, restored_float_model(run).model, run.sha256, (), run)


def read_float_checkpoint(path: Path, format: str | None = None) -> FloatCheckpoint:
    """Read a float checkpoint of any known program, ``mambaint train`` included.

    Args:
        path: a folder or file.
        format: key of ``quantize.importers.IMPORTERS``; recognised if not given.

    Raises:
        MambaintError: as ``load_float_model`` and ``load_checkpoint``.
    """
    if format is None and not is_foreign(path):
        file = path / CHECKPOINT_FILE if path.is_dir() else path
        return run_checkpoint(file, load_checkpoint(file))
    model, description = load_float_model(path, format)
    assert isinstance(model, Convertible)
    return FloatCheckpoint(path, description.format, model, _digest(model), description.notes, None)


def _digest(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {list(parameter.shape)};".encode())
        digest.update(np.ascontiguousarray(parameter.detach().numpy()).tobytes())
    return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class FloatTask:
    """A float model and data in the integers that its graph reads.

    Attributes:
        checkpoint: where the model is from.
        model: the model, with the scale of the features in its first map if the data has one.
        data: to calibrate and to measure on.
        input_format: what the integers are to the model; None for token ids.
        sequence_length: steps of a calibration sequence by default.
        evaluation_window: tokens in which text is read when it is scored.
    """

    checkpoint: FloatCheckpoint
    model: FloatModel
    data: ClassificationData | TextData
    input_format: InputFormat | None
    sequence_length: int
    evaluation_window: int

    def inputs(self, integers: Tensor) -> Tensor:
        """Inputs as the float model takes them, of integers as the graph takes them."""
        if self.input_format is None:
            return integers
        reals: Tensor = integers * 2.0**-self.input_format.frac
        return reals

    def __call__(self, inputs: Tensor) -> Tensor:
        """float32 logits of inputs as the graph takes them: what ``mamba_int.training.evaluate`` scores."""
        logits: Tensor = self.model(self.inputs(inputs)).logits
        return logits.float()

    def eval(self) -> None:
        """Take dropout out."""
        self.model.eval()

    def to(self, device: torch.device) -> FloatTask:
        """Move the model."""
        self.model.to(device)
        return self

    def calibration(self, samples: int | None = None, seq_len: int | None = None) -> Tensor:
        """Integers of the training split, spread evenly over it, int64 [n, T, ...].

        Args:
            samples: at most that many sequences; 256 to classify, or 64 windows of text, if not given.
            seq_len: text: steps that will be exported; windows have at least so many.

        Raises:
            MambaintError: for another ``seq_len`` than the data's, or a text shorter than a window.
        """
        if isinstance(self.data, ClassificationData):
            if seq_len not in (None, self.data.seq_len):
                raise MambaintError(
                    f"the sequences of {self.data.name} have {self.data.seq_len} steps, not {seq_len}",
                    "leave out --seq-len: it is for text",
                )
            inputs = self.data.train_inputs
            count = min(samples or SEQUENCES, len(inputs))
            return inputs[torch.arange(count) * len(inputs) // count]
        length = max(self.sequence_length, seq_len or 1)
        places = len(self.data.train) // length
        if not places:
            raise MambaintError(
                f"the training split of {self.data.name} has {len(self.data.train)} tokens, a calibration "
                f"sequence {length}",
                "give a longer text",
            )
        count = min(samples or WINDOWS, places)
        return self.data.windows("train", np.arange(count) * places // count * length, length)

    def card(self, seq_len: int) -> dict[str, Any]:
        """Entries of the graph's card that tell of the data and the checkpoint, as native graphs have them.

        Args:
            seq_len: steps of the graph.
        """
        data = self.data
        if isinstance(data, TextData):
            classes: list[str] = []
            described: dict[str, Any] = {
                "description": f"{seq_len} token ids",
                "low": 0,
                "high": self.model.config.vocab_size - 1,
                "feature_offset": [],
                "feature_scale": [],
            }
        else:
            assert self.input_format is not None
            classes = list(data.class_names)
            described = describe_features(seq_len, self.input_format, data.feature_offset, data.feature_scale)
        return {
            "classes": classes,
            "input": described,
            "dataset": {"name": data.name, "fingerprint": data.fingerprint()},
            "checkpoint_sha256": self.checkpoint.sha256,
            "checkpoint_format": self.checkpoint.format,
        }


def describe_features(
    steps: int, kind: InputFormat, offset: Sequence[float], scale: Sequence[float]
) -> dict[str, Any]:
    """What a card says of real inputs: integer = round((real - offset) * scale), clamped to the domain.

    Args:
        steps: of a sequence. kind: domain of the integers, and what they are to the float model.
        offset, scale: of every feature.
    """
    return {
        "description": f"{steps} steps of {len(scale)} features",
        "low": kind.low,
        "high": kind.high,
        "frac": kind.frac,
        "feature_offset": list(offset),
        "feature_scale": list(scale),
    }


def pair_with_data(checkpoint: FloatCheckpoint, path: Path | None) -> FloatTask:
    """A float model with the data of a file, or with that of its training.

    Args:
        checkpoint: the model.
        path: a data file; needed for models that were not trained here.

    Raises:
        MambaintError: if there is no data, it cannot be read, or it does not fit the model.
    """
    run, model = checkpoint.run, checkpoint.model
    if not isinstance(model, MambaForCausalLM | MambaForSequenceClassification):
        what = "a mixer alone" if isinstance(model, Mixer) else "a backbone without a head"
        raise MambaintError(
            f"{checkpoint.path} is {what}, which gives no answers that could be scored",
            "convert it in Python: quantize(path, inputs)",
        )
    if run is not None:
        data = load_model_data(ModelInputs.of_checkpoint(run, checkpoint.folder), path)
        if path is None and data.fingerprint() != run.data.fingerprint:
            raise MambaintError(
                f"the data {run.data.name} has changed since the training",
                "restore it, give it with --data, or train again with --restart",
            )
        frac = 0
        if isinstance(data, ClassificationData):
            frac = input_places(run.data.input_low, run.data.input_high)
        recipe = run.training_config
        return _task(checkpoint, model, data, frac, recipe.sequence_length, recipe.evaluation_length)
    if path is None:
        raise MambaintError(
            f"{checkpoint.path} does not say what data it was trained on",
            "give data to calibrate on with --data PATH: text or .tokens, or .csv, .npz or .ts to classify",
        )
    data = _foreign_data(checkpoint, path)
    if isinstance(data, ClassificationData):
        _take_in_scale(model, data)
    return _task(checkpoint, model, data, 0, WINDOW, EVALUATION_WINDOW)


def _task(
    checkpoint: FloatCheckpoint,
    model: FloatModel,
    data: ClassificationData | TextData,
    frac: int,
    sequence_length: int,
    window: int,
) -> FloatTask:
    kind = None if isinstance(data, TextData) else InputFormat(data.input_low, data.input_high, frac)
    return FloatTask(checkpoint, model, data, kind, sequence_length, window)


def _foreign_data(checkpoint: FloatCheckpoint, path: Path) -> ClassificationData | TextData:
    """The data of a file, made sure to be of the model's kind and shape."""
    c, source = checkpoint.model.config, source_from_path(path)
    classify = isinstance(checkpoint.model, MambaForSequenceClassification)
    if classify and not c.n_features:
        raise MambaintError(
            f"{checkpoint.path} classifies token ids, for which no data file has labels",
            "convert it in Python: quantize(model, calibration)",
        )
    if source.is_text == classify:
        wanted = f"{c.n_features} features a step and {c.num_labels} classes" if classify else "tokens"
        raise MambaintError(
            f"{checkpoint.path} reads {wanted}, the data {path.name} is "
            f"{'text' if source.is_text else 'labelled sequences'}",
            "give a .csv, .npz or .ts file" if classify else "give a text, or a file of 'mambaint tokenize'",
        )
    if not source.is_text:
        data = load_data(source)
        assert isinstance(data, ClassificationData)
        for what, found, expected in (
            ("features a step", data.n_features, c.n_features),
            ("classes", data.n_classes, c.num_labels),
        ):
            if found != expected:
                raise MambaintError(
                    f"the data {path.name} has {found} {what}, the model {expected}",
                    "give data that the model was made for",
                )
        return data
    text = load_tokens(source, c.vocab_size, checkpoint.folder)
    if text.tokenizer.kind == "bytes" and c.vocab_size != text.vocab_size:
        raise MambaintError(
            f"the model has {c.vocab_size} tokens, not bytes, and no {TOKENIZER_FILE} lies beside it",
            f"put its {TOKENIZER_FILE} there, or give a .tokens file of 'mambaint tokenize --tokenizer-file'",
        )
    if text.vocab_size > c.vocab_size:
        raise MambaintError(
            f"the data {path.name} has {text.vocab_size} tokens, the model {c.vocab_size}",
            "use the tokenizer of the model",
        )
    return text


def _take_in_scale(model: FloatModel, data: ClassificationData) -> None:
    """Make a model of real features read integers: x = integer / scale + offset, within its first map."""
    first = model.backbone.embeddings
    assert isinstance(first, nn.Linear)
    offset, scale = (
        torch.tensor(values, dtype=torch.float64) for values in (data.feature_offset, data.feature_scale)
    )
    with torch.no_grad():
        weight, bias = first.weight.double(), first.bias.double()
        first.bias.copy_(bias + weight @ offset)
        first.weight.copy_(weight / scale)
