"""FalconMamba of HuggingFace's transformers: Mamba with norms without weights on B, C and dt."""

from __future__ import annotations

from quantize.importers.huggingface import huggingface_plan, is_model_type
from quantize.importers.plan import Plan
from quantize.importers.source import SourceCheckpoint


class HuggingFaceFalconMamba:
    """``transformers.FalconMambaForCausalLM`` and ``FalconMambaModel``."""

    name = "huggingface-falcon-mamba"
    title = "HuggingFace FalconMamba"

    def recognises(self, source: SourceCheckpoint) -> bool:
        return is_model_type(source, "falcon_mamba")

    def plan(self, source: SourceCheckpoint) -> Plan:
        return huggingface_plan(
            source,
            "mamba",
            True,
            dt_rank=source.settings.rank("time_step_rank", 0),
            BCdt_norm=True,
            BCdt_norm_epsilon=source.settings.number("mixer_rms_eps", 1e-6),
        )
