"""Any file as a text of bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from mamba_int.datasets.records import TextData
from mamba_int.errors import MambaintError
from mamba_int.files import read_bytes

SHORTEST_TEXT = 100
"""Fewer bytes leave a validation split of less than two windows of one byte."""


def split_text(content: bytes, name: str) -> TextData:
    """Split bytes into the first 85 % (train), the next 5 % (validation) and the last 10 % (test).

    Raises:
        MambaintError: if there are fewer than 100 bytes.
    """
    if len(content) < SHORTEST_TEXT:
        raise MambaintError(
            f"the text {name} has {len(content)} bytes, fewer than {SHORTEST_TEXT}", "give a longer text"
        )
    tokens = torch.from_numpy(np.frombuffer(content, dtype=np.uint8).copy())
    test_start = len(content) * 90 // 100
    validation_start = len(content) * 85 // 100
    return TextData(
        tokens[:validation_start].clone(),
        tokens[validation_start:test_start].clone(),
        tokens[test_start:].clone(),
        name,
    )


def load_text(path: Path) -> TextData:
    """Read any file as bytes; see :func:`split_text`."""
    return split_text(read_bytes(path, "give the path of a text file"), path.name)
