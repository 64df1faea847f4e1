"""Data loading: every mistake a file can hold is refused with its place, and good data survives exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mamba_int.datasets import (
    ClassificationData,
    DataSource,
    TextData,
    load_data,
    quantize_features,
    shift_sequences,
    source_from_path,
)
from mamba_int.datasets.text_file import split_text
from mamba_int.errors import MambaintError

SPLITS = ("train", "validation", "test")


def load(path: Path, **options: Any) -> ClassificationData:
    data = load_data(DataSource.from_dict({**source_from_path(path).to_dict(), **options}))
    assert isinstance(data, ClassificationData)
    return data


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def all_inputs(data: ClassificationData) -> torch.Tensor:
    return torch.cat([getattr(data, f"{split}_inputs") for split in SPLITS])


# -- embedded -------------------------------------------------------------------------------------------


def test_digits_split_is_contiguous_so_that_no_writer_leaks_into_validation() -> None:
    data = load_data(DataSource())
    assert isinstance(data, ClassificationData)
    assert [len(getattr(data, f"{split}_labels")) for split in SPLITS] == [1150, 287, 360]
    assert (data.seq_len, data.n_features, data.n_classes) == (8, 8, 10)
    assert (data.input_low, data.input_high) == (0, 16)
    assert data.feature_scale == (1.0,) * 8
    assert data.class_names == tuple("0123456789")
    # The first line of the file.
    assert data.train_inputs[0, 0].tolist() == [0, 0, 5, 13, 9, 1, 0, 0]
    assert data.train_labels[:10].tolist() == list(range(10))


def test_moby_dick_parts_are_contiguous_and_complete() -> None:
    data = load_data(DataSource("moby-dick"))
    assert isinstance(data, TextData)
    lengths = [len(getattr(data, split)) for split in SPLITS]
    assert sum(lengths) == 1_204_997
    assert lengths[2] == pytest.approx(120_500, abs=1)
    assert bytes(data.test[-20:].tolist()).isascii()


# -- quantize_features ----------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    hnp.arrays(
        np.float64,
        hnp.array_shapes(min_dims=2, max_dims=3, min_side=1, max_side=5),
        elements=st.floats(allow_nan=False, allow_infinity=False),
    ),
    st.floats(-1e6, 1e6),
    st.floats(1e-6, 1e6).filter(lambda scale: scale != 1.0),
)
def test_real_features_of_any_size_stay_inside_the_domain(real: Any, offset: float, scale: float) -> None:
    channels = real.shape[-1]
    integers = quantize_features(real, [offset] * channels, [scale] * channels, -127, 127)
    assert integers.dtype == torch.int64
    assert integers.shape == real.shape
    assert integers.abs().max() <= 127


@settings(deadline=None)
@given(hnp.arrays(np.int64, (3, 2), elements=st.integers(-1000, 1000)))
def test_integer_features_are_kept_or_refused_but_never_changed(values: Any) -> None:
    try:
        kept = quantize_features(values, [0.0, 0.0], [1.0, 1.0], 0, 16)
    except MambaintError as error:
        bad = int(np.flatnonzero((values < 0) | (values > 16))[0])
        assert f"input[{bad // 2}][{bad % 2}] = {values.flat[bad]}" in error.cause
    else:
        assert np.array_equal(kept.numpy(), values)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([[0.0, 1.5]], r"input\[0\]\[1\] = 1.5 is not an integer"),
        ([[0, 1], [17, 2]], r"input\[1\]\[0\] = 17 is outside 0..16"),
        ([[0, float("nan")]], "nan is not a finite number"),
        ([[0, float("inf")]], "inf is not a finite number"),
        ([[1, 2, 3]], r"shape \[1, 3\], not \[steps, 2\]"),
        ([1, 2], r"shape \[2\]"),
        ([[1, 2], [3]], "not a table of numbers"),
        ([["a", "b"]], "not a table of numbers"),
        ([[10**400, 1]], "not a table of numbers"),
    ],
)
def test_bad_input_is_refused_with_its_place(values: Any, words: str) -> None:
    with pytest.raises(MambaintError, match=words):
        quantize_features(values, [0.0, 0.0], [1.0, 1.0], 0, 16)


# -- CSV ------------------------------------------------------------------------------------------------


def csv_text(rows: int = 12, columns: int = 4, scale: int = 1) -> str:
    lines = [",".join(str((r * columns + c) % 9 * scale) for c in range(columns)) for r in range(rows)]
    return "".join(f"{line},{'ab'[r % 2]}\n" for r, line in enumerate(lines))


def test_integers_like_pixels_are_not_rescaled(tmp_path: Path) -> None:
    data = load(write(tmp_path / "d.csv", csv_text()), seq_len=2)
    assert (data.seq_len, data.n_features, data.class_names) == (2, 2, ("a", "b"))
    assert data.feature_scale == (1.0, 1.0) and data.feature_offset == (0.0, 0.0)
    assert (data.input_low, data.input_high) == (0, 8)
    # 12 samples: a fifth tests, a fifth of the rest validates.
    assert [len(getattr(data, f"{split}_labels")) for split in SPLITS] == [8, 2, 2]


def test_real_features_are_standardized_from_the_training_split_only(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    train, test = rng.normal(3, 5, (50, 4, 2)), np.full((6, 4, 2), 1e9)
    labels = np.arange(50) % 2
    np.savez(tmp_path / "d.npz", inputs=train, labels=labels, test_inputs=test, test_labels=labels[:6])
    data = load(tmp_path / "d.npz")
    assert data.feature_offset[0] == pytest.approx(3, abs=1.5)
    assert data.feature_scale[0] == pytest.approx(127 / 4 / 5, rel=0.3)
    assert (data.test_inputs == 127).all()
    again = quantize_features(test, data.feature_offset, data.feature_scale, data.input_low, data.input_high)
    assert torch.equal(again, data.test_inputs)


def test_header_label_column_byte_order_mark_and_windows_lines(tmp_path: Path) -> None:
    body = "".join(f"{'xy'[i % 2]},{i},{i + 1}\r\n" for i in range(10))
    path = write(tmp_path / "d.csv", b"\xef\xbb\xbf" + f"kind,u,v\r\n{body}\r\n".encode())
    for label_column in ("kind", "0", "-3"):
        data = load(path, label_column=label_column)
        assert data.class_names == ("x", "y")
        assert all_inputs(data)[:, :, 0].sort(0).values[0].tolist() == [0, 1]


def test_numeric_labels_are_ordered_as_numbers(tmp_path: Path) -> None:
    path = write(tmp_path / "d.csv", "".join(f"{i},{label}\n" for label in (10, 9, 1) for i in range(5)))
    assert load(path).class_names == ("1", "9", "10")


@pytest.mark.parametrize(
    ("content", "options", "words"),
    [
        ("", {}, "is empty"),
        ("\n \n", {}, "is empty"),
        ("1,2,a\n1,2,3,a\n", {}, "line 2 .* has 4 cells, not 3"),
        ("1,2,a\n1,x,b\n", {}, "line 2, column 2 .* is 'x'"),
        ("1,x,a\n1,2,b\n", {}, "line 1, column 2 .* is 'x'"),
        ("1,2,a\n1,nan,b\n", {}, "is 'nan'"),
        ("1,2,a\n1,inf,b\n", {}, "is 'inf'"),
        ("1,2,a\n1,1_0,b\n", {}, "is '1_0'"),
        ("1,2,a\n1,,b\n", {}, "is ''"),
        ("1,2,a\n1,2,\n", {}, "line 2 .* has no label"),
        ("1\n2\n", {}, "has 1 column"),
        ("1,2,a\n" * 6, {}, "only one class"),
        ("1,2,a\n1,2,b\n" * 6, {"seq_len": 3}, "2 feature columns, which do not fold into 3 steps"),
        ("1,2,a\n1,2,b\n" * 6, {"n_features": 5}, "do not fold"),
        ("1,2,a\n1,2,b\n" * 6, {"label_column": "class"}, "no column 'class'"),
        ("1,2,a\n1,2,b\n" * 6, {"label_column": "7"}, "no column '7'"),
        ("5,5,a\n5,5,b\n" * 6, {}, "every value of d is 5"),
        ("1e31,5,a\n5,5,b\n" * 6, {}, "beyond 1e"),
        ("1,2,a\n", {}, "cannot be split"),
        ("".join(f"{i},2,c{i}\n" for i in range(9)), {}, "does not occur in the training split"),
        (b"\xff\xfe\x00", {}, "not a CSV text"),
        ('1,"2,a\n', {}, "not a CSV text"),
    ],
)
def test_bad_csv_is_refused(tmp_path: Path, content: str, options: dict[str, Any], words: str) -> None:
    path = write(tmp_path / "d.csv", content)
    with pytest.raises(MambaintError, match=words):
        load(path, **options)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(
    table=hnp.arrays(
        np.float64,
        st.tuples(st.integers(1, 20), st.integers(1, 6)),
        elements=st.floats(-1e30, 1e30) | st.integers(-130, 130).map(float),
    ),
    classes=st.integers(1, 4),
    seed=st.integers(0, 5),
)
def test_any_table_of_numbers_loads_inside_the_domain_or_says_why(
    tmp_path: Path, table: Any, classes: int, seed: int
) -> None:
    lines = (",".join(map(repr, row)) + f",{i % classes}" for i, row in enumerate(table.tolist()))
    path = write(tmp_path / "d.csv", "\n".join(lines))
    try:
        data = load(path, split_seed=seed)
    except MambaintError as error:
        assert error.cause and error.remedy
        return
    inputs = all_inputs(data)
    assert len(inputs) == len(table)
    assert data.input_low <= int(inputs.min()) and int(inputs.max()) <= data.input_high
    assert set(data.train_labels.tolist()) == set(range(data.n_classes))
    assert np.isfinite([*data.feature_offset, *data.feature_scale]).all()
    assert load(path, split_seed=seed).fingerprint() == data.fingerprint()


def test_constant_channel_is_not_blown_up_by_rounding_noise(tmp_path: Path) -> None:
    path = write(tmp_path / "d.csv", "".join(f"0.1,{i * 0.37},{'ab'[i % 2]}\n" for i in range(30)))
    data = load(path, n_features=2)
    assert (all_inputs(data)[:, :, 0] == 0).all()


# -- NPZ ------------------------------------------------------------------------------------------------


def good_arrays() -> dict[str, Any]:
    return {"inputs": np.arange(120).reshape(10, 4, 3) % 20, "labels": np.arange(10) % 2}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"inputs": None}, "no array 'inputs'"),
        ({"labels": None}, "no array 'labels'"),
        ({"inputs": np.zeros((10, 4))}, r"inputs of .* is float64 \[10, 4\]"),
        ({"inputs": np.zeros((10, 4, 3), complex)}, "complex128"),
        ({"inputs": np.zeros((10, 0, 3))}, "shape"),
        ({"inputs": np.full((10, 4, 3), np.nan)}, r"inputs\[0, 0, 0\] .* not a finite"),
        ({"labels": np.zeros(9, int)}, r"labels of .* is int64 \[9\]"),
        ({"labels": np.zeros(10)}, "labels of .* is float64"),
        ({"labels": np.array([None] * 10)}, "not a readable .npz"),
        ({"inputs": np.zeros((0, 4, 3)), "labels": np.zeros(0, int)}, "no samples"),
        ({"test_inputs": np.zeros((2, 4, 3))}, "no array 'test_labels'"),
        ({"test_inputs": np.zeros((2, 4, 2)), "test_labels": np.arange(2)}, "test split .* has shape"),
        (
            {"test_inputs": np.zeros((2, 4, 3)), "test_labels": np.array([0, 7])},
            "label '7' of the test split",
        ),
    ],
)
def test_bad_npz_is_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    arrays = {key: value for key, value in {**good_arrays(), **change}.items() if value is not None}
    np.savez(tmp_path / "d.npz", **arrays)
    with pytest.raises(MambaintError, match=words):
        load(tmp_path / "d.npz")


def test_a_pickle_in_an_npz_is_never_opened(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return (write, (tmp_path / "sprung", "x"))

    np.savez(tmp_path / "d.npz", inputs=np.array([Trap()], dtype=object), labels=np.zeros(1, int))
    with pytest.raises(MambaintError, match=r"not a readable \.npz"):
        load(tmp_path / "d.npz")
    assert not (tmp_path / "sprung").exists()


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(st.data())
def test_damaged_npz_fails_with_one_sentence_only(tmp_path: Path, data: st.DataObject) -> None:
    np.savez_compressed(tmp_path / "good.npz", **good_arrays())
    content = bytearray((tmp_path / "good.npz").read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content)))]
    else:
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] ^= data.draw(st.integers(1, 255))
    path = write(tmp_path / "d.npz", bytes(content))
    try:
        load(path)
    except MambaintError as error:
        assert str(path) in error.cause or "d" in error.cause


# -- .ts ------------------------------------------------------------------------------------------------

HEADER = "#c\n@problemName P\n@timeStamps false\n@univariate false\n@classLabel true up down\n@data\n"


def ts_text(lengths: list[int], sign: float = 1.5) -> str:
    lines = []
    for i, length in enumerate(lengths):
        a = ",".join(str(sign * (i + t)) for t in range(length))
        b = ",".join(str(-t) for t in range(length))
        lines.append(f"{a}:{b}:{('up', 'down')[i % 2]}\n")
    return HEADER + "".join(lines)


def test_ts_pair_is_found_from_either_file(tmp_path: Path) -> None:
    write(tmp_path / "P_TRAIN.ts", ts_text([5] * 10))
    write(tmp_path / "P_TEST.ts", ts_text([5] * 4, 1.6))
    for name in ("P_TRAIN.ts", "P_TEST.ts"):
        data = load(tmp_path / name)
        assert (data.seq_len, data.n_features, data.class_names) == (5, 2, ("up", "down"))
        assert [len(getattr(data, f"{split}_labels")) for split in SPLITS] == [8, 2, 4]
        assert data.name == "P"


def test_unequal_series_are_padded_with_the_zero_of_the_scaled_data(tmp_path: Path) -> None:
    path = write(tmp_path / "P.ts", ts_text([3, 5] * 10))
    with pytest.raises(MambaintError, match=r"different lengths \(up to 5\).*seq_len"):
        load(path)
    data = load(path, seq_len=4)
    inputs = all_inputs(data)
    assert inputs.shape[1:] == (4, 2)
    padded = (inputs[:, 3] == 0).all(-1)
    assert int(padded.sum()) == 10
    # The statistics ignore the padding: the second channel's measurements are 0..-3, mean about -1.2.
    assert data.feature_offset[1] < -1


def test_padding_widens_the_domain_of_integer_series(tmp_path: Path) -> None:
    text = HEADER + "".join(
        f"{','.join(['7'] * (2 + i % 2))},9:{'up' if i % 3 else 'down'}\n" for i in range(20)
    )
    data = load(write(tmp_path / "P.ts", text), seq_len=4)
    assert (data.input_low, data.input_high) == (0, 9)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds no series"),
        (HEADER, "holds no series"),
        ("1,2:up\n", "line 1 .* comes before '@data'"),
        (HEADER.replace("true up down", "false") + "1:up", "fewer than two classes"),
        (HEADER.replace("@classLabel true up down\n", "") + "1:up", "without '@classLabel"),
        (HEADER.replace("up down", "up up") + "1:up", "a class twice"),
        (HEADER.replace("@timeStamps false", "@timeStamps true"), "time stamps"),
        (HEADER + "1,?:1,2:up\n", "line 7 .* missing value '\\?'"),
        (HEADER + "1,x:1,2:up\n", "line 7 .* holds 'x'"),
        (HEADER + "1,NaN:1,2:up\n", "holds 'NaN'"),
        (HEADER + "1,2:1,2:left\n", "label 'left'"),
        (HEADER + "1,2\n", "no ':' before a label"),
        (HEADER + "1,2:1:up\n", "dimensions of different lengths"),
        (HEADER + "1,2:1,2:up\n1,2:up\n", "line 8 .* 1 dimensions, the series before it 2"),
        (HEADER + ":up\n", "holds ''"),
        (HEADER.replace("@univariate false", "@univariate true") + "1:2:up\n", "line 7 .* header says 1"),
        (HEADER.replace("@univariate false", "@univariate maybe"), "line 4 .* no 'true' or 'false'"),
        (HEADER.replace("#c", "@dimensions 3") + "1:2:up\n", "line 7 .* 2 dimensions, the header says 3"),
        (HEADER.replace("#c", "@dimensions x"), "line 1 .* no positive integer after @dimensions"),
        ("@equalLength true\n@seriesLength 2\n" + HEADER + "1,2:2,1:up\n1:2:up\n", "line 10 .* says 2"),
    ],
)
def test_bad_ts_is_refused(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(MambaintError, match=words):
        load(write(tmp_path / "P.ts", text))


def test_a_header_without_equal_lengths_is_taken_as_one_with_them(tmp_path: Path) -> None:
    """Archives give the longest series' length there."""
    header = "@equalLength false\n@seriesLength 5\n@dimension 2\n@univariate FALSE\n"
    data = load(write(tmp_path / "P.ts", header + ts_text([3, 5] * 10)), seq_len=5)
    assert data.seq_len == 5


