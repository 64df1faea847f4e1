"""What the tensors of a float Mamba or Mamba-2 model hold on sample inputs; integer scales come from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from mamba_int.errors import MambaintError
from mamba_int.float_models.models import (
    MambaBackbone,
    MambaBlock,
    MambaForCausalLM,
    MambaForSequenceClassification,
)
from quantize.blocks.registry import block_conversion
from quantize.observations import Observations, Observed, Record, record_norm

if TYPE_CHECKING:
    from mamba_int.float_models.config import MambaConfig

SAMPLES = 1 << 16
"""About as many values of a tensor are kept, in whole rows, spread evenly over the batches."""
BATCH = 32
FloatModel = MambaForSequenceClassification | MambaForCausalLM
Progress = Callable[[int, int], None]
"""Told how many of how many inputs were seen."""


def calibrate(model: FloatModel, inputs: Tensor, progress: Progress | None = None) -> Observations:
    """Run sample inputs and note what every tensor holds.

    Args:
        model: the float model, in eval mode or not: there is no dropout here.
        inputs: token ids int64 [n, T], or reals [n, T, n_features]: as they come in use.
        progress: told after every batch.

    Raises:
        MambaintError: if the inputs do not fit the model, or its values are not finite on them.
    """
    check_calibration(model.config, inputs)
    observations: Observations = {}
    batches = -(-len(inputs) // BATCH)

    def record(name: str, value: Tensor) -> None:
        values = value.detach().double().cpu().reshape(-1, value.shape[-1]).numpy()
        if not np.isfinite(values).all():
            raise MambaintError(
                f"'{name}' of the float model is not finite on the calibration data",
                "give a model that computes finite numbers on such inputs",
            )
        low, high, channels = float(values.min()), float(values.max()), np.abs(values).max(0)
        seen = observations.setdefault(name, Observed(low, high, channels))
        seen.low, seen.high = min(seen.low, low), max(seen.high, high)
        seen.channels = np.maximum(seen.channels, channels)
        kept = max(1, SAMPLES // batches // values.shape[1])
        seen.samples.append(values[:: -(-len(values) // kept)])

    device = next(model.parameters()).device
    with torch.no_grad():
        for start in range(0, len(inputs), BATCH):
            trace(model, inputs[start : start + BATCH].to(device), record)
            if progress is not None:
                progress(min(start + BATCH, len(inputs)), len(inputs))
    return observations


def check_calibration(config: MambaConfig, inputs: Tensor) -> None:
    """Refuse inputs that do not fit the model.

    Raises:
        MambaintError: naming what does not fit.
    """
    if len(inputs) == 0:
        raise MambaintError("there is no calibration data", "give at least one input")
    if config.n_features:
        if inputs.ndim != 3 or inputs.shape[-1] != config.n_features:
            raise MambaintError(
                f"calibration inputs have shape {tuple(inputs.shape)}",
                f"give them as [n, T, {config.n_features}]",
            )
        if not bool(inputs.isfinite().all()):
            raise MambaintError("calibration inputs are not finite", "remove NaN and infinite values")
        return
    if inputs.ndim != 2 or inputs.dtype.is_floating_point:
        raise MambaintError(
            f"calibration inputs are {inputs.dtype} of shape {tuple(inputs.shape)}",
            "give token ids as int64 [n, T]",
        )
    low, high = int(inputs.min()), int(inputs.max())
    if low < 0 or high >= config.vocab_size:
        raise MambaintError(
            f"calibration token {low if low < 0 else high} is outside the vocabulary of {config.vocab_size}",
            "use the tokenizer of the model",
        )


def named_layers(model: FloatModel) -> Iterator[tuple[str, MambaBlock]]:
    """Name in the graph and block of every layer."""
    for i, layer in enumerate(model.backbone.layers):
        assert isinstance(layer, MambaBlock)
        yield f"layer{i}", layer


def trace(model: FloatModel, inputs: Tensor, record: Record) -> Tensor:
    """The model's forward in eval mode, with every tensor that the integer graph has too.

    Args:
        model: the model.
        inputs: as in :func:`calibrate`.
        record: told name and value of every tensor.

    Returns:
        Logits, as the model gives them.
    """
    backbone: MambaBackbone = model.backbone
    c = model.config
    residual = backbone.embeddings(inputs)
    record("residual", residual)
    block = block_conversion(c.mixer)
    for name, layer in named_layers(model):
        out = block.trace(record, name, layer, residual)
        record(f"{name}.out", out)
        residual = residual + out
        record("residual", residual)
    if isinstance(model, MambaForSequenceClassification) and c.pooling == "last":
        residual = residual[:, -1]
    normed = record_norm(record, "final_norm", residual, backbone.norm_f.eps)
    if isinstance(model, MambaForSequenceClassification):
        weight = backbone.norm_f.weight
        # The learned weight comes last here: means and powers of two pass through it, and a maximum if it is
        # positive.
        if c.pooling == "mean":
            normed = normed.mean(1)
        elif c.pooling == "max":
            normed, weight = (normed * weight.sign()).amax(1), weight.abs()
        record("pooled", normed)
        logits: Tensor = model.classifier(normed * weight)
    else:
        logits = model.logits(normed * backbone.norm_f.weight)
    record("logits", logits)
    return logits
