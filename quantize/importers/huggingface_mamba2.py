"""Mamba-2 of HuggingFace's transformers."""

from __future__ import annotations

from mamba_int.errors import MambaintError
from quantize.importers.huggingface import huggingface_plan, is_model_type
from quantize.importers.plan import Plan
from quantize.importers.source import SourceCheckpoint


class HuggingFaceMamba2:
    """``transformers.Mamba2ForCausalLM`` and ``Mamba2Model``."""

    name = "huggingface-mamba2"
    title = "HuggingFace Mamba-2"

    def recognises(self, source: SourceCheckpoint) -> bool:
        return is_model_type(source, "mamba2")

    def plan(self, source: SourceCheckpoint) -> Plan:
        settings = source.settings
        low, high = settings.limits("time_step_limit")
        headdim = settings.integer("head_dim", 64)
        plan = huggingface_plan(
            source,
            "mamba2",
            False,
            headdim=headdim,
            n_groups=settings.integer("n_groups", 8),
            dt_limit_low=low,
            dt_limit_high=high,
        )
        heads = settings.integer("num_heads")
        if heads != plan.config.n_heads:
            raise MambaintError(
                f"{settings.source} has num_heads = {heads}, and expand*hidden_size/head_dim = "
                f"{plan.config.n_heads}",
                "give the settings that came with the weights",
            )
        return plan