def test_univariate_series_are_refused(tmp_path: Path) -> None:
    header = HEADER.replace("@univariate false", "@univariate true\n@dimensions 1")
    lines = "".join(f"{i},{i % 3},0.5:{('up', 'down')[i % 2]}\n" for i in range(20))
    assert load(write(tmp_path / "P.ts", header + lines)).train_inputs.shape[1:] == (3, 1)


def test_ts_pair_of_different_dimensions_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "P_TRAIN.ts", ts_text([5] * 10))
    write(tmp_path / "P_TEST.ts", HEADER + "1,2,3,4,5:up\n")
    with pytest.raises(MambaintError, match="different dimensions"):
        load(tmp_path / "P_TRAIN.ts")


# -- text and sources -----------------------------------------------------------------------------------


@given(st.binary(min_size=100, max_size=2000))
def test_text_splits_lose_no_byte(content: bytes) -> None:
    data = split_text(content, "t")
    assert bytes(torch.cat([data.train, data.validation, data.test]).tolist()) == content
    assert min(len(data.train), len(data.validation), len(data.test)) >= 2


def test_short_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MambaintError, match="99 bytes"):
        load_data(source_from_path(write(tmp_path / "t.txt", b"a" * 99)))


def test_missing_file_and_folder_are_named(tmp_path: Path) -> None:
    for name in ("x.csv", "x.npz", "x.ts", "x.txt"):
        with pytest.raises(MambaintError, match=f"cannot read .*{name}"):
            load_data(source_from_path(tmp_path / name))
    with pytest.raises(MambaintError, match="cannot read"):
        load_data(source_from_path(tmp_path))


