"""Generated gestures: a body turned twice, as the three-axis gyroscope in it reads them.

A gesture is a turn about one axis of the body and then a turn about another; the class is which axis comes
first and which second, six in all. Turns are of 60 to 120 degrees either way, with the speed of the smoothest
motion there is, 30 s^2 (1 - s)^2 (the derivative of equation 3 of Flash and Hogan 1985, J. Neurosci. 5); when
they happen, how long they take and the pause between them are drawn. The sensor is mounted askew by a random
rotation, has a constant bias, and noise.

``write_gestures`` writes them as files of the UEA/UCR archive, which any library for time series reads; the
data source ``gestures`` is the same data.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mamba_int.datasets.assembly import Floats, Samples, split_and_assemble
from mamba_int.datasets.records import ClassificationData
from mamba_int.errors import MambaintError
from mamba_int.files import write_bytes

STEPS = 16
"""Steps of a window if not told otherwise: 1.6 seconds."""
STEP_SECONDS = 0.1
SAMPLES = {"TRAIN": 2500, "TEST": 1000}
CLASS_NAMES = ("xy", "xz", "yx", "yz", "zx", "zy")
LEAST_STEPS = 8
TILT = 0.15
"""Standard deviation of the components of the quaternion (1, a, b, c) / |.| that mounts the sensor askew."""
BIAS = 0.15
"""Standard deviation of a sensor's constant error, radians a second."""
NOISE = 0.5
"""Standard deviation of the noise of a reading, radians a second."""


def _turn_speed(steps: int, start: Floats, duration: Floats) -> Floats:
    """Speed [n, steps], in turns a second, of a turn of size 1 that lasts from start to start + duration,
    in steps."""
    s = np.clip((np.arange(steps) + 0.5 - start[:, None]) / duration[:, None], 0.0, 1.0)
    return 30.0 * (s * (1.0 - s)) ** 2 / (duration[:, None] * STEP_SECONDS)


def _mounting(generator: np.random.Generator, count: int) -> list[list[Floats]]:
    """Rotation matrices, as rows of columns [n]."""
    parts = np.concatenate([np.ones((count, 1)), TILT * generator.standard_normal((count, 3))], 1)
    a, b, c, d = parts.T / np.sqrt((parts * parts).sum(1))
    return [
        [1 - 2 * (c * c + d * d), 2 * (b * c - a * d), 2 * (b * d + a * c)],
        [2 * (b * c + a * d), 1 - 2 * (b * b + d * d), 2 * (c * d - a * b)],
        [2 * (b * d - a * c), 2 * (c * d + a * b), 1 - 2 * (b * b + c * c)],
    ]


def _draw(generator: np.random.Generator, count: int, steps: int) -> Samples:
    label = generator.integers(len(CLASS_NAMES), size=count)
    axes = np.array([["xyz".index(axis) for axis in name] for name in CLASS_NAMES])[label]
    angle = generator.uniform(np.pi / 3, 2 * np.pi / 3, (count, 2)) * generator.choice(
        [-1.0, 1.0], (count, 2)
    )
    duration = steps * generator.uniform(0.25, 0.4, (count, 2))
    spare = steps - duration.sum(1)
    pause, delay = (spare * generator.uniform(0.0, 0.5, count) for _ in range(2))
    first = angle[:, :1] * _turn_speed(steps, delay, duration[:, 0])
    second = angle[:, 1:] * _turn_speed(steps, delay + duration[:, 0] + pause, duration[:, 1])
    mounting = _mounting(generator, count)
    bias = BIAS * generator.standard_normal((count, 1, 3))
    read = bias + NOISE * generator.standard_normal((count, steps, 3))
    for j in range(3):
        about = first * (axes[:, :1] == j) + second * (axes[:, 1:] == j)
        for i in range(3):
            read[:, :, i] += mounting[i][j][:, None] * about
    # What the files hold.
    return Samples(np.round(read, 3), tuple(CLASS_NAMES[i] for i in label))


def _splits(steps: int, seed: int) -> tuple[Samples, Samples]:
    if (steps and steps < LEAST_STEPS) or steps < 0 or seed < 0:
        raise MambaintError(
            f"gestures of {steps} steps from seed {seed}",
            f"give {LEAST_STEPS} steps or more, or 0 for {STEPS}, and a seed of 0 or more",
        )
    generator = np.random.default_rng(seed)
    train, test = (_draw(generator, count, steps or STEPS) for count in SAMPLES.values())
    return train, test


def load_gestures(steps: int = 0, seed: int = 0) -> ClassificationData:
    """What ``load_ts`` reads from the files of :func:`write_gestures`: 2,000 windows to train on, 500 to
    validate, 1,000 to test, int64 [n, steps, 3], and six classes.

    Args:
        steps: of a window; 0 for 16.
        seed: of the generator and of the split.
    """
    train, test = _splits(steps, seed)
    return split_and_assemble("Gestures", train, test, seed, CLASS_NAMES)


def write_gestures(folder: Path, steps: int = 0, seed: int = 0) -> tuple[Path, Path]:
    """Write ``Gestures_TRAIN.ts`` and ``Gestures_TEST.ts``, radians a second, and return their paths.

    Args:
        folder: made if missing. steps, seed: see :func:`load_gestures`.

    Raises:
        MambaintError: for impossible settings, or if the folder cannot be written.
    """
    paths = []
    for part, samples in zip(SAMPLES, _splits(steps, seed), strict=True):
        lines = [
            f"# Generated by mambaint: gestures of {steps or STEPS} steps, seed {seed}.",
            "@problemName Gestures",
            "@timeStamps false",
            "@missing false",
            "@univariate false",
            "@dimensions 3",
            "@equalLength true",
            f"@seriesLength {steps or STEPS}",
            f"@classLabel true {' '.join(CLASS_NAMES)}",
            "@data",
        ]
        for window, label in zip(samples.inputs, samples.labels, strict=True):
            axes = (",".join(f"{value:.3f}" for value in axis) for axis in window.T)
            lines.append(":".join([*axes, label]))
        path = folder / f"Gestures_{part}.ts"
        write_bytes(path, "\n".join([*lines, ""]).encode())
        paths.append(path)
    return paths[0], paths[1]
