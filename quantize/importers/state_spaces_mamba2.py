"""Mamba-2 of the state-spaces repository."""

from __future__ import annotations

from mamba_int.errors import MambaintError
from quantize.importers.plan import Plan
from quantize.importers.source import SourceCheckpoint
from quantize.importers.state_spaces import layer, state_spaces_plan

_OWN = {"headdim", "ngroups", "D_has_hdim", "dt_limit", "rmsnorm", "norm_before_gate", "d_ssm"}


class StateSpacesMamba2:
    """``mamba_ssm.MambaLMHeadModel`` with layers ``Mamba2``."""

    name = "state-spaces-mamba2"
    title = "state-spaces Mamba-2"

    def recognises(self, source: SourceCheckpoint) -> bool:
        return layer(source) == "Mamba2"

    def plan(self, source: SourceCheckpoint) -> Plan:
        settings = source.settings.within("ssm_cfg")
        low, high = settings.limits("dt_limit")
        plan = state_spaces_plan(
            source,
            "mamba2",
            128,
            _OWN,
            headdim=settings.integer("headdim", 64),
            n_groups=settings.integer("ngroups", 1),
            D_has_hdim=settings.boolean("D_has_hdim", False),
            dt_limit_low=low,
            dt_limit_high=high,
        )
        faults = {
            "rmsnorm = false": not settings.boolean("rmsnorm", True),
            "norm_before_gate = true": settings.boolean("norm_before_gate", False),
            "d_ssm below d_inner": settings.integer("d_ssm", plan.config.d_inner) != plan.config.d_inner,
        }
        for what, found in faults.items():
            if found:
                raise MambaintError(
                    f"{settings.source} has {what}, which no float model has",
                    "give a Mamba-2 with the default form of block",
                )
        return plan
