"""What the Mamba models of HuggingFace's transformers have in common.

Their parameters have our names, but for a bare ``MambaModel`` lacks the prefix ``backbone.`` and files from
before transformers 4.39 have ``embedding`` for ``embeddings``.
"""

from __future__ import annotations

from typing import Any

from mamba_int.errors import MambaintError
from mamba_int.float_models.config import Activation, MambaConfig
from quantize.importers.plan import Plan
from quantize.importers.source import Settings, SourceCheckpoint

ACTIVATIONS: dict[str, Activation] = {"silu": "silu", "swish": "silu", "gelu": "gelu", "relu": "relu"}


def is_model_type(source: SourceCheckpoint, model_type: str) -> bool:
    """Whether the settings name this type of model."""
    return source.settings.values.get("model_type") == model_type


def activation(settings: Settings) -> Activation:
    """What follows the convolution.

    Raises:
        MambaintError: for one that the float models do not have.
    """
    name = settings.text("hidden_act", "silu")
    if name not in ACTIVATIONS:
        raise MambaintError(
            f"{settings.source} has hidden_act = {name!r}", f"known are {', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[name]


def huggingface_plan(source: SourceCheckpoint, mixer: str, tied: bool, **values: Any) -> Plan:
    """The plan for a model of transformers.

    Args:
        source: the checkpoint.
        mixer: of the float models. tied: what its class in transformers does unless told.
        values: fields of the configuration which depend on that class.
    """
    settings = source.settings
    tie = settings.boolean("tie_word_embeddings", tied)
    # Other models may stand on the backbone; their heads are then keys too many.
    whole = any(key.startswith("backbone.") for key in source.keys)
    prefix = "backbone." if whole else ""
    old = f"{prefix}embedding.weight" in source.keys
    embeddings = f"{prefix}embedding.weight" if old else f"{prefix}embeddings.weight"
    config = MambaConfig(
        mixer=mixer,
        vocab_size=settings.integer("vocab_size"),
        pad_vocab_size_multiple=1,
        d_model=settings.integer("hidden_size"),
        n_layer=settings.integer("num_hidden_layers"),
        expand=settings.number("expand", 2.0),
        d_state=settings.integer("state_size"),
        d_conv=settings.integer("conv_kernel", 4),
        activation=activation(settings),
        conv_bias=settings.boolean("use_conv_bias", True),
        bias=settings.boolean("use_bias", False),
        norm_epsilon=settings.number("layer_norm_epsilon", 1e-5),
        residual_in_fp32=settings.boolean("residual_in_fp32", True),
        tie_embeddings=tie,
        **values,
    )

    def key(name: str) -> str:
        if name == "backbone.embeddings.weight":
            return embeddings
        return name if whole else name.removeprefix("backbone.")

    return Plan(
        "MambaForCausalLM" if whole else "MambaForFeatureExtraction",
        config,
        key,
        copies={"lm_head.weight": embeddings} if whole and tie else {},
    )
