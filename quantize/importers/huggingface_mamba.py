"""Mamba of HuggingFace's transformers."""

from __future__ import annotations

from quantize.importers.huggingface import huggingface_plan, is_model_type
from quantize.importers.plan import Plan
from quantize.importers.source import SourceCheckpoint


class HuggingFaceMamba:
    """``transformers.MambaForCausalLM`` and ``MambaModel``."""

    name = "huggingface-mamba"
    title = "HuggingFace Mamba"

    def recognises(self, source: SourceCheckpoint) -> bool:
        return is_model_type(source, "mamba")

    def plan(self, source: SourceCheckpoint) -> Plan:
        # "auto" is ceil(hidden_size / 16), as in MambaConfig.
        return huggingface_plan(source, "mamba", True, dt_rank=source.settings.rank("time_step_rank", 0))
