"""Mamba of the state-spaces repository."""

from __future__ import annotations

from quantize.importers.plan import Plan
from quantize.importers.source import SourceCheckpoint
from quantize.importers.state_spaces import layer, state_spaces_plan


class StateSpacesMamba:
    """``mamba_ssm.MambaLMHeadModel`` with layers ``Mamba1``."""

    name = "state-spaces-mamba"
    title = "state-spaces Mamba"

    def recognises(self, source: SourceCheckpoint) -> bool:
        return layer(source) == "Mamba1"

    def plan(self, source: SourceCheckpoint) -> Plan:
        # "auto" is ceil(d_model / 16), as in MambaConfig.
        dt_rank = source.settings.within("ssm_cfg").rank("dt_rank", 0)
        return state_spaces_plan(source, "mamba", 16, {"dt_rank"}, dt_rank=dt_rank)
