"""Data that means to a model what its training data meant: the same scale of features, the same tokens."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from mamba_int.datasets import (
    ClassificationData,
    DataSource,
    TextData,
    Tokenizer,
    find_tokenizer,
    load_data,
    source_from_path,
)
from mamba_int.datasets.records import SPLITS
from mamba_int.datasets.text_file import split_places
from mamba_int.datasets.tokenizer import TOKENIZER_FILE
from mamba_int.errors import MambaintError
from mamba_int.training import Checkpoint

EMBEDDED = ("digits", "moby-dick")


@dataclass(frozen=True)
class ModelInputs:
    """What a model reads.

    Attributes:
        name: of the data that it was made from.
        source: where that is; None if unknown.
        scale: offset and scale of every feature; empty for text.
        tokens: size of the vocabulary; 0 for features.
        folder: where the model lies, perhaps with a ``tokenizer.json``.
    """

    name: str
    source: DataSource | None
    scale: tuple[list[float], list[float]]
    tokens: int
    folder: Path

    @classmethod
    def of_checkpoint(cls, checkpoint: Checkpoint, folder: Path) -> ModelInputs:
        """What the model of a run reads."""
        data = checkpoint.data
        scale = list(data.feature_offset), list(data.feature_scale)
        tokens = data.tokenizer.vocab_size if data.tokenizer else 0
        return cls(data.name, data.source, scale, tokens, folder)


def load_model_data(inputs: ModelInputs, path: Path | None) -> ClassificationData | TextData:
    """The data file that is asked for, or else that of the model's training.

    Raises:
        MambaintError: if there is none, it cannot be read, or it means something else to the model.
    """
    if path is not None:
        source = source_from_path(path)
    elif inputs.source is not None:
        source = inputs.source
    elif inputs.name in EMBEDDED:
        source = DataSource.from_dict({"kind": inputs.name})
    else:
        raise MambaintError(
            f"the model was made from '{inputs.name}', which is not embedded", "give it with --data"
        )
    data = load_tokens(source, inputs.tokens, inputs.folder) if source.is_text else load_data(source)
    if isinstance(data, TextData):
        fits = data.vocab_size == inputs.tokens or (
            (inputs.folder / TOKENIZER_FILE).is_file()
            and data.tokenizer == find_tokenizer(inputs.tokens, inputs.folder)
        )
    else:
        # The integers of the input are the features on this scale: on another they are another input.
        scale = list(data.feature_offset), list(data.feature_scale)
        fits = not inputs.tokens and inputs.scale == scale
    if not fits:
        raise MambaintError(
            f"the data {data.name} is not on the scale, or in the tokens, of the model's own",
            "give the file of its training, or tokens of the same tokenizer",
        )
    return data


def load_tokens(source: DataSource, vocab_size: int, folder: Path) -> TextData:
    """A text in tokens; a plain one is read with the ``tokenizer.json`` of ``folder`` if the model has one.

    Args:
        source: of text.
        vocab_size: of the model; plain text is bytes to one of 256.
        folder: of the model.

    Raises:
        MambaintError: for a tokenizer that does not fit the vocabulary; as :func:`load_data`.
    """
    data = load_data(source)
    assert isinstance(data, TextData)
    if source.kind == "tokens" or not (folder / TOKENIZER_FILE).is_file():
        return data
    return tokenized(data, find_tokenizer(vocab_size, folder))


def tokenized(text: TextData, tokenizer: Tokenizer) -> TextData:
    """A text of bytes in the tokens of a BPE; its splits move to where characters start.

    Raises:
        MambaintError: if it is not UTF-8, or the tokenizer loses something of it.
    """
    content = np.concatenate([getattr(text, split).numpy() for split in SPLITS]).tobytes()
    places = split_places(len(content))
    for i, place in enumerate(places):
        while place < len(content) and content[place] & 0xC0 == 0x80:
            place += 1
        places[i] = place
    parts = [content[start:stop] for start, stop in pairwise(places)]
    train, validation, test = (torch.from_numpy(tokenizer.encode(part).astype(np.uint32)) for part in parts)
    sizes = {split: len(part) for split, part in zip(SPLITS, parts, strict=True)}
    return TextData(train, validation, test, text.name, tokenizer, sizes, "")