@pytest.mark.parametrize(
    "values",
    [
        {"kind": "csv"},
        {"kind": "digits", "path": "x"},
        {"kind": "parquet", "path": "x"},
        {"kind": "npz", "path": "x", "seq_len": 3},
        {"kind": "csv", "path": "x", "seq_len": -3},
        {"kind": "csv", "path": "x", "seqlen": 3},
        {"kind": "csv", "path": 3},
    ],
)
def test_options_that_would_be_ignored_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(MambaintError, match=r"\[data\]"):
        DataSource.from_dict(values)


def test_source_survives_its_dictionary() -> None:
    source = DataSource("csv", "/a.csv", "kind", 4, 2, 9)
    assert DataSource.from_dict(source.to_dict()) == source


# -- augmentation ---------------------------------------------------------------------------------------


@given(
    hnp.arrays(np.int64, hnp.array_shapes(min_dims=3, max_dims=3, min_side=1, max_side=6)),
    st.integers(0, 3),
    st.integers(0, 1000),
)
def test_shift_moves_every_sample_by_one_offset_and_fills_with_zeros(
    values: Any, reach: int, seed: int
) -> None:
    inputs = torch.from_numpy(values)
    shifted = shift_sequences(inputs, reach, torch.Generator().manual_seed(seed))
    assert shifted.shape == inputs.shape
    _, steps, channels = inputs.shape
    for before, after in zip(inputs, shifted, strict=True):
        candidates = []
        for dt in range(-reach, reach + 1):
            for dc in range(-reach, reach + 1):
                moved = torch.zeros_like(before)
                for t in range(max(0, dt), min(steps, steps + dt)):
                    for c in range(max(0, dc), min(channels, channels + dc)):
                        moved[t, c] = before[t - dt, c - dc]
                candidates.append(moved)
        assert any(torch.equal(after, candidate) for candidate in candidates)


def test_shift_uses_every_direction() -> None:
    inputs = torch.zeros(500, 3, 3, dtype=torch.int64)
    inputs[:, 1, 1] = 1
    shifted = shift_sequences(inputs, 1, torch.Generator().manual_seed(0))
    assert (shifted.sum(0) > 20).all()
    assert (shifted.sum((1, 2)) == 1).all()
