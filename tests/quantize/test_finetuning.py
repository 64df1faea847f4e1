"""Fine-tuning for ternary weights: it learns, it is reproducible, and conversion finds what it made."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mamba_int.errors import MambaintError
from quantize.blocks.registry import block_conversion
from quantize.calibration import FloatModel, named_layers
from quantize.finetuning import FinetuneConfig, finetune, fold_norms
from quantize.float_mamba import ConversionConfig, convert
from tests.quantize.test_float_mamba import FORMAT, random_model

SHORT = FinetuneConfig(steps=24, learning_rate=1e-2, distillation=0.2)


def batches_of(reals: Tensor) -> Any:
    """Ten of the inputs a step, and what to say of them: the same token, or whether the end is large."""

    def at(step: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(step)
        rows = torch.randperm(len(reals), generator=generator)[:10]
        inputs = reals[rows]
        return inputs, (inputs[:, -1].mean(-1) > 0.5).long() if inputs.is_floating_point() else inputs

    return at


def wide_model(name: str) -> tuple[FloatModel, Tensor]:
    """In float64, which Triton's interpreter leaves to PyTorch, and its inputs."""
    model, reals, _ = random_model(name)
    return model.double(), reals.double() if reals.is_floating_point() else reals


def finetuned(name: str) -> tuple[FloatModel, FloatModel, Tensor, list[float]]:
    model, reals = wide_model(name)
    losses: list[float] = []
    student = finetune(model, batches_of(reals), SHORT, lambda step, steps, loss: losses.append(loss))
    return model, student, reals, losses


@pytest.mark.parametrize("name", ["last", "language", "mamba_last"])
def test_folded_norms_leave_the_model_what_it_was(name: str) -> None:
    model, reals = wide_model(name)
    folded = copy.deepcopy(model)
    fold_norms(folded)
    with torch.no_grad():
        torch.testing.assert_close(folded(reals).logits, model(reals).logits, rtol=1e-4, atol=1e-5)
    norms = [layer.norm.weight for layer in folded.backbone.layers]
    assert all((weight == 1).all() and not weight.requires_grad for weight in norms)


@pytest.mark.parametrize("name", ["last", "language_odd", "mamba_language"])
def test_the_student_comes_nearer_and_the_teacher_stays(name: str) -> None:
    before = copy.deepcopy(wide_model(name)[0].state_dict())
    model, student, _, losses = finetuned(name)
    assert len(losses) == SHORT.steps and np.mean(losses[-3:]) < 0.75 * losses[0]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert set(student.state_dict()) == set(before) and not student.training


@pytest.mark.parametrize("name", ["last", "language_odd", "mamba_language", "groups_language"])
def test_conversion_finds_the_ternary_rows_of_the_student(name: str) -> None:
    _, student, reals, _ = finetuned(name)
    form = FORMAT if student.config.n_features else None
    for reconstruct in (False, True):
        config = ConversionConfig(weights="ternary", reconstruct=reconstruct)
        graph = convert(student, reals, form, config).graph
        held = {
            node.name.removesuffix("_rows"): node.constants["weight"]
            for node in graph.nodes
            if node.op == "linear"
        }
        for at, layer in named_layers(student):
            for matrix, _ in block_conversion(student.config.mixer).projections(layer):
                key = next(name for name, module in layer.mixer.named_modules() if module is matrix)
                weight = matrix.weight.detach().double().numpy()
                np.testing.assert_array_equal(held[f"{at}.{key}"], np.sign(weight))
                magnitudes = np.abs(weight)
                largest = magnitudes.max(1, keepdims=True)
                assert ((magnitudes == 0) | (magnitudes == largest)).all()


def test_the_same_seed_gives_the_same_student() -> None:
    first, second = finetuned("language")[1], finetuned("language")[1]
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_a_loss_that_is_not_finite_is_named() -> None:
    model, reals = wide_model("last")

    def poisoned(step: int) -> tuple[Tensor, Tensor]:
        inputs, labels = batches_of(reals)(step)
        return (inputs * torch.nan if step == 2 else inputs), labels

    with pytest.raises(MambaintError, match="step 3 is not finite"):
        finetune(model, poisoned, SHORT)


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 0},
        {"warmup": 1.5},
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
        {"distillation": 1.5},
        {"temperature": 0.0},
        {"clip": 0.0},
        {"seed": -1},
    ],
)
def test_settings_without_sense_are_named(change: dict[str, Any]) -> None:
    with pytest.raises(MambaintError, match=next(iter(change))):
        FinetuneConfig(**change)
