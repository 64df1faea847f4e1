"""CSV: one sample per line, its features and one label column."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path

import numpy as np

from mamba_int.datasets.assembly import Samples, split_and_assemble
from mamba_int.datasets.records import ClassificationData
from mamba_int.errors import MambaintError
from mamba_int.files import read_bytes


def parse_number(cell: str) -> float | None:
    """The finite number a cell holds, or None; Python's ``1_000`` is not a number in a data file."""
    try:
        value = float(cell)
    except ValueError:
        return None
    return value if math.isfinite(value) and "_" not in cell else None


def _rows(path: Path) -> list[tuple[int, list[str]]]:
    try:
        text = read_bytes(path, "give the path of a CSV file").decode("utf-8-sig")
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        rows = [
            (reader.line_num, [cell.strip() for cell in row]) for row in reader if any(map(str.strip, row))
        ]
    except (UnicodeDecodeError, csv.Error) as error:
        raise MambaintError(
            f"{path} is not a CSV text ({error})", "save it as UTF-8 CSV with comma separators"
        ) from error
    if not rows:
        raise MambaintError(f"{path} is empty", "give a CSV file with one sample per line")
    return rows


def _label_index(path: Path, header: list[str] | None, width: int, label_column: str) -> int:
    if not label_column:
        return width - 1
    if header is not None and label_column in header:
        return header.index(label_column)
    try:
        index = int(label_column)
    except ValueError:
        index = width
    if not -width <= index < width:
        raise MambaintError(
            f"{path} has no column '{label_column}'",
            f"choose one of {', '.join(header)}" if header else f"choose an index from 0 to {width - 1}",
        )
    return index % width


def fold_shape(path: Path, columns: int, seq_len: int, n_features: int) -> tuple[int, int]:
    """Steps and channels of a flat row, step after step; a 0 is worked out from the other.

    Raises:
        MambaintError: if the columns do not fold into that shape.
    """
    if not seq_len and not n_features:
        return columns, 1
    steps = seq_len or columns // n_features
    channels = n_features or columns // seq_len
    if steps * channels != columns or not columns:
        raise MambaintError(
            f"{path} has {columns} feature columns, which do not fold into {steps or seq_len} steps of "
            f"{channels or n_features} features",
            "choose seq_len and n_features whose product is the number of feature columns",
        )
    return steps, channels


def load_csv(
    path: Path, label_column: str = "", seq_len: int = 0, n_features: int = 0, split_seed: int = 0
) -> ClassificationData:
    """Read a CSV file: numbers and one label per line; the first line may be a header.

    Args:
        path: the file, UTF-8, comma-separated.
        label_column: header name or index of the label; empty for the last column.
        seq_len: steps to fold the feature columns into (0: from ``n_features``, or one per column).
        n_features: channels to fold the feature columns into (0: from ``seq_len``, or 1).
        split_seed: seed of the stratified split.

    Raises:
        MambaintError: for an empty file, ragged rows or a cell that is no finite number, with its line.
    """
    rows = _rows(path)
    width = len(rows[0][1])
    if width < 2:
        raise MambaintError(
            f"{path} has {width} column", "give at least one feature and a label, separated by commas"
        )
    # A header is a first line without a single number; one bad cell among numbers is a bad cell.
    first = rows[0][1]
    header = first if len(rows) > 1 and all(parse_number(cell) is None and cell for cell in first) else None
    label_at = _label_index(path, header, width, label_column)
    features: list[list[float]] = []
    labels: list[str] = []
    for line, row in rows[1:] if header is not None else rows:
        if len(row) != width:
            raise MambaintError(
                f"line {line} of {path} has {len(row)} cells, not {width}", "give every line the same columns"
            )
        values: list[float] = []
        for column, cell in enumerate(row):
            if column == label_at:
                continue
            value = parse_number(cell)
            if value is None:
                raise MambaintError(
                    f"line {line}, column {column + 1} of {path} is '{cell[:40]}', not a finite number",
                    "correct the cell or remove the line",
                )
            values.append(value)
        if not row[label_at]:
            raise MambaintError(f"line {line} of {path} has no label", "fill in the label or remove the line")
        features.append(values)
        labels.append(row[label_at])
    steps, channels = fold_shape(path, width - 1, seq_len, n_features)
    samples = Samples(np.array(features, dtype=np.float64).reshape(-1, steps, channels), tuple(labels))
    return split_and_assemble(path.stem, samples, None, split_seed)
