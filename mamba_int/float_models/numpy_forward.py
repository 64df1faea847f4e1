"""The forward pass of the float models in NumPy alone, for places without PyTorch.

It computes the models themselves, step by step, from the folder that ``save_pretrained`` wrote: the same
logits within float error. It needs NumPy and safetensors, nothing else, and handles no padding and no cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mamba_int.errors import MambaintError
from mamba_int.float_models.checkpoint import SafetensorsReader, read_config
from mamba_int.float_models.config import MambaConfig

Array = NDArray[Any]
Parameters = Mapping[str, Array]


def _sigmoid(x: Array) -> Array:
    # e^-|x| cannot overflow.
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1 / (1 + e), e / (1 + e))


def _erf(x: Array) -> Array:
    y: Array = np.vectorize(math.erf, otypes=[x.dtype])(x)
    return y


def _squareplus(x: Array) -> Array:
    x = np.clip(x, -50, 50)
    root = np.sqrt(x * x + 4)
    y: Array = np.where(x >= 0, (x + root) / 2, 2 / (root + np.abs(x)))
    return y


_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": lambda x: x * _sigmoid(x),
    "gelu": lambda x: 0.5 * x * (1 + _erf(x / math.sqrt(2))),
    "relu": lambda x: np.maximum(x, 0),
    "identity": lambda x: x,
    "squareplus": _squareplus,
    "algebraic_sigmoid": lambda x: 0.5 + 0.5 * x / (1 + np.abs(x)),
}


def _softplus(x: Array) -> Array:
    return np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))


def _normed(x: Array, eps: float) -> Array:
    y: Array = x / np.sqrt(np.mean(np.square(x), -1, keepdims=True) + eps)
    return y


def _bit_shift_normed(config: MambaConfig, x: Array) -> Array:
    """``mamba_int.float_models.bit_shift_norm``."""
    centred = x - np.mean(x, -1, keepdims=True)
    _, exponent = np.frexp(np.mean(np.square(centred), -1, keepdims=True))
    shift = np.clip((exponent - 1) // 2, config.norm_min_shift, config.norm_max_shift)
    y: Array = np.ldexp(centred, -shift)
    return y


def _normed_residual(config: MambaConfig, parameters: Parameters, name: str, x: Array) -> Array:
    """The norm before a block or at the end."""
    weight = parameters[f"{name}.weight"]
    if config.norm == "bit_shift":
        weight = weight * parameters[f"{name}.step_size"]
        y = _bit_shift_normed(config, x)
    else:
        y = _normed(x, config.norm_epsilon)
    return y * weight


def _bit_linear(weight: Array, x: Array) -> Array:
    """``mamba_int.float_models.bit_linear``."""
    scale = np.maximum(np.mean(np.abs(weight)), 1e-6)
    largest = np.maximum(np.max(np.abs(x), -1, keepdims=True), 1e-8)
    integers = np.round(127 * x / largest) @ np.clip(np.round(weight / scale), -1, 1).T
    y: Array = integers * (scale * largest / 127)
    return y


def _linear(parameters: Parameters, name: str, x: Array) -> Array:
    y: Array = x @ parameters[f"{name}.weight"].T
    return y + parameters[f"{name}.bias"] if f"{name}.bias" in parameters else y


def _convolved(config: MambaConfig, parameters: Parameters, name: str, x: Array) -> Array:
    """The causal depthwise convolution and its activation."""
    taps = parameters[f"{name}.weight"][:, 0]
    width = taps.shape[1]
    padded = np.concatenate([np.zeros_like(x[:, :1]).repeat(width - 1, 1), x], 1)
    y = sum((padded[:, i : i + x.shape[1]] * taps[:, i] for i in range(width)), np.zeros_like(x))
    if f"{name}.bias" in parameters:
        y = y + parameters[f"{name}.bias"]
    return _ACTIVATIONS[config.activation](y)


def _mamba(config: MambaConfig, parameters: Parameters, at: str, x: Array) -> Array:
    """``mamba_int.float_models.mamba``."""
    c = config
    u, z = np.split(_linear(parameters, f"{at}.in_proj", x), 2, -1)
    u = _convolved(c, parameters, f"{at}.conv1d", u)
    dt, B, C = np.split(_linear(parameters, f"{at}.x_proj", u), [c.rank, c.rank + c.d_state], -1)
    if c.BCdt_norm:
        dt, B, C = (_normed(v, c.BCdt_norm_epsilon) for v in (dt, B, C))
    step = _softplus(_linear(parameters, f"{at}.dt_proj", dt))
    A = -np.exp(parameters[f"{at}.A_log"])
    h = np.zeros((len(x), c.d_inner, c.d_state), x.dtype)
    y = np.empty_like(u)
    for t in range(x.shape[1]):
        update = (step[:, t] * u[:, t])[..., None] * B[:, t, None]
        h = np.exp(step[:, t, :, None] * A) * h + update
        y[:, t] = np.einsum("bdn,bn->bd", h, C[:, t])
    y = (y + parameters[f"{at}.D"] * u) * _ACTIVATIONS[c.gate_activation](z)
    return _linear(parameters, f"{at}.out_proj", y)


def _mamba2(config: MambaConfig, parameters: Parameters, at: str, x: Array) -> Array:
    """``mamba_int.float_models.mamba2``."""
    c = config
    shared = c.n_groups * c.d_state
    ends = [c.d_inner, 2 * c.d_inner + 2 * shared]
    z, xBC, dt = np.split(_linear(parameters, f"{at}.in_proj", x), ends, -1)
    xBC = _convolved(c, parameters, f"{at}.conv1d", xBC)
    u, B, C = np.split(xBC, [c.d_inner, c.d_inner + shared], -1)
    batch, length = x.shape[:2]
    u = u.reshape(batch, length, c.n_heads, c.headdim)
    each = c.n_heads // c.n_groups
    B, C = (v.reshape(batch, length, c.n_groups, c.d_state).repeat(each, 2) for v in (B, C))
    step = _softplus(dt + parameters[f"{at}.dt_bias"])
    if c.dt_limit_low > 0 or c.dt_limit_high > 0:
        step = np.clip(step, c.dt_limit_low, c.dt_limit_high or math.inf)
    decay = np.exp(step * -np.exp(parameters[f"{at}.A_log"]))
    h = np.zeros((batch, c.n_heads, c.headdim, c.d_state), x.dtype)
    y = np.empty_like(u)
    for t in range(length):
        update = (step[:, t, :, None] * u[:, t])[..., None] * B[:, t, :, None]
        h = decay[:, t, :, None, None] * h + update
        y[:, t] = np.einsum("bhpn,bhn->bhp", h, C[:, t])
    D = parameters[f"{at}.D"]
    y = y + (D.reshape(c.n_heads, c.headdim) if c.D_has_hdim else D[:, None]) * u
    gated = y.reshape(z.shape) * _ACTIVATIONS[c.gate_activation](z)
    groups = c.n_groups if c.norm_per_group else 1
    gated = _normed(gated.reshape(batch, length, groups, -1), c.norm_epsilon).reshape(z.shape)
    return _linear(parameters, f"{at}.out_proj", gated * parameters[f"{at}.norm.weight"])


def _complex_mamba(config: MambaConfig, parameters: Parameters, at: str, x: Array) -> Array:
    """``mamba_int.float_models.complex_mamba``."""
    c = config
    u, z = np.split(_linear(parameters, f"{at}.in_proj", x), 2, -1)
    u = _convolved(c, parameters, f"{at}.conv1d", u)
    ends = [1, 1 + c.d_state, 1 + c.d_state + c.d_inner]
    step, modulation, b, c_t = np.split(_linear(parameters, f"{at}.s_proj", u), ends, -1)
    rates = -np.exp(parameters[f"{at}.A_log"]) + 1j * parameters[f"{at}.A_imag"]
    held = np.exp(_softplus(step) * rates)
    decay = held * _sigmoid(modulation)
    B, C = (parameters[f"{at}.{name}"] @ np.array([1, 1j], rates.dtype) for name in ("B", "C"))
    h = np.zeros((len(x), c.d_inner, c.d_state), rates.dtype)
    y = np.empty_like(u)
    for t in range(x.shape[1]):
        gain = ((held[:, t] - 1) / rates)[:, None] * B + b[:, t, :, None]
        h = decay[:, t, None] * h + gain * u[:, t, :, None]
        y[:, t] = ((C + c_t[:, t, :, None]) * h).real.sum(-1)
    y = (y + parameters[f"{at}.D"] * u) * _ACTIVATIONS[c.gate_activation](z)
    return _linear(parameters, f"{at}.out_proj", y)


def _mamba_integer(config: MambaConfig, parameters: Parameters, at: str, x: Array) -> Array:
    """``mamba_int.float_models.mamba_integer``, either version."""
    c = config
    u, z = np.split(_bit_linear(parameters[f"{at}.in_proj.weight"], x), 2, -1)
    u = _convolved(c, parameters, f"{at}.conv1d", u)
    projected = _bit_linear(parameters[f"{at}.x_proj.weight"], u)
    scan = _mamba_integer_v1_scan if c.mixer == "mamba_integer_v1" else _mamba_integer_v2_scan
    y = scan(c, parameters, at, u, projected) * _ACTIVATIONS[c.gate_activation](z)
    return _bit_linear(parameters[f"{at}.out_proj.weight"], y) * parameters[f"{at}.res_gate"]


def _mamba_integer_v1_scan(
    config: MambaConfig, parameters: Parameters, at: str, u: Array, projected: Array
) -> Array:
    c = config
    r, B, C = np.split(projected, [c.rank, c.rank + c.d_state], -1)
    m = np.clip(_bit_linear(parameters[f"{at}.dt_proj.weight"], r), -20, 20)
    values = u * np.clip(0.01 * _squareplus(m), 0.001, 0.1)
    h = np.zeros((len(u), c.d_inner, c.d_state), u.dtype)
    y = np.empty_like(u)
    for t in range(u.shape[1]):
        decay = np.clip(parameters[f"{at}.base_decay_nums"] + m[:, t, :, None], 0, 32000) / 2**15
        h = decay * h + (1 - decay) * values[:, t, :, None] * B[:, t, None]
        y[:, t] = np.einsum("bdn,bn->bd", h, C[:, t])
    return y


def _mamba_integer_v2_scan(
    config: MambaConfig, parameters: Parameters, at: str, u: Array, projected: Array
) -> Array:
    c = config
    batch, length = u.shape[:2]
    heads = projected.reshape(batch, length, c.n_heads, 1 + 2 * c.d_state)
    dt, B, C = np.split(heads, [1, 1 + c.d_state], -1)
    B, C = (v / (np.linalg.norm(v, axis=-1, keepdims=True) + 1e-6) for v in (B, C))
    step = np.clip(_softplus(np.clip(dt[..., 0], -10, 10)), 0.01, 10)
    decay = np.exp(np.clip(np.clip(parameters[f"{at}.A_log"], -2.3, -0.01) * step, -20, -0.001))
    values = u.reshape(batch, length, c.n_heads, c.headdim)
    h = np.zeros((batch, c.n_heads, c.headdim, c.d_state), u.dtype)
    y = np.empty_like(values)
    for t in range(length):
        h = decay[:, t, :, None, None] * h + values[:, t, ..., None] * B[:, t, :, None]
        y[:, t] = np.einsum("bhpn,bhn->bhp", h, C[:, t])
    return y.reshape(u.shape)


_MIXERS = {
    "mamba": _mamba,
    "mamba2": _mamba2,
    "complex_mamba": _complex_mamba,
    "mamba_integer_v1": _mamba_integer,
    "mamba_integer_v2": _mamba_integer,
}


class NumpyMamba:
    """A float model on NumPy arrays.

    Args:
        config: of the model.
        parameters: arrays by the names of the PyTorch model's parameters. Sums have their dtype.
        architecture: what stands on the backbone.

    Raises:
        MambaintError: for a mixer that NumPy has no form of, or a missing parameter.
    """

    def __init__(
        self, config: MambaConfig, parameters: Parameters, architecture: str = "MambaForCausalLM"
    ) -> None:
        if config.mixer not in _MIXERS:
            raise MambaintError(
                f"the mixer '{config.mixer}' has no NumPy form", f"choose one of {', '.join(_MIXERS)}"
            )
        self.config, self.architecture = config, architecture
        self._parameters = {name: np.asarray(parameters[name]) for name in parameters}

    @classmethod
    def from_pretrained(cls, folder: Path) -> NumpyMamba:
        """Read a folder that ``save_pretrained`` wrote, weights in float32 or float64."""
        architecture, config = read_config(folder)
        reader = SafetensorsReader(folder, "np")
        return cls(config, {name: reader[name] for name in reader}, architecture)

    def hidden(self, inputs: Array) -> Array:
        """Hidden states [batch, T, d_model] of token ids [batch, T], or of reals [batch, T, n_features]."""
        c, p = self.config, self._parameters
        try:
            if c.n_features:
                residual = _linear(p, "backbone.embeddings", inputs)
            else:
                residual = p["backbone.embeddings.weight"][inputs]
            for i in range(c.n_layer):
                at = f"backbone.layers.{i}"
                x = _normed_residual(c, p, f"{at}.norm", residual)
                residual = residual + _MIXERS[c.mixer](c, p, f"{at}.mixer", x)
            return _normed_residual(c, p, "backbone.norm_f", residual)
        except KeyError as error:
            raise MambaintError(
                f"the parameter {error} is missing", "give the weights of this configuration"
            ) from error

    def __call__(self, inputs: Array) -> Array:
        """Logits [batch, T, vocab_size] or [batch, num_labels], or pooled features [batch, d_model]."""
        c, p = self.config, self._parameters
        hidden = self.hidden(inputs)
        if self.architecture == "MambaForCausalLM":
            head = p["backbone.embeddings.weight"] if c.tie_embeddings else p["lm_head.weight"]
            logits = _bit_linear(head, hidden) if c.head == "bit_linear" else hidden @ head.T
            logits = logits[..., : c.vocab_size]
            return logits / math.sqrt(c.d_model) if c.scale_logits else logits
        if c.pooling == "last":
            pooled = hidden[:, -1]
        else:
            pooled = hidden.mean(1) if c.pooling == "mean" else hidden.max(1)
        if self.architecture == "MambaForSequenceClassification":
            return _linear(p, "classifier", pooled)
        return pooled
