"""Quantization-aware distillation: a float model that keeps its answers with ternary projections.

The student starts as a copy of the float model, its norms' weights in the matrices that follow them. In
every forward its projections are their ternary rows (``quantize.ternary``), whose gradient passes straight
through to latent weights, and it learns both the targets and the teacher's distribution over them. The result
holds the ternary rows themselves: conversion with ``weights = "ternary"`` finds them as they are.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mamba_int.errors import MambaintError
from mamba_int.training.schedule import learning_rate_factor
from quantize.blocks.registry import block_conversion
from quantize.calibration import FloatModel, named_layers
from quantize.ternary import Ternarization

Batches = Callable[[int], tuple[Tensor, Tensor]]
"""Inputs of a step as the float model takes them; its targets: next tokens [batch, T] or labels [batch]."""
Progress = Callable[[int, int, float], None]
"""Told how many of how many steps are done, and the loss of the last in nats."""
Model = TypeVar("Model", bound=FloatModel)


@dataclass(frozen=True)
class FinetuneConfig:
    """Recipe of a fine-tuning.

    Attributes:
        steps: of AdamW, whose rate falls on half a cosine to zero. warmup: share of them in which it rises.
        learning_rate: at its peak. weight_decay: of the projections' latent weights.
        distillation: share of the teacher in the loss; the rest is the cross entropy of the targets.
        temperature: at which the two distributions are compared.
        clip: largest norm of the gradient.
        seed: of dropout; the batches have their own.
    """

    steps: int = 300
    warmup: float = 0.05
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    distillation: float = 0.5
    temperature: float = 1.0
    clip: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        ranges: dict[str, tuple[float, float]] = {
            "steps": (1, 10**7),
            "warmup": (0.0, 1.0),
            "learning_rate": (1e-8, 1.0),
            "weight_decay": (0.0, 10.0),
            "distillation": (0.0, 1.0),
            "temperature": (1e-3, 1e3),
            "clip": (1e-6, 1e6),
            "seed": (0, 2**63 - 1),
        }
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise MambaintError(f"[finetune] {name} = {value}", f"choose {low:g} to {high:g}")


def finetune(
    model: Model, batches: Batches, config: FinetuneConfig | None = None, progress: Progress | None = None
) -> Model:
    """A copy of a float model, in eval mode, whose projections have learned to be ternary.

    Args:
        model: a classifier or a language model that conversion knows; on its device the work is done, on CUDA
            with matrix products in bfloat16. It stays as it is.
        batches: of the training data, such as ``mamba_int.training.batches.make_batches(...).at``.
        config: the recipe.
        progress: told after every step.

    Raises:
        MambaintError: for a mixer without an integer form, or with ternary projections of its own, or if the
            loss of a step is not finite.
    """
    recipe = config or FinetuneConfig()
    student = copy.deepcopy(model)
    projections = fold_norms(student)
    if not projections:
        raise MambaintError(
            f"the projections of the mixer '{model.config.mixer}' are ternary already",
            "leave out fine-tuning",
        )
    latent = [linear.weight for linear in projections]
    for linear in projections:
        parametrize.register_parametrization(linear, "weight", Ternarization())
    training = model.training
    try:
        _train(student, model.eval(), latent, batches, recipe, progress)
    finally:
        model.train(training)
    for linear in projections:
        parametrize.remove_parametrizations(linear, "weight", leave_parametrized=True)
    student.eval()
    return student


@torch.no_grad()
def fold_norms(model: FloatModel) -> list[nn.Linear]:
    """Move the weights of norms into the projections that read them, where they stay one.

    Returns:
        All projections.

    Raises:
        MambaintError: for a mixer that has no integer form.
    """
    block = block_conversion(model.config.mixer)
    found = []
    for _, layer in named_layers(model):
        for linear, weight in block.projections(layer):
            if weight is not None:
                linear.weight.mul_(weight)
                weight.fill_(1.0)
                weight.requires_grad_(False)
            found.append(linear)
    return found


def _train(
    student: FloatModel,
    teacher: FloatModel,
    latent: list[Tensor],
    batches: Batches,
    config: FinetuneConfig,
    progress: Progress | None,
) -> None:
    device = next(student.parameters()).device
    inside = {id(parameter) for parameter in latent}
    others = [p for p in student.parameters() if id(p) not in inside and p.requires_grad]
    groups = [
        {"params": latent, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, config.learning_rate, betas=(0.9, 0.98))
    student.train()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(config.seed)
        warmup_steps = round(config.warmup * config.steps)
        for step in range(config.steps):
            factor = learning_rate_factor(step, config.steps, warmup_steps, "cosine")
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * factor
            inputs, targets = (tensor.to(device) for tensor in batches(step))
            with _half_precision(device):
                with torch.no_grad():
                    expected = teacher(inputs).logits
                logits = student(inputs).logits
            loss = _loss(logits.float(), expected.float(), targets, config)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_([*latent, *others], config.clip)
            value = float(loss.detach())
            if not math.isfinite(value):
                raise MambaintError(
                    f"the loss of fine-tuning step {step + 1} is not finite", "lower the learning rate"
                )
            optimizer.step()
            if progress is not None:
                progress(step + 1, config.steps, value)


def _half_precision(device: torch.device) -> AbstractContextManager[object]:
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()


def _loss(logits: Tensor, expected: Tensor, targets: Tensor, config: FinetuneConfig) -> Tensor:
    """(1 - a) cross entropy + a t^2 KL(teacher || student) at temperature t (arXiv 1503.02531, section 2)."""
    logits, expected = logits.flatten(0, -2), expected.flatten(0, -2)
    hard = F.cross_entropy(logits, targets.flatten())
    t = config.temperature
    soft = F.kl_div(
        F.log_softmax(logits / t, -1), F.log_softmax(expected / t, -1), reduction="batchmean", log_target=True
    )
    return (1 - config.distillation) * hard + config.distillation * t**2 * soft
