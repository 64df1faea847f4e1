"""What the tensors of a float Mamba or Mamba-2 model hold on sample inputs; integer scales come from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from mamba_int.errors import MambaintError
from mamba_int.float_models.bit_shift_norm import BitShiftNorm
from mamba_int.float_models.mixer import Mixer
from mamba_int.float_models.models import (
    MambaBackbone,
    MambaBlock,
    MambaForCausalLM,
    MambaForFeatureExtraction,
    MambaForSequenceClassification,
    ResidualLayerNorm,
    ResidualSum,
    RMSNorm,
)
from quantize.bit_shift_norm import record_bit_shift_norm
from quantize.blocks.entrance import Layer
from quantize.blocks.registry import block_conversion
from quantize.layer_norm import record_layer_norm
from quantize.observations import Moments, Observations, Observed, Record, record_norm

SAMPLES = 1 << 16
"""About as many values of a tensor are kept, in whole rows, spread evenly over the batches."""
BATCH_STEPS = 1 << 11
"""About as many steps are run at a time: what they take is memory for the logits of a large vocabulary."""
FloatModel = MambaForSequenceClassification | MambaForCausalLM | MambaForFeatureExtraction
Convertible = FloatModel | Mixer
"""A whole model, or a mixer alone."""
Progress = Callable[[int, int], None]
"""Told how much of how much is done: inputs that were seen, layers that were built."""


def calibrate(
    model: Convertible, inputs: Tensor, progress: Progress | None = None, moments: bool = False
) -> Observations:
    """Run sample inputs and note what every tensor holds.

    Args:
        model: the float model, in eval mode or not: there is no dropout here.
        inputs: token ids int64 [n, T], or reals [n, T, n_features]: as they come in use.
        progress: told after every batch.
        moments: also sum up products of the channels that matrices read, as reconstruction needs them.

    Raises:
        MambaintError: if the inputs do not fit the model, or its values are not finite on them.
    """
    check_calibration(model, inputs)
    observations: Observations = {}
    batch = max(1, BATCH_STEPS // inputs.shape[1])
    batches = -(-len(inputs) // batch)
    read = _matrix_inputs(model) if moments else frozenset()

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
        if name in read:
            found = Moments.of(values)
            seen.moments = found if seen.moments is None else seen.moments + found
        kept = max(1, SAMPLES // batches // values.shape[1])
        # A copy: a view would keep all of the batch.
        seen.samples.append(values[:: -(-len(values) // kept)].copy())

    device = next(model.parameters()).device
    with torch.no_grad():
        for start in range(0, len(inputs), batch):
            trace(model, inputs[start : start + batch].to(device), record)
            if progress is not None:
                progress(min(start + batch, len(inputs)), len(inputs))
    return observations


def _matrix_inputs(model: Convertible) -> frozenset[str]:
    """Names of the tensors that matrices read."""
    inputs = block_conversion(model.config.mixer).matrix_inputs
    return frozenset(f"{layer}.{name}" for layer, _ in named_layers(model) for name in inputs) | {
        "final_norm"
    }


def input_features(model: Convertible) -> int:
    """Numbers of a step that the model reads; 0 for token ids."""
    return model.config.d_model if isinstance(model, Mixer) else model.config.n_features


def check_calibration(model: Convertible, inputs: Tensor) -> None:
    """Refuse inputs that do not fit the model.

    Raises:
        MambaintError: naming what does not fit.
    """
    if len(inputs) == 0:
        raise MambaintError("there is no calibration data", "give at least one input")
    features, vocabulary = input_features(model), model.config.vocab_size
    if features:
        if inputs.ndim != 3 or inputs.shape[-1] != features:
            raise MambaintError(
                f"calibration inputs have shape {tuple(inputs.shape)}",
                f"give them as [n, T, {features}]",
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
    if low < 0 or high >= vocabulary:
        raise MambaintError(
            f"calibration token {low if low < 0 else high} is outside the vocabulary of {vocabulary}",
            "use the tokenizer of the model",
        )


def named_layers(model: Convertible) -> Iterator[tuple[str, Layer]]:
    """Name in the graph, norm and mixer of every layer; of a mixer alone itself."""
    if isinstance(model, Mixer):
        yield "layer0", Layer(None, model)
        return
    for i, layer in enumerate(model.backbone.layers):
        assert isinstance(layer, MambaBlock)
        norm = layer.norm
        assert isinstance(norm, RMSNorm | BitShiftNorm | ResidualSum) and isinstance(layer.mixer, Mixer)
        yield f"layer{i}", Layer(norm, layer.mixer)


def trace(model: Convertible, inputs: Tensor, record: Record) -> Tensor:
    """The model's forward in eval mode, with every tensor that the integer graph has too.

    Args:
        model: the model.
        inputs: as in :func:`calibrate`.
        record: told name and value of every tensor.

    Returns:
        Logits, hidden states of all steps, or what the mixer gives, as the model gives them.
    """
    c = model.config
    block = block_conversion(c.mixer)
    if isinstance(model, Mixer):
        record("residual", inputs)
        ((name, layer),) = named_layers(model)
        return block.trace(record, name, layer, inputs)
    backbone: MambaBackbone = model.backbone
    residual = backbone.embeddings(inputs)
    record("residual", residual)
    for name, layer in named_layers(model):
        out = block.trace(record, name, layer, residual)
        record(f"{name}.out", out)
        residual = residual + out
        record("residual", residual)
    if isinstance(model, MambaForSequenceClassification) and c.pooling == "last":
        residual = residual[:, -1]
    norm = backbone.norm_f
    weight: Tensor
    bias: Tensor | float = 0.0
    if isinstance(norm, BitShiftNorm):
        normed = record_bit_shift_norm(record, "final_norm", residual, norm)
        weight = norm.weight * norm.step_size
    elif isinstance(norm, ResidualLayerNorm):
        normed, weight, bias = record_layer_norm(record, "final_norm", residual, norm), norm.weight, norm.bias
    else:
        assert isinstance(norm, RMSNorm)
        normed, weight = record_norm(record, "final_norm", residual, norm.eps), norm.weight
    if isinstance(model, MambaForFeatureExtraction):
        hidden = normed * weight + bias
        record("hidden", hidden)
        return hidden
    if isinstance(model, MambaForSequenceClassification):
        # The learned weight and bias come last here: means and powers of two pass through them, and a maximum
        # if the weight is positive.
        if c.pooling == "mean":
            normed = normed.mean(1)
        elif c.pooling == "max":
            normed, weight = (normed * weight.sign()).amax(1), weight.abs()
        record("pooled", normed)
        logits: Tensor = model.classifier(normed * weight + bias)
    else:
        logits = model.logits(normed * weight + bias)
    record("logits", logits)
    return logits
