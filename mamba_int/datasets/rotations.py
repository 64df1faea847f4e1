"""Generated rotations of a rigid body, as a three-axis gyroscope reads them.

A body starts upright. At every step it turns by a rotation vector (axis times angle, in its own frame), drawn
from a normal distribution; the label is the axis, of six, that its z axis is nearest to in the end. Rotations
do not commute, so their order decides: steps about one axis at a time could be added up, these cannot.

The same arguments give the same data everywhere: rotation vectors are integers in units of 1/64 radian, drawn
by NumPy's PCG64, and bodies within 2^-20 of a tie between two axes are drawn again.
"""

from __future__ import annotations

import numpy as np

from mamba_int.datasets.assembly import Floats, Integers, Samples, assemble
from mamba_int.datasets.records import FEATURE_LIMIT, ClassificationData
from mamba_int.errors import MambaintError

UNITS_PER_RADIAN = 64
DEVIATION = 0.4
"""Of each component of a step's rotation vector, in radians, if not told otherwise."""
STEPS = 12
SAMPLES = {"train": 50000, "validation": 2000, "test": 4000}
CLASS_NAMES = ("+x", "-x", "+y", "-y", "+z", "-z")
_TIE = 2.0**-20


def composed_rotations(vectors: Floats) -> Floats:
    """Unit quaternions [n, T, 4] of the bodies after every step.

    Args:
        vectors: rotation vectors in radians, [n, T, 3], each in the frame of the body at its step.

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


def upright_axis(turned: Floats) -> Floats:
    """Where the z axis of each body [..., 4] points: Q k Q*, [..., 3]."""
    a, b, c, d = np.moveaxis(turned, -1, 0)
    return np.stack([2 * (b * d + a * c), 2 * (c * d - a * b), a * a - b * b - c * c + d * d], -1)


def nearest_axis(direction: Floats) -> tuple[Integers, Floats]:
    """Index in ``CLASS_NAMES`` of the axis nearest to each direction [..., 3], and its lead over the next."""
    along = np.stack([direction, -direction], -1).reshape(*direction.shape[:-1], 6)
    ordered = np.sort(along, -1)
    return along.argmax(-1), ordered[..., -1] - ordered[..., -2]


def _draw(generator: np.random.Generator, count: int, steps: int, deviation: float) -> Samples:
    inputs, labels = [], []
    found = 0
    while found < count:
        drawn = generator.standard_normal((count - found, steps, 3)) * (deviation * UNITS_PER_RADIAN)
        vectors = np.clip(np.rint(drawn), -FEATURE_LIMIT, FEATURE_LIMIT)
        label, lead = nearest_axis(upright_axis(composed_rotations(vectors / UNITS_PER_RADIAN)[:, -1]))
        clear = lead > _TIE
        inputs.append(vectors[clear])
        labels.append(label[clear])
        found += int(clear.sum())
    names = tuple(CLASS_NAMES[i] for i in np.concatenate(labels))
    return Samples(np.concatenate(inputs), names)


def load_rotations(steps: int = 0, seed: int = 0, deviation: float = DEVIATION) -> ClassificationData:
    """50,000 bodies to train on, 2,000 to validate, 4,000 to test: int64 [n, steps, 3] and one of six axes.

    Args:
        steps: of a body; 0 for 12.
        seed: of the generator.
        deviation: standard deviation of each component of a step's rotation vector, in radians.
    """
    if steps < 0 or seed < 0 or not deviation > 0:
        raise MambaintError(
            f"{steps} steps of {deviation} radians from seed {seed}",
            "give 0 or more, and a positive deviation",
        )
    generator = np.random.default_rng(seed)
    train, validation, test = (
        _draw(generator, count, steps or STEPS, deviation) for count in SAMPLES.values()
    )
    return assemble("rotations", train, validation, test, CLASS_NAMES)
