"""Float checkpoints for the tests: runs as training writes them, and folders as other programs do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mamba_int.datasets import DataSource, TextData, load_data
from mamba_int.float_models.config import MambaConfig
from mamba_int.float_models.models import MambaForCausalLM, MambaForSequenceClassification
from mamba_int.training import DataDescription, TrainingConfig, save_checkpoint
from mamba_int.training.float_model import new_float_model

SMALL: dict[str, Any] = {"mixer": "mamba2", "d_model": 8, "n_layer": 1, "headdim": 8, "d_state": 4}


def write_float_run(path: Path, source: DataSource, **forms: Any) -> None:
    """The checkpoint of an untrained float model, as ``mambaint train`` writes one."""
    data = load_data(source)
    if isinstance(data, TextData):
        shape: dict[str, Any] = {"vocab_size": data.vocab_size}
    else:
        shape = {"n_features": data.n_features, "num_labels": data.n_classes, "pooling": "mean"}
    config = MambaConfig(**(SMALL | shape | forms))
    recipe = TrainingConfig(sequence_length=16, evaluation_length=32)
    state = new_float_model(config, data, 0).state_dict()
    save_checkpoint(path, config, recipe, DataDescription.of(data, source), {}, state, {})


def write_foreign(folder: Path, **forms: Any) -> MambaForCausalLM | MambaForSequenceClassification:
    """A model as ``save_pretrained`` writes it, which knows nothing of data; with features a classifier."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = MambaConfig(**(SMALL | forms))
        model = MambaForSequenceClassification(config) if config.n_features else MambaForCausalLM(config)
    model.eval().save_pretrained(folder)
    return model
