"""The ``.ts`` format of the UEA/UCR time-series archive."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mamba_int.datasets.assembly import Samples, split_and_assemble
from mamba_int.datasets.csv_file import parse_number
from mamba_int.datasets.records import ClassificationData
from mamba_int.errors import MambaintError
from mamba_int.files import read_bytes


@dataclass
class _Parsed:
    """Series as parsed: per sample C lists of equal length; and what the header says.

    ``dimensions`` and ``steps`` are 0 where it says nothing of them.
    """

    series: list[list[list[float]]] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    class_names: tuple[str, ...] = ()
    dimensions: int = 0
    steps: int = 0
    equal_length: bool = False

    @property
    def longest(self) -> int:
        return max(len(sample[0]) for sample in self.series)


def _fault(path: Path, line: int, what: str, remedy: str) -> MambaintError:
    return MambaintError(f"line {line} of {path} {what}", remedy)


def _read_header(path: Path, number: int, line: str, parsed: _Parsed) -> bool:
    """Take in one @-line; return whether it opens the data."""
    key, *values = line[1:].split()
    match key.lower():
        case "data":
            if not parsed.class_names:
                raise _fault(
                    path, number, "opens the data without '@classLabel true ...'", "give a labelled file"
                )
            return True
        case "timestamps" if values[:1] and values[0].lower() == "true":
            raise _fault(path, number, "declares time stamps", "resample to equal steps without time stamps")
        case "classlabel":
            if not values or values[0].lower() != "true" or len(values) < 3:
                raise _fault(
                    path, number, "declares fewer than two classes", "give a file for classification"
                )
            if len(set(values[1:])) != len(values) - 1:
                raise _fault(path, number, "declares a class twice", "declare every class once")
            parsed.class_names = tuple(values[1:])
        case "univariate" if _flag(path, number, key, values):
            parsed.dimensions = 1
        case "dimensions" | "dimension":
            parsed.dimensions = _count(path, number, key, values)
        case "equallength":
            parsed.equal_length = _flag(path, number, key, values)
        case "serieslength":
            parsed.steps = _count(path, number, key, values)
        case _:
            pass
    return False


def _flag(path: Path, number: int, key: str, values: list[str]) -> bool:
    value = values[0].lower() if len(values) == 1 else ""
    if value not in ("true", "false"):
        raise _fault(
            path, number, f"has no 'true' or 'false' after @{key}", f"write '@{key} true' or 'false'"
        )
    return value == "true"


def _count(path: Path, number: int, key: str, values: list[str]) -> int:
    if len(values) != 1 or not (values[0].isascii() and values[0].isdecimal()) or int(values[0]) == 0:
        raise _fault(path, number, f"has no positive integer after @{key}", f"write '@{key} 3', for example")
    return int(values[0])


def _read_series(path: Path, number: int, line: str, parsed: _Parsed) -> None:
    *dimensions, label = (part.strip() for part in line.split(":"))
    if not dimensions:
        raise _fault(path, number, "has no ':' before a label", "write dimension:...:label")
    if label not in parsed.class_names:
        raise _fault(
            path,
            number,
            f"has the label '{label[:40]}', which @classLabel does not declare",
            f"use one of {', '.join(parsed.class_names)}",
        )
    sample: list[list[float]] = []
    for dimension in dimensions:
        values: list[float] = []
        for cell in dimension.split(","):
            value = parse_number(cell)
            if value is None:
                what = "has a missing value '?'" if cell.strip() == "?" else f"holds '{cell.strip()[:40]}'"
                raise _fault(path, number, what, "give finite numbers only: impute or remove the series")
            values.append(value)
        sample.append(values)
    if len({len(values) for values in sample}) != 1:
        raise _fault(
            path, number, "has dimensions of different lengths", "give every dimension the same length"
        )
    if parsed.series and len(sample) != len(parsed.series[0]):
        raise _fault(
            path,
            number,
            f"has {len(sample)} dimensions, the series before it {len(parsed.series[0])}",
            "give every series the same dimensions",
        )
    # A file that was cut short, or lost a column, is told by its header.
    if parsed.dimensions and len(sample) != parsed.dimensions:
        raise _fault(
            path,
            number,
            f"has {len(sample)} dimensions, the header says {parsed.dimensions}",
            "correct the series or the header",
        )
    if parsed.equal_length and parsed.steps and len(sample[0]) != parsed.steps:
        raise _fault(
            path,
            number,
            f"has {len(sample[0])} steps, the header says {parsed.steps}",
            "correct the series or the header",
        )
    parsed.series.append(sample)
    parsed.labels.append(label)


def _parse(path: Path) -> _Parsed:
    try:
        text = read_bytes(path, "give the path of a .ts file").decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise MambaintError(
            f"{path} is not a text file ({error})", "give a .ts file of the UEA/UCR archive"
        ) from error
    parsed = _Parsed()
    in_data = False
    for number, raw in enumerate(text.splitlines(), start=1):
        line = raw.strip()
        if not line or line.startswith("#"):
            continue
        if in_data:
            _read_series(path, number, line, parsed)
        elif line.startswith("@") and len(line) > 1:
            in_data = _read_header(path, number, line, parsed)
        else:
            raise _fault(path, number, "comes before '@data'", "give a .ts file of the UEA/UCR archive")
    if not parsed.series:
        raise MambaintError(f"{path} holds no series", "give a .ts file with series after '@data'")
    return parsed


def _samples(parsed: _Parsed, steps: int) -> Samples:
    inputs = np.zeros((len(parsed.series), steps, len(parsed.series[0])))
    lengths = np.array([min(steps, len(sample[0])) for sample in parsed.series], dtype=np.int64)
    for row, sample in enumerate(parsed.series):
        inputs[row, : lengths[row]] = np.array(sample).T[: lengths[row]]
    return Samples(inputs, tuple(parsed.labels), lengths)


def load_ts(path: Path, seq_len: int = 0, split_seed: int = 0) -> ClassificationData:
    """Read a ``.ts`` file; ``NAME_TRAIN.ts`` and ``NAME_TEST.ts`` belong together.

    Args:
        path: the file; for a pair, either of the two.
        seq_len: steps to truncate or (after scaling) zero-pad every series to; needed if lengths differ.
        split_seed: seed of the stratified splits the files lack.

    Raises:
        MambaintError: for missing values, unknown labels, unequal lengths without ``seq_len``, or
            anything else that is not such a file, with its line.
    """
    test_path: Path | None = None
    name = path.stem
    for ending in ("_TRAIN", "_TEST"):
        if name.upper().endswith(ending):
            name = name[: -len(ending)]
            pair = path.with_name(f"{name}_TRAIN.ts"), path.with_name(f"{name}_TEST.ts")
            if all(os.path.isfile(part) for part in pair):
                path, test_path = pair
            break
    files = [_parse(path)] + ([_parse(test_path)] if test_path is not None else [])
    if len({len(parsed.series[0]) for parsed in files}) != 1:
        raise MambaintError(
            f"{path} and {test_path} have different dimensions", "give two files of one data set"
        )
    if not seq_len and len({len(sample[0]) for parsed in files for sample in parsed.series}) != 1:
        longest = max(parsed.longest for parsed in files)
        raise MambaintError(
            f"the series of {path} have different lengths (up to {longest})",
            f"choose seq_len, for example {longest}, to pad or truncate to",
        )
    steps = seq_len or files[0].longest
    splits = [_samples(parsed, steps) for parsed in files]
    test = splits[1] if len(splits) == 2 else None
    return split_and_assemble(name, splits[0], test, split_seed, files[0].class_names)
