"""Generated gestures: the files are the data, the same everywhere, and their classes are in the turns."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mamba_int.datasets import ClassificationData, DataSource, load_data, source_from_path
from mamba_int.datasets.assembly import Floats
from mamba_int.datasets.gestures import CLASS_NAMES, STEP_SECONDS, load_gestures, write_gestures
from mamba_int.errors import MambaintError


@pytest.fixture(scope="module")
def data() -> ClassificationData:
    return load_gestures()


def readings(path: Path) -> tuple[Floats, list[str]]:
    """float64 [n, 3, T] and labels, by another reader than ours."""
    text = path.read_text().split("@data\n")[1]
    rows = [line.split(":") for line in text.splitlines()]
    return np.array([[list(map(float, axis.split(","))) for axis in row[:3]] for row in rows]), [
        row[3] for row in rows
    ]


def test_the_files_hold_other_data_than_the_source(tmp_path: Path, data: ClassificationData) -> None:
    train, test = write_gestures(tmp_path / "new")
    for path in (train, test):
        read = load_data(source_from_path(path))
        assert isinstance(read, ClassificationData)
        assert read.fingerprint() == data.fingerprint()
        assert read.feature_scale == data.feature_scale and read.class_names == data.class_names
    again = load_data(DataSource(kind="gestures"))
    assert isinstance(again, ClassificationData) and again.fingerprint() == data.fingerprint()
    assert load_gestures(seed=1).fingerprint() != data.fingerprint()
    assert load_gestures(steps=24).train_inputs.shape == (2000, 24, 3)
    assert data.train_inputs.shape == (2000, 16, 3) and len(data.test_labels) == 1000
    assert data.input_low == -127 and int(data.train_inputs.max()) == 127


def test_the_first_axis_of_a_class_is_turned_later_or_not_at_all(tmp_path: Path) -> None:
    """Of most gestures: the sensor is askew and noisy."""
    values, labels = readings(write_gestures(tmp_path)[1])
    angles = values.sum(-1) * STEP_SECONDS
    speed = np.abs(values)
    centres = (speed**2 * np.arange(values.shape[-1])).sum(-1) / (speed**2).sum(-1)
    both_turned, in_order = 0, 0
    for angle, centre, label in zip(np.abs(angles), centres, labels, strict=True):
        first, second = ("xyz".index(axis) for axis in label)
        both_turned += min(angle[first], angle[second]) > angle[3 - first - second]
        in_order += centre[first] < centre[second]
    assert both_turned > 0.75 * len(labels) and in_order > 0.95 * len(labels)
    assert set(labels) == set(CLASS_NAMES)
    turned = np.sort(np.abs(angles), -1)[:, 1:]
    assert 1.1 < turned.mean() < 1.8


def test_a_class_is_rare(data: ClassificationData) -> None:
    shares = torch.cat([data.train_labels, data.test_labels]).bincount() / 3000
    assert shares.shape == (6,) and float(shares.min()) > 0.14


@pytest.mark.parametrize(("steps", "seed"), [(7, 0), (-1, 0), (0, -1)])
def test_impossible_settings_are_taken(steps: int, seed: int) -> None:
    with pytest.raises(MambaintError, match="give 8 steps or more"):
        load_gestures(steps, seed)
