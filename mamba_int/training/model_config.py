"""Which model a configuration is of: a native integer model, or a float model of any mixer."""

from __future__ import annotations

from typing import Any

from mamba_int.config import MambaIntConfig
from mamba_int.float_models.config import MambaConfig

ModelConfig = MambaIntConfig | MambaConfig
"""What a model that can be trained is made from."""


def names_float_model(values: dict[str, Any]) -> bool:
    """Whether a table of settings is of a float model: those alone have a mixer to choose."""
    return "mixer" in values


def model_config_from_dict(values: dict[str, Any]) -> ModelConfig:
    """The configuration that a table of settings means.

    Raises:
        MambaintError: for unknown keys, wrong types or impossible shapes.
    """
    if names_float_model(values):
        return MambaConfig.from_dict(values)
    return MambaIntConfig.from_dict(values)


def arithmetic_of(config: ModelConfig) -> str:
    """``integer`` or ``float``: what the forward of the model computes with."""
    return "float" if isinstance(config, MambaConfig) else config.arithmetic
