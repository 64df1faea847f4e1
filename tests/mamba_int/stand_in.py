"""A small trainable model in place of the real one, and runs with it."""

from __future__ import annotations

import dataclasses
import math
import signal
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from mamba_int.config import MambaIntConfig
from mamba_int.datasets import ClassificationData, DataSource, TextData
from mamba_int.training import Progress, TrainingConfig, TrainingResult, train

SOURCE = DataSource()


class StandIn(nn.Module):
    """The least that is trainable: a running scale as a buffer, and dropout to consume random numbers."""

    running: Tensor
    frozen: Tensor
    gradient_checkpointing: bool = False
    observing: bool = True
    dropout = 0.1

    def __init__(self, config: MambaIntConfig, seed: int) -> None:
        super().__init__()
        self.config = config
        generator = torch.Generator().manual_seed(seed)
        width = config.vocab_size if config.task == "language_model" else config.seq_len * config.n_features
        self.weight = nn.Parameter(torch.randn(config.n_outputs, width, generator=generator) * 0.1)
        self.bias = nn.Parameter(torch.zeros(config.n_outputs))
        self.register_buffer("running", torch.tensor(0.0))
        self.register_buffer("frozen", torch.tensor(False))
        self.calls = 0

    @property
    def scales_frozen(self) -> bool:
        return bool(self.frozen)

    def scales(self) -> dict[str, int]:
        return {"running": int(self.frozen)}

    def observe(self, inputs: Tensor) -> None:
        self.running.fill_(inputs.float().abs().mean())

    def freeze_scales(self) -> None:
        assert not self.scales_frozen, "frozen twice"
        self.frozen.fill_(True)

    def frozen_integers(self) -> dict[str, Tensor]:
        return {"weight": (self.weight.detach() * 64).round().long()}

    def parameter_roles(self) -> dict[str, list[nn.Parameter]]:
        return {"matrices": [self.weight], "small": [], "decays": [self.bias]}

    def forward(self, inputs: Tensor) -> Tensor:
        if self.config.task == "language_model":
            features = nn.functional.one_hot(inputs, self.config.vocab_size).float()
        else:
            features = inputs.flatten(1).float()
            scale = self.running.clamp_min(0.1)
            if self.training and self.observing and not self.scales_frozen:
                self.running.lerp_(features.abs().mean(), 0.02)
            features = features / scale
        return nn.functional.dropout(features, self.dropout, self.training) @ self.weight.T + self.bias


class BreaksAt(StandIn):
    """Gives NaN in some training batches, and spoils its buffer as well."""

    bad = frozenset({5})

    def forward(self, inputs: Tensor) -> Tensor:
        logits = super().forward(inputs)
        if self.training:
            self.calls += 1
            if self.calls in self.bad:
                self.running.fill_(math.nan)
                return logits * math.nan
        return logits


class AlwaysBreaks(BreaksAt):
    bad = frozenset(range(7, 1000))


def make_data(n: int = 60, classes: int = 3) -> ClassificationData:
    generator = torch.Generator().manual_seed(1)

    def part(count: int) -> tuple[Tensor, Tensor]:
        labels = torch.arange(count) % classes
        inputs = torch.randint(0, 5, (count, 4, 3), generator=generator)
        inputs[torch.arange(count), labels] += 6
        return inputs, labels

    names = tuple(f"c{i}" for i in range(classes))
    return ClassificationData(*part(n), *part(20), *part(20), names, (0.0,) * 3, (1.0,) * 3, 0, 16, "made")


def make_config(data: ClassificationData | TextData, **changes: Any) -> MambaIntConfig:
    if isinstance(data, TextData):
        return MambaIntConfig(task="language_model", vocab_size=data.vocab_size, **changes)
    return MambaIntConfig(
        seq_len=data.seq_len, n_features=data.n_features, n_classes=data.n_classes, chunk_size=4, **changes
    )


RECIPE = TrainingConfig(
    steps=37,
    batch_size=16,
    warmup_steps=5,
    shift_augmentation=1,
    validate_every=6,
    checkpoint_every=9,
    threads=1,
)
TEXT_RECIPE = dataclasses.replace(RECIPE, sequence_length=8, shift_augmentation=0, evaluation_length=32)


def fit(folder: Path, config: TrainingConfig = RECIPE, **options: Any) -> TrainingResult:
    data = options.pop("data", None) or make_data()
    options = {"build_model": StandIn, "device": "cpu", **options}
    arithmetic = options.pop("arithmetic", "integer")
    return train(make_config(data, arithmetic=arithmetic), config, data, SOURCE, folder, **options)


def interrupt_at(*steps: int) -> Any:
    def progress(now: Progress) -> None:
        if now.step in steps:
            signal.raise_signal(signal.SIGINT)

    return progress


def tensors_of(path: Path) -> dict[str, Tensor]:
    return safetensors.torch.load(path.read_bytes())


def assert_same_tensors(one: Path, other: Path) -> None:
    first, second = tensors_of(one), tensors_of(other)
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name
