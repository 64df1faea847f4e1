"""What the tensors of a float Mamba or Mamba-2 model hold on sample inputs; integer scales come from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_int.errors import MambaintError
from mamba_int.float_models.mamba import MambaMixer
from mamba_int.float_models.mamba2 import Mamba2Mixer
from mamba_int.float_models.models import (
    MambaBackbone,
    MambaForCausalLM,
    MambaForSequenceClassification,
    RMSNorm,
)
from mamba_int.float_models.scans import SELECTIVE_SCANS, STATE_SPACE_DUALITIES
from quantize.scales import FloatArray
from triton_kernels.activation import activate
from triton_kernels.causal_conv1d import causal_conv1d

if TYPE_CHECKING:
    from mamba_int.float_models.config import MambaConfig

SAMPLES = 1 << 16
"""About as many values of a tensor are kept, in whole rows, spread evenly over the batches."""
BATCH = 32
LEAST_DECAY = 2.0**-60
"""Less than this of a state is lost in a step only where nothing enters it either."""
Record = Callable[[str, Tensor], None]
FloatModel = MambaForSequenceClassification | MambaForCausalLM
Progress = Callable[[int, int], None]
"""Told how many of how many inputs were seen."""


@dataclass
class Observed:
    """What a tensor was seen to hold.

    Attributes:
        low, high: smallest and largest value.
        channels: largest magnitude of every entry of the last axis.
        samples: some of the rows along the last axis.
    """

    low: float
    high: float
    channels: FloatArray
    samples: list[FloatArray] = field(default_factory=list)

    @property
    def largest(self) -> float:
        """Largest magnitude."""
        return max(abs(self.low), abs(self.high))

    @property
    def sample(self) -> FloatArray:
        """The kept rows, [n, channels]."""
        return np.concatenate(self.samples)


Observations = dict[str, Observed]
"""By name of the tensor, as :func:`trace` names them."""


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


def mixers(model: FloatModel) -> Iterator[tuple[int, RMSNorm, MambaMixer | Mamba2Mixer]]:
    """Number, norm and mixer of every layer.

    Raises:
        MambaintError: for a mixer that conversion does not know.
    """
    for i, layer in enumerate(model.backbone.layers):
        norm, mixer = layer.norm, layer.mixer
        if not isinstance(mixer, MambaMixer | Mamba2Mixer) or not isinstance(norm, RMSNorm):
            raise MambaintError(
                f"layer {i} has the mixer '{model.config.mixer}', which has no integer form here",
                "give a model whose mixer is mamba or mamba2",
            )
        yield i, norm, mixer


def trace(model: FloatModel, inputs: Tensor, record: Record) -> Tensor:
    """The model's forward in eval mode, with every tensor that the integer graph has too.

    Args:
        model: the model.
        inputs: as in :func:`calibrate`.
        record: told name and value of every tensor, channels last.

    Returns:
        Logits, as the model gives them.
    """
    backbone: MambaBackbone = model.backbone
    c = model.config
    residual = backbone.embeddings(inputs)
    record("residual", residual)
    for i, norm, mixer in mixers(model):
        normed = _normed(record, f"layer{i}.norm", residual, norm.eps)
        x = normed * norm.weight
        if isinstance(mixer, Mamba2Mixer):
            out = _mix_mamba2(record, f"layer{i}", mixer, x)
        else:
            out = _mix_mamba(record, f"layer{i}", mixer, x)
        record(f"layer{i}.out", out)
        residual = residual + out
        record("residual", residual)
    if isinstance(model, MambaForSequenceClassification) and c.pooling == "last":
        residual = residual[:, -1]
    normed = _normed(record, "final_norm", residual, backbone.norm_f.eps)
    if isinstance(model, MambaForSequenceClassification):
        if c.pooling == "mean":
            normed = normed.mean(1)
        # The learned weight comes last here: means and powers of two pass through it.
        record("pooled", normed)
        logits: Tensor = model.classifier(normed * backbone.norm_f.weight)
    else:
        logits = model.logits(normed * backbone.norm_f.weight)
    record("logits", logits)
    return logits


def _normed(record: Record, name: str, x: Tensor, eps: float) -> Tensor:
    """x over its root mean square: the norm of arXiv 1910.07467 before its weight."""
    square = x.square().mean(-1, keepdim=True)
    record(f"{name}.source", x)
    record(f"{name}.square", square)
    normed = x * torch.rsqrt(square + eps)
    record(name, normed)
    return normed


def _mix_mamba2(record: Record, layer: str, mixer: Mamba2Mixer, x: Tensor) -> Tensor:
    def at(name: str, value: Tensor) -> Tensor:
        record(f"{layer}.{name}", value)
        return value

    c = mixer.config
    z, xBC, dt = mixer.in_proj(x).split([c.d_inner, mixer.conv_channels, c.n_heads], -1)
    at("z", z)
    convolved = causal_conv1d(xBC, mixer.conv1d.weight[:, 0], mixer.conv1d.bias, "identity")
    widths = [c.d_inner, c.d_state, c.d_state]
    for name, part in zip("xBC", xBC.split(widths, -1), strict=True):
        at(f"{name}_in", part)
    values, B, C = (
        at(name, activate(at(f"{name}_index", part), c.activation))
        for name, part in zip("xBC", convolved.split(widths, -1), strict=True)
    )
    step = F.softplus(at("step_index", dt + mixer.dt_bias))
    if c.dt_limit_low > 0 or c.dt_limit_high > 0:
        step = step.clamp(c.dt_limit_low, c.dt_limit_high or math.inf)
    rates = torch.exp(mixer.A_log)
    heads = values.unflatten(-1, (c.n_heads, c.headdim))
    at("scan_x", (heads * _gain(record, layer, step, rates)[..., None]).flatten(-2))
    at("G", (C @ B.mT).tril())
    scanned, _ = STATE_SPACE_DUALITIES[c.scan_type](heads, step, -rates, B[:, :, None], C[:, :, None])
    at("scanned", scanned.flatten(2))
    D = mixer.D.view(c.n_heads, -1)
    y = at("y", (scanned + D * heads).flatten(2))
    gated = y * at("gate", activate(z, c.gate_activation))
    normed = _normed(record, f"{layer}.gated_norm", gated, c.norm_epsilon)
    out: Tensor = mixer.out_proj(normed * mixer.norm.weight)
    return out


def _mix_mamba(record: Record, layer: str, mixer: MambaMixer, x: Tensor) -> Tensor:
    def at(name: str, value: Tensor) -> Tensor:
        record(f"{layer}.{name}", value)
        return value

    c = mixer.config
    u, z = mixer.in_proj(x).chunk(2, -1)
    weight = mixer.conv1d.weight[:, 0]
    index = at("x_index", causal_conv1d(at("x_in", u), weight, mixer.conv1d.bias, "identity"))
    values = at("x", activate(index, c.activation))
    parts = mixer.x_proj(values).split([c.rank, c.d_state, c.d_state], -1)
    dt, B, C = (at(name, part) for name, part in zip(("dt", "B", "C"), parts, strict=True))
    at("z", z)
    delta = F.linear(dt, mixer.dt_proj.weight)
    step = F.softplus(at("step_index", delta + mixer.dt_proj.bias))
    rates = torch.exp(mixer.A_log)
    for n in range(c.d_state):
        at(f"state{n}.scan_x", values * _gain(record, f"{layer}.state{n}", step, rates[:, n]))
    scanned, _ = SELECTIVE_SCANS[c.scan_type](
        values, delta, -rates, B, C, mixer.D, None, mixer.dt_proj.bias, True
    )
    gated = at("gated", at("y", scanned) * at("gate", activate(z, c.gate_activation)))
    out: Tensor = mixer.out_proj(gated)
    return out


def _gain(record: Record, name: str, step: Tensor, rates: Tensor) -> Tensor:
    """x' / x of h' = a h + (1 - a) B x' (see ``quantize.fits.DecayFit``); for small u it is 1 / rates."""
    u = step * rates
    record(f"{name}.decay_index", u.clamp(min=LEAST_DECAY).log())
    return torch.where(u > 1e-6, u / -torch.expm1(-u), 1.0) / rates
