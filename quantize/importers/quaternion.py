"""Quaternion Mamba-2 of its source (mambaqc): the main model and its lite form, full-rank B and C.

A file is what its training script saves, without a configuration: sizes come from the tensors. Two things
are ours: the source's columns of ``out_proj`` are (channel, component) and become (component, channel); of
the gate z, which has 2 d_model channels where d_model are multiplied, the first d_model count, as in its
lite form. (Its main form cannot run: those shapes do not fit.)
"""

from __future__ import annotations

from torch import Tensor

from mamba_int.errors import MambaintError
from mamba_int.float_models.config import MambaConfig
from quantize.importers.plan import Form, Plan, expansion
from quantize.importers.source import SourceCheckpoint

_GLOBAL = {
    "backbone.embeddings.weight": "embedding.weight",
    "backbone.norm_f.weight": "norm_f.weight",
    "backbone.norm_f.bias": "norm_f.bias",
    "lm_head.weight": "lm_head.weight",
}


def _components_first(weight: Tensor) -> Tensor:
    """Columns (channel, component) as (component, channel)."""
    return weight.view(len(weight), -1, 4).transpose(1, 2).flatten(1)


COMPONENTS_FIRST = Form(lambda shape: shape, _components_first)


class Quaternion:
    """``QuaternionMamba2`` and ``QuaternionMamba2Lite`` of mambaqc."""

    name = "quaternion"
    title = "Quaternion Mamba-2"

    def recognises(self, source: SourceCheckpoint) -> bool:
        return {"layers.0.Lambda_alpha", "layers.0.B_proj.weight", "embedding.weight"} <= set(source.keys)

    def plan(self, source: SourceCheckpoint) -> Plan:
        settings = source.settings
        d_inner, d_state = source.shape("layers.0.Lambda_alpha", 2)
        rows, d_model = source.shape("embedding.weight", 2)
        vocab_size = settings.integer("vocab_size", rows)
        if not 0 < vocab_size <= rows:
            raise MambaintError(
                f"{settings.source} has vocab_size = {vocab_size} for a table of {rows} rows",
                "correct vocab_size",
            )
        lite = "layers.0.Lambda_imag" not in source.keys
        numbers = (key.split(".")[1] for key in source.keys if key.startswith("layers."))
        config = MambaConfig(
            mixer="quaternion_full_lite" if lite else "quaternion_full",
            vocab_size=vocab_size,
            pad_vocab_size_multiple=1 if vocab_size == rows else rows,
            d_model=d_model,
            n_layer=1 + max((int(number) for number in numbers if number.isdecimal()), default=0),
            expand=expansion(d_inner, d_model),
            d_state=d_state,
            d_conv=source.shape("layers.0.conv1d.conv.weight", 3)[2],
            norm="none",
            final_norm="layer",
            tie_embeddings=False,
        )

        def key(name: str) -> str:
            if name in _GLOBAL:
                return _GLOBAL[name]
            name = name.removeprefix("backbone.").replace(".mixer.", ".")
            return name.replace(".conv1d.", ".conv1d.conv.")

        notes = ["of the gate the first d_model channels count", "columns of out_proj have another order"]
        if "vocab_size" not in settings:
            notes.append(f"no {settings.source}: vocab_size = {rows}, the rows of the table")
        return Plan(
            "MambaForCausalLM",
            config,
            key,
            forms={"out_proj.weight": COMPONENTS_FIRST},
            notes=tuple(notes),
        )
