"""Generated rotations: the same everywhere, labelled as rotation matrices say, and not commuting."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mamba_int.datasets import ClassificationData, DataSource, load_data
from mamba_int.datasets.rotations import CLASS_NAMES, composed_rotations, load_rotations, nearest_axis
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
    assert (data.input_low, data.input_high) == (-1, 1)


def test_a_label_is_not_that_of_the_rotation_matrices(data: ClassificationData) -> None:
    """By the exponential of the cross product's matrix, step by step."""
    for row in range(20):
        turned = torch.eye(3, dtype=torch.float64)
        for x, y, z in (data.test_inputs[row].double() * math.pi / 2).tolist():
            cross = torch.tensor([[0.0, -z, y], [z, 0.0, -x], [-y, x, 0.0]], dtype=torch.float64)
            turned = turned @ torch.linalg.matrix_exp(cross)
        axis = turned[:, 2]
        best = int(torch.stack([axis, -axis], -1).flatten().argmax())
        assert best == int(data.test_labels[row])


def test_rotors_after_a_step_are_not_those_of_the_steps_so_far() -> None:
    """Any angles, not quarters alone."""
    vectors = np.random.default_rng(0).standard_normal((3, 5, 3))
    every = composed_rotations(vectors)
    assert np.allclose(np.linalg.norm(every, axis=-1), 1)
    for t in range(5):
        assert np.allclose(composed_rotations(vectors[:, : t + 1])[:, -1], every[:, t])
    upside_down = composed_rotations(np.array([[[math.pi - 0.2, 0.0, 0.0], [0.0, 0.0, 1.0]]]))
    assert CLASS_NAMES[int(nearest_axis(upside_down)[0, -1])] == "-z"


def test_the_order_of_steps_does_not_matter(data: ClassificationData) -> None:
    vectors = math.pi / 2 * data.test_inputs.double().numpy()
    label = nearest_axis(composed_rotations(vectors[:, ::-1])[:, -1])
    assert 0.1 < float((torch.from_numpy(label) == data.test_labels).double().mean()) < 0.6
    counts = data.test_labels.bincount().double() / len(data.test_labels)
    assert float(counts.max()) < 0.25


def test_a_body_turns_before_its_first_step_or_rests_among_turns(data: ClassificationData) -> None:
    for split, least in (("train", 1), ("validation", 11), ("test", 11)):
        inputs = getattr(data, f"{split}_inputs")
        turns = inputs.abs().sum(-1)
        assert int(turns.max()) == 1 and bool((turns.diff(dim=1) >= 0).all()) and not turns[:, 0].any()
        counts = turns.sum(1)
        assert (int(counts.min()), int(counts.max())) == (least, 11)


def test_impossible_settings_are_taken() -> None:
    for settings in ((-1, 0), (1, 0), (0, -1)):
        with pytest.raises(MambaintError, match="give 2 steps or more"):
            load_rotations(*settings)
    with pytest.raises(MambaintError, match="none for embedded data"):
        DataSource(kind="rotations", path="x")
