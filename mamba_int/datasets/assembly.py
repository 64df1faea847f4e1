"""From parsed samples to a data set: split, fit the feature scaling, quantize."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from mamba_int.datasets.records import FEATURE_LIMIT, ClassificationData, quantize_features
from mamba_int.errors import MambaintError

TEST_SHARE = 0.2
VALIDATION_SHARE = 0.2
LARGEST_REAL = 1e30
"""Beyond this the variance of a channel could overflow; real measurements never come near."""

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Samples:
    """Parsed sequences before splitting.

    Attributes:
        inputs: float64 [n, T, C], finite; steps at and after a sequence's length are padding and hold 0.
        labels: n label texts.
        lengths: int64 [n], or None if every sequence has T steps.
    """

    inputs: Floats
    labels: tuple[str, ...]
    lengths: Integers | None = None

    def take(self, rows: Integers) -> Samples:
        """The samples with these indices, in this order."""
        return Samples(
            self.inputs[rows],
            tuple(self.labels[i] for i in rows),
            None if self.lengths is None else self.lengths[rows],
        )

    def present(self) -> npt.NDArray[np.bool_]:
        """bool [n, T]: which steps are measurements and not padding."""
        n, steps, _ = self.inputs.shape
        if self.lengths is None:
            return np.ones((n, steps), dtype=np.bool_)
        return np.asarray(np.arange(steps)[None, :] < self.lengths[:, None])


def split_stratified(samples: Samples, share: float, seed: int) -> tuple[Samples, Samples]:
    """Split off the last ``share`` of a seeded order in which every class is spread evenly.

    Returns:
        The rest and the part split off, each with at least one sample.

    Raises:
        MambaintError: if there are fewer than two samples.
    """
    n = len(samples.labels)
    if n < 2:
        raise MambaintError(f"{n} sample(s) cannot be split", "give at least 3 samples per class")
    shuffled = np.random.default_rng(seed).permutation(n)
    totals: dict[str, int] = {}
    for label in samples.labels:
        totals[label] = totals.get(label, 0) + 1
    seen = dict.fromkeys(totals, 0)
    position = np.empty(n)
    for row in shuffled:
        label = samples.labels[row]
        position[row] = (seen[label] + 0.5) / totals[label]
        seen[label] += 1
    order = shuffled[np.argsort(position[shuffled], kind="stable")]
    taken = min(max(1, round(share * n)), n - 1)
    return samples.take(order[: n - taken]), samples.take(order[n - taken :])


def split_last(samples: Samples, count: int) -> tuple[Samples, Samples]:
    """Split off the last ``count`` samples as they stand."""
    rows = np.arange(len(samples.labels))
    return samples.take(rows[:-count]), samples.take(rows[-count:])


def _class_order(labels: set[str]) -> tuple[str, ...]:
    try:
        return tuple(sorted(labels, key=lambda label: (float(label), label)))
    except ValueError:
        return tuple(sorted(labels))


def _label_indices(samples: Samples, class_names: tuple[str, ...], split: str) -> torch.Tensor:
    index = {name: i for i, name in enumerate(class_names)}
    for label in samples.labels:
        if label not in index:
            raise MambaintError(
                f"label '{label}' of the {split} split does not occur in the training split",
                "correct the label, or give at least 3 samples of every class",
            )
    return torch.tensor([index[label] for label in samples.labels], dtype=torch.int64)


def fit_scaling(samples: Samples) -> tuple[Floats, Floats]:
    """Offset and scale per channel that map mean +- 4 standard deviations to -127..127.

    A constant channel gets the scale of a channel with deviation 1.

    Returns:
        float64 [C] offsets and float64 [C] scales, finite.
    """
    rows = samples.inputs[samples.present()]
    offset = rows.mean(axis=0)
    deviation = rows.std(axis=0)
    # Rounding leaves a constant channel with a tiny deviation: do not blow that up to full scale.
    constant = deviation <= np.maximum(1e-12 * np.abs(offset), 1.0 / LARGEST_REAL)
    return offset, (FEATURE_LIMIT / 4) / np.where(constant, 1.0, deviation)


def assemble(
    name: str,
    train: Samples,
    validation: Samples,
    test: Samples,
    class_names: tuple[str, ...] | None = None,
) -> ClassificationData:
    """Quantize three splits into a data set.

    Integers inside -127..127 are kept (offset 0, scale 1); anything else is standardized per channel
    from the training split. Padding becomes 0 after that.

    Args:
        name: name of the data set.
        train: training samples; they define scaling and (unless given) the classes.
        validation: samples for choosing a checkpoint.
        test: samples nobody looks at before the end.
        class_names: the classes, if the file declares them.

    Raises:
        MambaintError: for empty splits, one class only, labels unknown to the training split, unequal
            shapes, or values that cannot be scaled.
    """
    splits = {"training": train, "validation": validation, "test": test}
    channels, steps = train.inputs.shape[2], train.inputs.shape[1]
    for split, samples in splits.items():
        if (
            len(samples.labels) == 0
            or samples.inputs.shape[1:] != (steps, channels)
            or samples.inputs.size == 0
        ):
            raise MambaintError(
                f"the {split} split of {name} has shape {list(samples.inputs.shape)}, not [n >= 1, "
                f"{steps or 'T >= 1'}, {channels or 'C >= 1'}]",
                "give every split the same sequence length and channels, and at least one sample",
            )
        if np.abs(samples.inputs).max() > LARGEST_REAL:
            raise MambaintError(
                f"{name} holds values beyond {LARGEST_REAL:g}", "rescale the features or remove the outliers"
            )
    names = class_names or _class_order(set(train.labels))
    if len(names) < 2:
        raise MambaintError(f"{name} has only one class, '{names[0]}'", "give data with two classes or more")

    everything = np.concatenate([s.inputs[s.present()] for s in splits.values()])
    integral = bool(np.all(everything == np.rint(everything)) and np.abs(everything).max() <= FEATURE_LIMIT)
    if integral:
        padded = not all(s.present().all() for s in splits.values())
        low = int(min(everything.min(), 0.0) if padded else everything.min())
        high = int(max(everything.max(), 0.0) if padded else everything.max())
        offset, scale = np.zeros(channels), np.ones(channels)
        if low == high:
            raise MambaintError(f"every value of {name} is {low}", "give features that vary")
    else:
        low, high = -FEATURE_LIMIT, FEATURE_LIMIT
        offset, scale = fit_scaling(train)

    def integers(samples: Samples) -> torch.Tensor:
        quantized = quantize_features(samples.inputs, offset.tolist(), scale.tolist(), low, high)
        return quantized * torch.from_numpy(samples.present())[:, :, None]

    return ClassificationData(
        integers(train),
        _label_indices(train, names, "training"),
        integers(validation),
        _label_indices(validation, names, "validation"),
        integers(test),
        _label_indices(test, names, "test"),
        names,
        tuple(offset.tolist()),
        tuple(scale.tolist()),
        low,
        high,
        name,
    )


def split_and_assemble(
    name: str,
    train: Samples,
    test: Samples | None,
    seed: int,
    class_names: tuple[str, ...] | None = None,
) -> ClassificationData:
    """Split off what a file lacks (test: 20 %; validation: 20 % of the rest), then :func:`assemble`."""
    if len(train.labels) == 0:
        raise MambaintError(f"{name} holds no samples", "give at least 3 samples per class")
    if test is None:
        train, test = split_stratified(train, TEST_SHARE, seed)
    train, validation = split_stratified(train, VALIDATION_SHARE, seed)
    return assemble(name, train, validation, test, class_names)
