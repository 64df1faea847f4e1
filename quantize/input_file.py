"""Reading one model input from a JSON file of EZKL's form, ``{"input_data": [[...]]}``."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mamba_int.errors import MambaintError
from mamba_int.files import parse_json
from mamba_int.graph import Graph, IntArray

LARGEST_FILE = 64 << 20
"""Bytes of the largest input file that is read."""


def read_input(path: Path, graph: Graph, any_length: bool = False) -> IntArray:
    """Read one input of ``graph.seq_len`` steps.

    The file holds one list, either flat (step after step) or with one list per step. Where the card says
    that features are standardized, every number is a real feature value, rounded and clamped as in
    training; otherwise numbers must be integers of the model's domain.

    Args:
        path: the file.
        graph: the model.
        any_length: take any number of steps.

    Returns:
        int64 [T, features], or [T] token ids.

    Raises:
        MambaintError: naming the place and the value at fault.
    """
    features = graph.input.integer("features")
    remedy = f'give {{"input_data": [[...]]}} with {_wanted(graph)}'
    document = parse_json(_read(path), str(path))
    if not isinstance(document, dict) or "input_data" not in document:
        raise MambaintError(f"{path} has no 'input_data'", remedy)
    unknown = sorted(document.keys() - {"input_data"})
    if unknown:
        raise MambaintError(f"{path} has an unknown key {json.dumps(unknown[0][:40])}", "remove it")
    data = document["input_data"]
    if not isinstance(data, list) or len(data) != 1 or not isinstance(data[0], list):
        raise MambaintError(f"{path}: 'input_data' is not a list that holds one list", remedy)
    places = _flatten(data[0], features, path, remedy)
    expected = graph.seq_len * max(features, 1)
    if any_length and places and len(places) % max(features, 1) == 0:
        expected = len(places)
    if len(places) != expected:
        raise MambaintError(f"{path} holds {len(places)} numbers, the model takes {expected}", remedy)
    return _integers(places, graph, path)


def read_steps(stream: Iterable[str], graph: Graph) -> Iterator[IntArray]:
    """Read an input step by step, as it arrives.

    Args:
        stream: lines, each with one step in JSON: a token id, or a list of features as in :func:`read_input`.
        graph: the model.

    Yields:
        int64 [1, features], or [1] token ids.

    Raises:
        MambaintError: naming the line and the value at fault.
    """
    features = graph.input.integer("features")
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        source = Path(f"line {number}")
        step = parse_json(line.encode(), str(source))
        remedy = f"give a list of {features} numbers a line" if features else "give a token id a line"
        if isinstance(step, list) != bool(features):
            raise MambaintError(f"{source} is no step of the model", remedy)
        yield _integers(_flatten([step], features, source, remedy), graph, source)


def _integers(places: list[tuple[str, Any]], graph: Graph, path: Path) -> IntArray:
    """The model's integers of the numbers of a file or a line."""
    features = graph.input.integer("features")
    remedy = f'give {{"input_data": [[...]]}} with {_wanted(graph)}'
    for place, value in places:
        # bool is an int to Python
        if type(value) not in (int, float) or not _finite(value):
            raise MambaintError(f"{path}: {place} = {_shown(value)} is not a finite number", remedy)
    values = [value for _, value in places]
    scaled = scaling(graph)
    if scaled is not None:
        return _quantized(values, graph, *scaled)
    low, high = graph.input.integer("low"), graph.input.integer("high")
    for place, value in places:
        if value != int(value) or not low <= value <= high:
            raise MambaintError(
                f"{path}: {place} = {_shown(value)} is not an integer in {low}..{high}",
                "give integers in that range",
            )
    integers = np.array([int(value) for value in values], np.int64)
    return integers.reshape(-1, features) if features else integers


def scaling(graph: Graph) -> tuple[list[float], list[float]] | None:
    """Offset and scale per feature, or None where features are the integers themselves.

    Raises:
        MambaintError: if the card does not describe the model's features.
    """
    described = graph.card.get("input", {})
    features = graph.input.integer("features")
    parts: list[list[float]] = []
    for key, neutral in (("feature_offset", 0.0), ("feature_scale", 1.0)):
        values = (described.get(key) if isinstance(described, dict) else None) or [neutral] * features
        valid = isinstance(values, list) and len(values) == features
        if not valid or not all(type(v) in (int, float) and _finite(v) for v in values):
            raise MambaintError(f"the model's card has an unusable {key}", "quantize the checkpoint again")
        parts.append([float(v) for v in values])
    offset, scale = parts
    return None if not any(offset) and all(v == 1 for v in scale) else (offset, scale)


def _quantized(values: list[float], graph: Graph, offset: list[float], scale: list[float]) -> IntArray:
    from mamba_int.datasets import quantize_features

    node = graph.input
    real = np.array(values, np.float64).reshape(-1, node.integer("features"))
    low, high = node.integer("low"), node.integer("high")
    integers: IntArray = quantize_features(real, offset, scale, low, high).numpy()
    return integers


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST_FILE + 1)
    except OSError as error:
        raise MambaintError(
            f"cannot read {path}: {error.strerror or error}", "give the path of a JSON file"
        ) from error
    if len(content) > LARGEST_FILE:
        raise MambaintError(
            f"{path} is larger than {LARGEST_FILE >> 20} MiB", "give a file that holds one input"
        )
    return content


def _wanted(graph: Graph) -> str:
    features = graph.input.integer("features")
    if not features:
        return f"{graph.seq_len} token ids"
    return f"{graph.seq_len * features} numbers ({graph.seq_len} steps of {features})"


def _flatten(data: list[Any], features: int, path: Path, remedy: str) -> list[tuple[str, Any]]:
    """Every entry with its place in the file, step after step."""
    if not any(isinstance(entry, list) for entry in data):
        return [(f"input_data[0][{i}]", entry) for i, entry in enumerate(data)]
    if not features:
        raise MambaintError(f"{path}: token ids are nested", remedy)
    result = []
    for t, step in enumerate(data):
        if not isinstance(step, list) or len(step) != features:
            size = f"{len(step)} numbers" if isinstance(step, list) else "no list"
            raise MambaintError(f"{path}: step {t} is {size}, not {features} numbers", remedy)
        result += [(f"input_data[0][{t}][{i}]", entry) for i, entry in enumerate(step)]
    return result


def _finite(value: int | float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
