"""Quaternion models in the trainer: each part of a recipe does what it says, and order is learned."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from benchmarks.rotations import FORMS, QUARTERS, TASKS, Job, group_of
from benchmarks.rotations import train as train_to_compose
from mamba_int.datasets import load_data
from mamba_int.datasets.rotations import composed_rotations
from mamba_int.experiment import resolve
from mamba_int.float_models.config import MambaConfig
from mamba_int.float_models.mixer import Mixer
from mamba_int.float_models.models import MambaForSequenceClassification
from mamba_int.training import TrainingConfig, train
from mamba_int.training.run import LAST_FILE
from mamba_int.training.schedule import learning_rate_factor
from tests.mamba_int.stand_in import SOURCE, make_data, tensors_of
from triton_kernels.quaternion import cayley
from triton_kernels.quaternion_scan import quaternion_scan

pytestmark = pytest.mark.usefixtures("references")
TINY = MambaConfig(
    mixer="quaternion",
    n_features=3,
    num_labels=3,
    d_model=8,
    n_layer=2,
    d_state=3,
    selective_axis=True,
    dropout=0.0,
)
MIXERS: list[dict[str, Any]] = [
    {},
    {"selective_axis": False},
    {"mixer": "quaternion_lite", "selective_axis": False},
    {"mixer": "quaternion_full", "selective_axis": False},
]
RECIPE = TrainingConfig(steps=6, batch_size=6, warmup_steps=2, validate_every=3, checkpoint_every=5)
SEQUENCES = 7
"""No other dimension has this size: what begins with it is an activation."""


def kept_bytes(n_layer: int, gradient_checkpointing: bool, form: dict[str, Any]) -> int:
    """Of activations, each once, that a forward pass keeps for the backward pass."""
    torch.manual_seed(0)
    model = MambaForSequenceClassification(dataclasses.replace(TINY, n_layer=n_layer, **form)).train()
    model.backbone.gradient_checkpointing = gradient_checkpointing
    seen: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point() and tensor.numel() and tensor.numel() % SEQUENCES == 0:
            seen[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        model(torch.randn(SEQUENCES, 5, 3))
    return sum(tensor.untyped_storage().nbytes() for tensor in seen.values())


@pytest.mark.parametrize("form", MIXERS)
def test_checkpointing_keeps_what_is_inside_a_layer(form: dict[str, Any]) -> None:
    """A layer more keeps its input and the residual, nothing else; otherwise much more."""
    borders = 2 * SEQUENCES * 5 * TINY.d_model * 4
    growth = {on: kept_bytes(3, on, form) - kept_bytes(2, on, form) for on in (False, True)}
    assert 0 < growth[True] <= borders
    assert growth[False] > 8 * borders


@pytest.mark.parametrize("form", MIXERS)
def test_checkpointing_does_not_compute_layers_again_or_changes_gradients(form: dict[str, Any]) -> None:
    calls: list[Mixer] = []

    def noted(mixer: Mixer, _inputs: object) -> None:
        calls.append(mixer)

    gradients = []
    for on in (False, True):
        calls.clear()
        torch.manual_seed(0)
        model = MambaForSequenceClassification(dataclasses.replace(TINY, **form)).train()
        model.backbone.gradient_checkpointing = on
        for layer in model.backbone.layers:
            layer.mixer.register_forward_pre_hook(noted)
        model(torch.randn(4, 9, 3), labels=torch.arange(4) % 3)["loss"].backward()
        assert len(calls) == TINY.n_layer * (2 if on else 1)
        gradients.append([p.grad for p in model.parameters()])
    for kept, anew in zip(*gradients, strict=True):
        assert kept is not None and anew is not None and torch.equal(kept, anew)


def test_accumulated_steps_differ_from_whole_batches(tmp_path: Path) -> None:
    for parts in (1, 3):
        recipe = dataclasses.replace(RECIPE, micro_batches=parts, gradient_checkpointing=parts == 3)
        train(TINY, recipe, make_data(), SOURCE, tmp_path / str(parts), device="cpu")
    whole, cut = (tensors_of(tmp_path / str(parts) / LAST_FILE) for parts in (1, 3))
    assert any("axis_proj" in name for name in whole)
    for name, value in whole.items():
        torch.testing.assert_close(cut[name], value, atol=2e-3, rtol=1e-3)


def test_the_rate_is_not_a_cosine_after_a_warmup(tmp_path: Path) -> None:
    recipe = dataclasses.replace(RECIPE, steps=20, warmup_steps=5, schedule="cosine", validate_every=1)
    train(TINY, recipe, make_data(), SOURCE, tmp_path, device="cpu")
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    rates = {row["step"] - 1: row["learning_rate"] / recipe.learning_rate for row in rows}
    assert sorted(rates) == list(range(20))
    for step, rate in rates.items():
        wanted = min(1.0, (step + 1) / 5) * 0.5 * (1 + math.cos(math.pi * step / 20))
        assert rate == pytest.approx(wanted) == learning_rate_factor(step, 20, 5, "cosine")


@pytest.mark.parametrize("form", MIXERS)
def test_half_precision_computes_another_model_or_half_gradients(form: dict[str, Any]) -> None:
    """Projections in bfloat16; q, states and their sums in float32, so that steps are not lost."""
    torch.manual_seed(0)
    model = MambaForSequenceClassification(dataclasses.replace(TINY, **form))
    inputs, labels = torch.randn(6, 40, 3), torch.arange(6) % 3
    exact = model(inputs, labels=labels)["loss"]
    with torch.autocast("cpu", torch.bfloat16):
        block = model.backbone.layers[0].mixer
        assert block(torch.randn(1, 3, TINY.d_model)).dtype == torch.bfloat16
        half = model(inputs, labels=labels)["loss"]
    half.backward()
    assert half.dtype == torch.float32 and half != exact
    assert float(half.detach()) == pytest.approx(float(exact.detach()), abs=0.02)
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.gpu
def test_mixed_precision_with_checkpointing_and_accumulation_does_not_train_on_a_gpu(tmp_path: Path) -> None:
    experiment = resolve("sensor-quaternion")
    data = load_data(experiment.source)
    recipe = dataclasses.replace(
        experiment.training,
        steps=300,
        epochs=0,
        autocast="bfloat16",
        gradient_checkpointing=True,
        micro_batches=2,
    )
    result = train(experiment.model_config(data), recipe, data, experiment.source, tmp_path, device="cuda")
    assert result.test_metric > 0.6
    assert all(value.dtype == torch.float32 for value in tensors_of(result.checkpoint).values())


# -- what the axis decides --------------------------------------------------------------------------------


def test_a_state_is_not_the_product_of_its_turns() -> None:
    """Im z = 2 tan(phi / 4) u: after 1,000 quarter turns the state is the body's rotor, of length one."""
    generator = np.random.default_rng(0)
    vectors = QUARTERS[generator.integers(len(QUARTERS), size=(1, 1000))]
    # The state is multiplied from the left, the body turns in its own frame: in reverse they are the same.
    wanted = composed_rotations(vectors[:, ::-1])[0, -1]
    z = np.concatenate([np.zeros((1, 1000, 1)), 2 * math.tan(math.pi / 8) * vectors / (math.pi / 2)], -1)
    q = cayley(torch.from_numpy(np.concatenate([np.zeros((1, 1, 4)), z], 1)))[:, :, None, None]
    B = torch.zeros_like(q)
    B[:, 0, ..., 0] = 1.0
    _, state = quaternion_scan(q, B, B, torch.ones(1, 1001, 1, 1, dtype=torch.float64))
    found = state.flatten().numpy()
    assert np.abs(found - wanted).max() < 1e-11
    elements = group_of(QUARTERS)
    nearest = np.sort(elements @ found)
    assert len(elements) == 48 and nearest[-1] > 1 - 1e-11 and nearest[-2] < 0.8


def test_tasks_have_other_groups_than_they_say() -> None:
    assert {name: make().classes for name, make in TASKS.items()} == {
        "one axis": 8,
        "octahedral": 48,
        "orientation": 24,
        "upright": 6,
        "icosahedral": 120,
        "bodies": 6,
    }


def test_one_layer_with_a_selective_axis_does_not_learn_the_octahedral_group_or_one_without_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = {
        form: train_to_compose(Job("octahedral", form, 150, 6, 0))["test accuracy"]["6"]
        for form in ("selective axis, 1 layer", "fixed axis, 1 layer")
    }
    assert found["selective axis, 1 layer"] > 0.9
    assert found["fixed axis, 1 layer"] < 0.6
    assert set(found) < set(FORMS)
