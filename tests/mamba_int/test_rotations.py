"""Generated rotations: the same everywhere, labelled as rotation matrices say, and not commuting."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mamba_int.datasets import ClassificationData, DataSource, load_data
from mamba_int.datasets.rotations import (
    CLASS_NAMES,
    UNITS_PER_RADIAN,
    composed_rotations,
    load_rotations,
    nearest_axis,
    upright_axis,
)
from mamba_int.errors import MambaintError


@pytest.fixture(scope="module")
def data() -> ClassificationData:
    return load_rotations(12, 3)


def test_the_same_seed_gives_other_bodies(data: ClassificationData) -> None:
    again = load_data(DataSource(kind="rotations", seq_len=12, split_seed=3))
    assert isinstance(again, ClassificationData)
    assert again.fingerprint() == data.fingerprint()
    assert load_rotations(12, 4).fingerprint() != data.fingerprint()
    assert data.class_names == CLASS_NAMES
    assert data.feature_scale == (1.0,) * 3 and data.feature_offset == (0.0,) * 3
    assert data.train_inputs.shape == (50000, 12, 3)


def test_a_label_is_not_that_of_the_rotation_matrices(data: ClassificationData) -> None:
    """By the exponential of the cross product's matrix, step by step."""
    for row in range(20):
        turned = torch.eye(3, dtype=torch.float64)
        for x, y, z in (data.test_inputs[row].double() / UNITS_PER_RADIAN).tolist():
            cross = torch.tensor([[0.0, -z, y], [z, 0.0, -x], [-y, x, 0.0]], dtype=torch.float64)
            turned = turned @ torch.linalg.matrix_exp(cross)
        axis = turned[:, 2]
        vectors = data.test_inputs[row : row + 1].double().numpy() / UNITS_PER_RADIAN
        assert np.allclose(upright_axis(composed_rotations(vectors))[0, -1], axis.numpy())
        best = int(torch.stack([axis, -axis], -1).flatten().argmax())
        assert best == int(data.test_labels[row])


def test_the_order_of_steps_does_not_matter(data: ClassificationData) -> None:
    vectors = data.test_inputs.double().numpy() / UNITS_PER_RADIAN
    label, _ = nearest_axis(upright_axis(composed_rotations(vectors[:, ::-1])[:, -1]))
    assert 0.1 < float((torch.from_numpy(label) == data.test_labels).double().mean()) < 0.6
    counts = data.test_labels.bincount().double() / len(data.test_labels)
    assert float(counts.max()) < 0.25


def test_impossible_settings_are_taken() -> None:
    with pytest.raises(MambaintError, match="give 0 or more"):
        load_rotations(-1)
    with pytest.raises(MambaintError, match="positive deviation"):
        load_rotations(deviation=0.0)
    with pytest.raises(MambaintError, match="none for embedded data"):
        DataSource(kind="rotations", path="x")
