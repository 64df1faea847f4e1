"""What both Mambas of the state-spaces repository (``mamba_ssm``) have in common.

Its ``MambaLMHeadModel`` has our names of parameters but for ``backbone.embedding``; its settings are those of
``mamba_ssm.models.config_mamba``, with the mixer's in ``ssm_cfg``.
"""

from __future__ import annotations

from typing import Any

from mamba_int.errors import MambaintError
from mamba_int.float_models.config import MambaConfig
from quantize.importers.plan import Plan
from quantize.importers.source import SourceCheckpoint

EMBEDDING = "backbone.embedding.weight"
_ONLY_INITIAL = {"dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor", "A_init_range", "conv_init"}
_ONLY_SPEED = {"chunk_size", "use_mem_eff_path", "use_fast_path", "sequence_parallel"}
_COMMON = {"layer", "d_state", "d_conv", "expand", "conv_bias", "bias"} | _ONLY_INITIAL | _ONLY_SPEED


def layer(source: SourceCheckpoint) -> str | None:
    """The kind of layer that the settings name; None if they are not of state-spaces."""
    values = source.settings.values
    if EMBEDDING not in source.keys or "model_type" in values or "d_model" not in values:
        return None
    ssm_cfg = values.get("ssm_cfg")
    named = ssm_cfg.get("layer", "Mamba1") if isinstance(ssm_cfg, dict) else "Mamba1"
    return named if isinstance(named, str) else None


def state_spaces_plan(
    source: SourceCheckpoint, mixer: str, d_state: int, own: set[str], **values: Any
) -> Plan:
    """The plan for a ``MambaLMHeadModel``.

    Args:
        source: the checkpoint.
        mixer: of the float models. d_state: its default.
        own: further settings of ``ssm_cfg`` that the mixer reads.
        values: fields of the configuration which depend on the mixer.

    Raises:
        MambaintError: for attention, feed-forward layers, LayerNorms, or a setting nobody knows.
    """
    settings = source.settings
    mixer_settings = settings.within("ssm_cfg")
    if settings.values.get("attn_layer_idx"):
        raise MambaintError(
            f"{settings.source} has attention layers (attn_layer_idx)", "give a model of Mamba layers alone"
        )
    if settings.integer("d_intermediate", 0):
        raise MambaintError(
            f"{settings.source} has feed-forward layers (d_intermediate)",
            "give a model of Mamba layers alone",
        )
    if not settings.boolean("rms_norm", True):
        raise MambaintError(
            f"{settings.source} has LayerNorms (rms_norm = false)", "give a model of RMSNorms"
        )
    unknown = sorted(set(mixer_settings.values) - _COMMON - own)
    if unknown:
        raise MambaintError(
            f"{mixer_settings.source} has unknown {', '.join(unknown)}", "give a model without them"
        )
    tie = settings.boolean("tie_embeddings", True)
    config = MambaConfig(
        mixer=mixer,
        vocab_size=settings.integer("vocab_size"),
        pad_vocab_size_multiple=settings.integer("pad_vocab_size_multiple", 8),
        d_model=settings.integer("d_model"),
        n_layer=settings.integer("n_layer"),
        expand=mixer_settings.number("expand", 2.0),
        d_state=mixer_settings.integer("d_state", d_state),
        d_conv=mixer_settings.integer("d_conv", 4),
        conv_bias=mixer_settings.boolean("conv_bias", True),
        bias=mixer_settings.boolean("bias", False),
        residual_in_fp32=settings.boolean("residual_in_fp32", True),
        tie_embeddings=tie,
        **values,
    )
    padding = config.padded_vocab_size - config.vocab_size
    return Plan(
        "MambaForCausalLM",
        config,
        lambda name: EMBEDDING if name == "backbone.embeddings.weight" else name,
        copies={"lm_head.weight": EMBEDDING} if tie else {},
        notes=(f"the last {padding} logits, which pad the vocabulary, are cut off",) if padding else (),
    )
