"""Mamba-Integer V1 and V2: recognised, and refused with the reason.

Their blocks are none of the float models: ternary projections of activations rounded for each token, a norm
by powers of two, V1 with a decay of 1/32768 steps, V2 with normalised B and C and no step size on the values.
Read as a Mamba they would compute something else.
"""

from __future__ import annotations

from mamba_int.errors import MambaintError
from quantize.importers.plan import Plan
from quantize.importers.source import SourceCheckpoint


class MambaInteger:
    """Checkpoints of Mamba-Integer: ``layers.i.norm.gamma`` and, of V1, ``base_decay_nums``."""

    name = "mamba-integer"
    title = "Mamba-Integer"

    def recognises(self, source: SourceCheckpoint) -> bool:
        return {"norm_f.gamma", "layers.0.norm.gamma", "layers.0.x_proj.weight"} <= set(source.keys)

    def plan(self, source: SourceCheckpoint) -> Plan:
        version = "V1" if "layers.0.base_decay_nums" in source.keys else "V2"
        raise MambaintError(
            f"{source.path} is of Mamba-Integer {version}, whose block is none of the float models",
            "train a model of this kind with 'mambaint train'",
        )
