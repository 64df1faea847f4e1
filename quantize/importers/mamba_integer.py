"""Mamba-Integer, both versions: ternary matrices, a norm by powers of two, decays of 15 bits or heads.

What is read is a ``state_dict``, bare or as training keeps it (``model_state_dict``); sizes come from the
tensors alone. The matrices are latent floats, here as there: they become ternary when the model runs, with
the scale mean |W|. Its program computes the square roots of its activation by Newton steps that diverge
between their starting points; the model here has the activation as it is meant, (x + sqrt(x^2 + 4)) / 2.
"""

from __future__ import annotations

import torch
from torch import nn

from mamba_int.errors import MambaintError
from mamba_int.float_models.config import MambaConfig
from mamba_int.float_models.mamba_integer import DECAY_BITS
from quantize.importers.plan import Plan, count_layers, expansion
from quantize.importers.source import SourceCheckpoint

_SEEN_LAST = (".last_k", ".last_act_max")
"""What older programs noted for their monitor."""
_NORM_RANGES = {"V1": (-3, 8), "V2": (-2, 6)}
"""The shifts of each version's norm."""


class MambaInteger:
    """Checkpoints of Mamba-Integer: ``layers.i.norm.gamma``, and ``base_decay_nums`` (V1) or ``A_log``."""

    name = "mamba-integer"
    title = "Mamba-Integer"

    def recognises(self, source: SourceCheckpoint) -> bool:
        return {"norm_f.gamma", "layers.0.norm.gamma", "layers.0.x_proj.weight"} <= set(source.keys)

    def plan(self, source: SourceCheckpoint) -> Plan:
        keys = set(source.keys)
        first = "layers.0."
        version = "V1" if f"{first}base_decay_nums" in keys else "V2"
        vocab_size, d_model = source.shape("embedding.weight", 2)
        d_inner, _, d_conv = source.shape(f"{first}conv1d.weight", 3)
        n_layer = count_layers(source, "layers.")
        rank, heads = 0, 1
        if version == "V1":
            d_state = source.shape(f"{first}base_decay_nums", 2)[1]
            rank = source.shape(f"{first}dt_proj.weight", 2)[1]
        else:
            (heads,) = source.shape(f"{first}A_log", 1)
            d_state = _state_of_heads(source, f"{first}x_proj.weight", heads, d_inner)
        buffers = {key for key in keys if key.endswith(_SEEN_LAST)}
        least, most = _NORM_RANGES[version]
        steps = [f"{norm}.step_size" for norm in _norms(n_layer)]
        stepless = not any(_key(step) in keys for step in steps)
        notes = [
            f"version {version[1]}; matrices become ternary when the model runs",
            "squareplus is computed as it is meant; the Newton steps of the source diverge in places",
        ]
        if version == "V2":
            notes.append("its norms divide by 2^-2 to 2^6, less than those of version 1")
        if stepless or buffers:
            notes.append(
                "an older file: it is computed as the newest program would; programs before had other norms, "
                "activations, gates and steps, which a file does not tell"
            )
        if stepless:
            notes.append("no step_size: 1")
        if version == "V1":
            for i in range(n_layer):
                buffers.add(_decay_shifts(source, f"layers.{i}.decay_shifts", (d_inner, d_state)))
        config = MambaConfig(
            mixer=f"mamba_integer_{version.lower()}",
            vocab_size=vocab_size,
            pad_vocab_size_multiple=1,
            d_model=d_model,
            n_layer=n_layer,
            expand=expansion(d_inner, d_model),
            d_state=d_state,
            d_conv=d_conv,
            dt_rank=rank,
            headdim=d_inner // heads if version == "V2" else 1,
            activation="squareplus",
            gate_activation="algebraic_sigmoid",
            norm="bit_shift",
            norm_min_shift=least,
            norm_max_shift=most,
            head="bit_linear",
            scale_logits=True,
            tie_embeddings=False,
        )
        return Plan(
            "MambaForCausalLM",
            config,
            _key,
            constants=dict.fromkeys(steps, nn.init.ones_) if stepless else {},
            buffers=frozenset(buffers),
            notes=tuple(notes),
        )


def _norms(n_layer: int) -> list[str]:
    return [*(f"backbone.layers.{i}.norm" for i in range(n_layer)), "backbone.norm_f"]


def _key(name: str) -> str:
    if name == "backbone.embeddings.weight":
        return "embedding.weight"
    name = name.removeprefix("backbone.").replace(".mixer.", ".")
    if name.endswith((".norm.weight", "norm_f.weight")):
        return name.removesuffix("weight") + "gamma"
    return name


def _state_of_heads(source: SourceCheckpoint, key: str, heads: int, d_inner: int) -> int:
    """N of x_proj [heads (1 + 2N), d_inner]."""
    rows = source.shape(key, 2)[0]
    each, rest = divmod(rows, max(heads, 1))
    if heads < 1 or rest or each < 3 or each % 2 == 0 or d_inner % heads:
        raise MambaintError(
            f"{source.path}: {key} has {rows} rows, which {heads} heads of dt, B and C cannot share",
            "give a complete checkpoint, or another --format",
        )
    return (each - 1) // 2


def _decay_shifts(source: SourceCheckpoint, key: str, shape: tuple[int, ...]) -> str:
    """Check that all decays are of 15 bits, the only shift that the scan of the source ever has."""
    if source.shape(key, 2) != shape:
        raise MambaintError(
            f"{source.path} has of another shape {key} {list(source.shape(key))} instead of {list(shape)}",
            "give a complete checkpoint",
        )
    values = source.read_buffer(key)
    if values.is_complex() or not bool((values.to(torch.float64) == DECAY_BITS).all()):
        raise MambaintError(
            f"{source.path}: {key} has shifts other than {DECAY_BITS}",
            f"give a checkpoint whose decays are numbers over 2^{DECAY_BITS}",
        )
    return key
