"""AdamW over the parameters of a model by their roles."""

from __future__ import annotations

from typing import Any

import torch

from mamba_int.training.config import TrainingConfig
from mamba_int.training.protocol import TrainableModel


def make_optimizer(model: TrainableModel, config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101), one group per role of the model's parameters.

    Every group carries its peak rate as ``peak``; the decays have a rate of their own, and where
    ``weight_decay_on`` is ``matrices`` nothing else decays.
    """
    groups: list[dict[str, Any]] = []
    for role, parameters in model.parameter_roles().items():
        if not parameters:
            continue
        rate = config.learning_rate * (config.decay_rate_factor if role == "decays" else 1.0)
        decaying = config.weight_decay_on == "all" or role == "matrices"
        groups.append(
            {
                "params": parameters,
                "lr": rate,
                "peak": rate,
                "weight_decay": config.weight_decay if decaying else 0.0,
            }
        )
    return torch.optim.AdamW(groups, betas=(config.beta1, config.beta2), fused=True)
