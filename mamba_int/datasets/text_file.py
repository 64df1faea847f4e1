"""Any file as a text of bytes."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from mamba_int.datasets.records import SPLITS, TextData
from mamba_int.datasets.tokenizer import BYTES
from mamba_int.errors import MambaintError
from mamba_int.files import read_bytes

SHORTEST_TEXT = 100
"""Fewer bytes leave a validation split of less than two windows of one byte."""


def split_places(size: int) -> list[int]:
    """Where the splits of a text begin and end: 85 % train, 5 % validation, 10 % test."""
    return [0, size * 85 // 100, size * 90 // 100, size]


def split_text(content: bytes, name: str) -> TextData:
    """Split bytes into the first 85 % (train), the next 5 % (validation) and the last 10 % (test).

    Raises:
        MambaintError: if there are fewer than 100 bytes.
    """
    if len(content) < SHORTEST_TEXT:
        raise MambaintError(
            f"the text {name} has {len(content)} bytes, fewer than {SHORTEST_TEXT}", "give a longer text"
        )
    places = split_places(len(content))
    tokens = torch.from_numpy(np.frombuffer(content, dtype=np.uint8).copy())
    train, validation, test = (tokens[start:stop].clone() for start, stop in pairwise(places))
    sizes = {split: len(part) for split, part in zip(SPLITS, (train, validation, test), strict=True)}
    return TextData(train, validation, test, name, BYTES, sizes, "")


def load_text(path: Path) -> TextData:
    """Read any file as bytes; see :func:`split_text`."""
    return split_text(read_bytes(path, "give the path of a text file"), path.name)
