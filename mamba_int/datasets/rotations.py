"""Generated rotations of a rigid body, as a three-axis gyroscope reads them.

A body rests for a step or more and then turns at every step by a quarter, one way or the other, about one of
its own axes; the label is which of six directions its z axis points to in the end. Turns about different axes
do not commute, so their order decides. Bodies to train on turn any number of times, so that the short
sequences lead to the long ones; those to validate and test on turn at every step but the first.

The same arguments give the same data everywhere: inputs are whole quarter turns, drawn by NumPy's PCG64.
"""

from __future__ import annotations

import numpy as np

from mamba_int.datasets.assembly import Floats, Integers, Samples, assemble
from mamba_int.datasets.records import ClassificationData
from mamba_int.errors import MambaintError

STEPS = 12
"""Of a body if not told otherwise, rest included."""
SAMPLES = {"train": 50000, "validation": 2000, "test": 4000}
CLASS_NAMES = ("+x", "-x", "+y", "-y", "+z", "-z")
QUARTER_TURNS = np.concatenate([np.eye(3), -np.eye(3)])
"""[6, 3]: one quarter turn about x, y or z, or back."""


def composed_rotations(vectors: Floats) -> Floats:
    """Unit quaternions [n, T, 4] of the bodies after every step.

    Args:
        vectors: rotation vectors (axis times angle) in radians, [n, T, 3], each in the body's own frame.

    Returns:
        Q_t = q_1 q_2 ... q_t with q_t = cos |w|/2 + w / |w| sin |w|/2 (Hamilton's product): a vector v of the
        body points to Q v Q*.
    """
    angles = np.linalg.norm(vectors, axis=-1, keepdims=True)
    halves = np.concatenate([np.cos(angles / 2), 0.5 * np.sinc(angles / (2 * np.pi)) * vectors], -1)
    turned = halves.copy()
    for t in range(1, vectors.shape[1]):
        turned[:, t] = _product(turned[:, t - 1], halves[:, t])
    return turned


def _product(p: Floats, q: Floats) -> Floats:
    p0, p1, p2, p3 = p.T
    q0, q1, q2, q3 = q.T
    components = (
        p0 * q0 - p1 * q1 - p2 * q2 - p3 * q3,
        p0 * q1 + p1 * q0 + p2 * q3 - p3 * q2,
        p0 * q2 - p1 * q3 + p2 * q0 + p3 * q1,
        p0 * q3 + p1 * q2 - p2 * q1 + p3 * q0,
    )
    return np.stack(components, -1)


def nearest_axis(turned: Floats) -> Integers:
    """Which of ``CLASS_NAMES`` the z axis of each body, Q k Q*, is nearest to: indices [...] of [..., 4]."""
    a, b, c, d = np.moveaxis(turned, -1, 0)
    along = np.stack([2 * (b * d + a * c), 2 * (c * d - a * b), a * a - b * b - c * c + d * d], -1)
    axis = np.abs(along).argmax(-1)
    return np.asarray(2 * axis + (np.take_along_axis(along, axis[..., None], -1)[..., 0] < 0))


def _draw(generator: np.random.Generator, count: int, steps: int, all_turn: bool) -> Samples:
    turns = QUARTER_TURNS[generator.integers(6, size=(count, steps))]
    rest = np.ones(count) if all_turn else generator.integers(1, steps, size=count)
    turns[np.arange(steps) < rest[:, None]] = 0.0
    label = nearest_axis(composed_rotations(np.pi / 2 * turns)[:, -1])
    return Samples(turns, tuple(CLASS_NAMES[i] for i in label))


def load_rotations(steps: int = 0, seed: int = 0) -> ClassificationData:
    """50,000 bodies to train on, 2,000 to validate, 4,000 to test: int64 [n, steps, 3] quarter turns about x,
    y and z, and one of six directions.

    Args:
        steps: of a body, the first of them at rest; 0 for 12.
        seed: of the generator.
    """
    if steps < 0 or steps == 1 or seed < 0:
        raise MambaintError(
            f"{steps} steps of rotations from seed {seed}",
            f"give 2 steps or more, or 0 for {STEPS}, and a seed",
        )
    generator = np.random.default_rng(seed)
    train, validation, test = (
        _draw(generator, count, steps or STEPS, part != "train") for part, count in SAMPLES.items()
    )
    return assemble("rotations", train, validation, test, CLASS_NAMES)
