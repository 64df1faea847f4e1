"""Checkpoints for the tests: written as training writes them, from random models with frozen scales."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mamba_int.config import MambaIntConfig
from mamba_int.datasets import ClassificationData, DataSource, TextData, load_data
from mamba_int.model import MambaInt
from mamba_int.training import DataDescription, TrainingConfig, save_checkpoint

SMALL: dict[str, Any] = {"d_model": 8, "headdim": 4, "d_state": 4}


def small_model(
    data: ClassificationData | TextData, freeze: bool = True, **forms: Any
) -> tuple[MambaIntConfig, MambaInt]:
    """A random model that fits the data."""
    torch.set_num_threads(1)
    if isinstance(data, TextData):
        # This shape keeps a scan of any length within 24 bits.
        text: dict[str, Any] = {"task": "language_model", "vocab_size": 256, "seq_len": 16}
        text |= {"chunk_size": 16, "d_state": 16, "d_model": 32, "headdim": 16}
        config = MambaIntConfig(**(SMALL | text | forms))
        inputs = data.train[:64].long().reshape(4, 16)
    else:
        shape = {
            "seq_len": data.seq_len,
            "n_features": data.n_features,
            "n_classes": data.n_classes,
            "input_low": data.input_low,
            "input_high": data.input_high,
        }
        config = MambaIntConfig(**(SMALL | shape | forms))
        inputs = data.train_inputs[:32]
    model = MambaInt(config, 0)
    model.observe(inputs)
    if freeze:
        model.freeze_scales()
    return config, model.eval()


def write_checkpoint(
    path: Path,
    source: DataSource,
    integers: dict[str, torch.Tensor | None] | None = None,
    freeze: bool = True,
    results: dict[str, float] | None = None,
    **forms: Any,
) -> MambaInt:
    """Write a checkpoint and return its model.

    Args:
        path: where to. source: its data.
        integers: laid over the model's; None removes one.
        freeze: whether the scales are frozen.
        results: numbers of the training.
        forms: of the model.
    """
    data = load_data(source)
    config, model = small_model(data, freeze, **forms)
    frozen: dict[str, torch.Tensor | None] = {}
    if config.arithmetic == "integer":
        frozen |= model.frozen_integers()
    kept = {name: value for name, value in (frozen | (integers or {})).items() if value is not None}
    save_checkpoint(
        path,
        config,
        TrainingConfig(evaluation_length=32),
        DataDescription.of(data, source),
        results or {},
        model.state_dict(),
        kept,
    )
    return model
