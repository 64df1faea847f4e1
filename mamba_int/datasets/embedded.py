"""The two data sets that ship inside the package; see ``mamba_int/data/README.md``."""

from __future__ import annotations

import gzip
import lzma
from pathlib import Path

import numpy as np

from mamba_int.datasets.assembly import VALIDATION_SHARE, Samples, assemble, split_last
from mamba_int.datasets.records import ClassificationData, TextData
from mamba_int.datasets.text_file import split_text
from mamba_int.files import read_bytes

_FOLDER = Path(__file__).resolve().parent.parent / "data"
_REMEDY = "reinstall mambaint: its embedded data is missing"
_DIGITS_TRAIN = 1437


def load_digits() -> ClassificationData:
    """8x8 handwritten digits: 8 steps (rows) of 8 features (pixels 0..16).

    Lines 1..1437 train, of which the last fifth validates; the last 360 lines test. The blocks are
    contiguous because the digits of one writer are adjacent: a random split would leak writers.
    """
    text = gzip.decompress(read_bytes(_FOLDER / "digits.csv.gz", _REMEDY)).decode()
    table = np.array([[int(cell) for cell in line.split(",")] for line in text.split()], dtype=np.float64)
    samples = Samples(table[:, :64].reshape(-1, 8, 8), tuple(str(int(label)) for label in table[:, 64]))
    train, test = split_last(samples, len(table) - _DIGITS_TRAIN)
    train, validation = split_last(train, round(VALIDATION_SHARE * _DIGITS_TRAIN))
    return assemble("digits", train, validation, test)


def load_moby_dick() -> TextData:
    """Moby Dick as bytes: the last 10 % test, the 5 % before them validate."""
    packed = read_bytes(_FOLDER / "moby-dick.txt.xz", _REMEDY)
    return split_text(lzma.decompress(packed), "moby-dick")
