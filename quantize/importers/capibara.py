"""Capibara's Mamba module: the arrays of one mixer, as attributes or as Flax parameters.

The module has no embedding, norm or residual: what comes out is a mixer, [batch, T, d_model] to the same. As
attributes ``in_proj_weight``, ``conv1d_weight``, ... it has PyTorch's layout and no step bias; as Flax
parameters ``in_proj/kernel``, ``conv_weight``, ... kernels are transposed. Its first version leaves the
convolution out and fails otherwise; the arrays are read as the model they were made for.
"""

from __future__ import annotations

from torch import nn

from mamba_int.errors import MambaintError
from mamba_int.float_models.config import Activation, MambaConfig
from quantize.importers.plan import TRANSPOSED, Plan, expansion
from quantize.importers.source import SourceCheckpoint

_ATTRIBUTES = {
    "in_proj.weight": "in_proj_weight",
    "in_proj.bias": "in_proj_bias",
    "conv1d.weight": "conv1d_weight",
    "conv1d.bias": "conv1d_bias",
    "x_proj.weight": "x_proj_weight",
    "dt_proj.weight": "dt_proj_weight",
    "dt_proj.bias": "dt_proj_bias",
    "A_log": "A_log",
    "D": "D",
    "out_proj.weight": "out_proj_weight",
    "out_proj.bias": "out_proj_bias",
}
_FLAX = {
    "in_proj.weight": "in_proj/kernel",
    "in_proj.bias": "in_proj/bias",
    "conv1d.weight": "conv_weight",
    "conv1d.bias": "conv_bias",
    "x_proj.weight": "x_proj/kernel",
    "dt_proj.weight": "dt_proj/kernel",
    "dt_proj.bias": "dt_proj/bias",
    "A_log": "A_log",
    "D": "D",
    "out_proj.weight": "out_proj/kernel",
    "out_proj.bias": "out_proj/bias",
}
_KERNELS = ("in_proj.weight", "conv1d.weight", "x_proj.weight", "dt_proj.weight", "out_proj.weight")
_ACTIVATIONS: dict[str, Activation] = {"swish": "silu", "relu": "relu"}


class Capibara:
    """``MambaModule`` of capibaraGPT and its Flax version."""

    name = "capibara"
    title = "Capibara Mamba module"

    def recognises(self, source: SourceCheckpoint) -> bool:
        flat = {"in_proj_weight", "x_proj_weight"} <= set(source.keys)
        return flat or any(key.replace(".", "/").endswith("in_proj/kernel") for key in source.keys)

    def plan(self, source: SourceCheckpoint) -> Plan:
        settings = source.settings
        keys = set(source.keys)
        flax = "in_proj_weight" not in keys
        names = _flax_names(source) if flax else _ATTRIBUTES
        order = -1 if flax else 1
        d_inner, d_state = source.shape(names["A_log"], 2)
        out = source.shape(names["out_proj.weight"], 2)
        taps = source.shape(names["conv1d.weight"], 3)
        config = MambaConfig(
            mixer="mamba",
            d_model=out[::order][0],
            n_layer=1,
            expand=expansion(d_inner, out[::order][0]),
            d_state=d_state,
            d_conv=taps[::order][2],
            dt_rank=source.shape(names["dt_proj.weight"], 2)[::order][1],
            activation=_activation(source),
            conv_bias=names["conv1d.bias"] in keys,
            bias=names["in_proj.bias"] in keys,
        )
        biased = names["dt_proj.bias"] in keys
        notes = ["a mixer alone: the module has no embedding, norm or residual"]
        if not settings.present:
            notes.append(f"no {settings.source}: activation swish")
        return Plan(
            "Mixer",
            config,
            names.__getitem__,
            forms=dict.fromkeys(_KERNELS, TRANSPOSED) if flax else {},
            constants={} if biased else {"dt_proj.bias": nn.init.zeros_},
            notes=tuple(notes),
        )


def _flax_names(source: SourceCheckpoint) -> dict[str, str]:
    found = [key for key in source.keys if key.replace(".", "/").endswith("in_proj/kernel")]
    if len(found) != 1:
        raise MambaintError(
            f"{source.path} holds {len(found)} modules ({', '.join(found[:4])})", "save one module a file"
        )
    prefix = found[0][: -len("in_proj/kernel")]
    separator = found[0][-len("/kernel")]
    return {name: prefix + key.replace("/", separator) for name, key in _FLAX.items()}


def _activation(source: SourceCheckpoint) -> Activation:
    name = source.settings.text("activation", "swish")
    if name not in _ACTIVATIONS:
        # Its gelu is the tanh approximation, which is another function than ours.
        raise MambaintError(
            f"{source.settings.source} has activation = {name!r}", f"known are {', '.join(_ACTIVATIONS)}"
        )
    return _ACTIVATIONS[name]
