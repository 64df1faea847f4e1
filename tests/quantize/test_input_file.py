"""The input file: EZKL's form, exact integers, and one line for every way to get it wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mamba_int.datasets import quantize_features
from mamba_int.errors import MambaintError
from mamba_int.graph import Graph, Node
from quantize import input_file
from quantize.input_file import read_input


def graph(features: int = 2, card: dict[str, Any] | None = None) -> Graph:
    """Three steps of integers 0..16."""
    node = Node("input", "input", attributes={"low": 0, "high": 16, "features": features})
    return Graph((node,), "input", 3, card or {})


def write(path: Path, data: Any) -> Path:
    path.write_text(data if isinstance(data, str) else json.dumps({"input_data": data}))
    return path


@pytest.mark.parametrize("data", [[[0, 1, 2.0, 3, 4, 16]], [[[0, 1], [2, 3], [4, 1.6e1]]]])
def test_flat_and_nested_steps_are_the_same_input(tmp_path: Path, data: Any) -> None:
    values = read_input(write(tmp_path / "x.json", data), graph())
    assert values.dtype == np.int64
    assert values.tolist() == [[0, 1], [2, 3], [4, 16]]


def test_tokens_have_no_feature_axis(tmp_path: Path) -> None:
    assert read_input(write(tmp_path / "x.json", [[5, 0, 16]]), graph(0)).tolist() == [5, 0, 16]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("", "not valid JSON"),
        ("[1, 2", "not valid JSON"),
        ('{"input_data": [[NaN, 1, 2, 3, 4, 5]]}', "NaN is not a JSON number"),
        ('{"input_data": [[1]], "input_data": [[1]]}', "duplicate key"),
        ('{"input_data": [[1e999, 1, 2, 3, 4, 5]]}', "1e999 is beyond any float"),
        ("[1, 2, 3, 4, 5, 6]", "has no 'input_data'"),
        ('{"output_data": []}', "has no 'input_data'"),
        ('{"input_data": [[0]], "extra": 1}', 'unknown key "extra"'),
        ([], "not a list that holds one list"),
        ([1, 2, 3, 4, 5, 6], "not a list that holds one list"),
        ([[0] * 6, [0] * 6], "not a list that holds one list"),
        ([[0] * 5], "holds 5 numbers, the model takes 6"),
        ([[0] * 7], "holds 7 numbers, the model takes 6"),
        ([[[0, 0], [0], [0, 0]]], "step 1 is 1 numbers, not 2"),
        ([[[0, 0], 0, [0, 0]]], "step 1 is no list"),
        ([[[0, 0], [0, 0]]], "holds 4 numbers"),
        ([[[0, 0], [0, [0]], [0, 0]]], r"\[1\]\[1\] = \[0\] is not a finite number"),
        ([[0, 0, True, 0, 0, 0]], r"\[2\] = true is not a finite number"),
        ([[0, 0, "1", 0, 0, 0]], r'\[2\] = "1" is not a finite number'),
        ([[0, 0, None, 0, 0, 0]], r"\[2\] = null is not a finite number"),
        ([[0, 0, 0.5, 0, 0, 0]], r"\[2\] = 0.5 is not an integer in 0..16"),
        ([[0, 0, 0, 17, 0, 0]], r"\[3\] = 17 is not an integer in 0..16"),
        ([[-1, 0, 0, 0, 0, 0]], r"\[0\] = -1 is not an integer in 0..16"),
        ([[10**400, 0, 0, 0, 0, 0]], "is not a finite number"),
        ('{"input_data": ' + "[" * 100_000, "not valid JSON"),
    ],
)
def test_fault_names_its_place_and_remedy_on_one_line(tmp_path: Path, data: Any, words: str) -> None:
    with pytest.raises(MambaintError, match=words) as fault:
        read_input(write(tmp_path / "x.json", data), graph())
    assert "\n" not in str(fault.value) and len(str(fault.value)) < 500 and fault.value.remedy


def test_nested_tokens_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MambaintError, match="nested"):
        read_input(write(tmp_path / "x.json", [[[1], [2], [3]]]), graph(0))


def test_missing_file_folder_and_endless_file_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(input_file, "LARGEST_FILE", 1 << 20)
    for path, words in (
        (tmp_path / "none.json", "cannot read"),
        (tmp_path, "cannot read"),
        (Path("/dev/zero"), "larger than 1 MiB"),
    ):
        with pytest.raises(MambaintError, match=words):
            read_input(path, graph())


def test_real_features_of_a_standardized_model_are_scaled_as_in_training(tmp_path: Path) -> None:
    offset, scale = [1.0, 0.25], [1.0, 7.0]
    card = {"input": {"feature_offset": offset, "feature_scale": scale}}
    real = [[0.0, 1.5], [3, 0.25], [1000.0, -1000.0]]
    values = read_input(write(tmp_path / "x.json", [real]), graph(card=card))
    assert values.tolist() == quantize_features(real, offset, scale, 0, 16).tolist()
    assert values.tolist() == [[0, 9], [2, 0], [16, 0]]
    with pytest.raises(MambaintError, match="beyond any float"):
        read_input(write(tmp_path / "x.json", '{"input_data": [[1e999, 1, 2, 3, 4, 5]]}'), graph(card=card))


def test_scale_of_one_and_offset_of_zero_mean_integers(tmp_path: Path) -> None:
    card = {"input": {"feature_offset": [0.0, 0.0], "feature_scale": [1.0, 1.0]}}
    with pytest.raises(MambaintError, match="not an integer"):
        read_input(write(tmp_path / "x.json", [[0.5] * 6]), graph(card=card))


@pytest.mark.parametrize(
    "described", [{"feature_scale": [1.0]}, {"feature_offset": ["0", 0]}, {"feature_scale": 7}]
)
def test_card_that_does_not_fit_the_model_is_no_traceback(tmp_path: Path, described: dict[str, Any]) -> None:
    with pytest.raises(MambaintError, match="card has an unusable"):
        read_input(write(tmp_path / "x.json", [[0] * 6]), graph(card={"input": described}))
