"""MiniMamba: a Mamba whose step bias counts twice and whose gate has no activation.

It adds ``dt_proj.bias`` once in the projection and once before the softplus, and multiplies by z itself
(``minimamba.s6``, 1.0.1). It has no file format: what is read is a ``state_dict`` of any of its models, and
``config.json`` as its ``save_to_json`` writes it, if there is one; sizes come from the tensors otherwise.
"""

from __future__ import annotations

from torch import nn

from mamba_int.errors import MambaintError
from mamba_int.float_models.config import MambaConfig, Pooling
from quantize.importers.plan import DOUBLED, Plan, count_layers, expansion
from quantize.importers.source import SourceCheckpoint

_TABLE = "embedding.token_embedding.weight"
_HEAD = "lm_head.lm_head.weight"
_POOLINGS: dict[str, Pooling] = {"last": "last", "mean": "mean", "max": "max"}


class MiniMamba:
    """``MambaForCausalLM``, ``MambaForSequenceClassification``, ``MambaForFeatureExtraction``, ``Mamba``."""

    name = "minimamba"
    title = "MiniMamba"

    def recognises(self, source: SourceCheckpoint) -> bool:
        keys = set(source.keys)
        legacy = {"layers.0.mixer.x_proj.weight", "embedding.weight", "norm_f.weight"} <= keys
        return legacy or {"backbone.layers.0.mixer.x_proj.weight", "backbone.norm.weight"} <= keys

    def plan(self, source: SourceCheckpoint) -> Plan:
        settings = source.settings
        keys = set(source.keys)
        legacy = "embedding.weight" in keys
        table = "embedding.weight" if legacy else _TABLE
        head = "lm_head.weight" if legacy else _HEAD
        layers = "layers." if legacy else "backbone.layers."
        mixer = f"{layers}0.mixer."
        d_inner, d_state = source.shape(f"{mixer}A_log", 2)
        (d_model,) = source.shape(f"{layers}0.norm.weight", 1)
        if not settings.boolean("rms_norm", True):
            raise MambaintError(
                f"{settings.source} has LayerNorms (rms_norm = false)", "give one of RMSNorms"
            )
        rows = source.shape(table, 2)[0] if table in keys else 0
        vocab_size = settings.integer("vocab_size", rows)
        if table not in keys:
            architecture, vocab_size = "MambaForFeatureExtraction", 1
        elif head in keys:
            architecture = "MambaForCausalLM"
        elif "classifier.classifier.weight" in keys:
            architecture, vocab_size = "MambaForSequenceClassification", rows
        else:
            architecture = "MambaForFeatureExtraction"
        classifier = architecture == "MambaForSequenceClassification"
        multiple = settings.integer("pad_vocab_size_multiple", 8) if "vocab_size" in settings else 1
        config = MambaConfig(
            mixer="mamba",
            vocab_size=vocab_size,
            pad_vocab_size_multiple=1 if classifier else multiple,
            # Without a table it reads vectors: ours does through an identity.
            n_features=0 if table in keys else d_model,
            d_model=d_model,
            n_layer=settings.integer("n_layer", count_layers(source, layers)),
            expand=expansion(d_inner, d_model),
            d_state=d_state,
            d_conv=source.shape(f"{mixer}conv1d.weight", 3)[2],
            dt_rank=source.shape(f"{mixer}dt_proj.weight", 2)[1],
            conv_bias=settings.boolean("conv_bias", f"{mixer}conv1d.bias" in keys),
            bias=settings.boolean("bias", f"{mixer}in_proj.bias" in keys),
            gate_activation="identity",
            norm_epsilon=settings.number("norm_epsilon", 1e-5),
            tie_embeddings=legacy or settings.boolean("tie_embeddings", _tied(source, table, head)),
            num_labels=source.shape("classifier.classifier.weight", 2)[0] if classifier else 2,
            pooling=_pooling(source) if classifier else "last",
            dropout=settings.number("dropout", 0.1),
        )

        def key(name: str) -> str:
            if name == "backbone.embeddings.weight":
                return table
            if name == "lm_head.weight":
                return head
            if name == "backbone.norm_f.weight":
                return "norm_f.weight" if legacy else "backbone.norm.weight"
            if name.startswith("classifier."):
                return f"classifier.{name}"
            return name.removeprefix("backbone.") if legacy else name

        identity = {
            "backbone.embeddings.weight": nn.init.eye_,
            "backbone.embeddings.bias": nn.init.zeros_,
        }
        tied = architecture == "MambaForCausalLM" and config.tie_embeddings
        notes = ["dt_proj.bias is doubled, the gate has no activation"]
        if not settings.present:
            notes.append(f"no {settings.source}: norm_epsilon = {config.norm_epsilon}")
        return Plan(
            architecture,
            config,
            key,
            forms={"dt_proj.bias": DOUBLED},
            constants={} if table in keys else identity,
            copies={head: table} if tied else {},
            notes=tuple(notes),
        )


def _tied(source: SourceCheckpoint, table: str, head: str) -> bool:
    """Without settings the head is tied if it equals the embedding: the model is the same either way."""
    if not {table, head} <= set(source.keys) or source.shape(table) != source.shape(head):
        return False
    return bool((source.read(table) == source.read(head)).all())


def _pooling(source: SourceCheckpoint) -> Pooling:
    name = source.settings.text("pooling_strategy", "last")
    if name not in _POOLINGS:
        raise MambaintError(
            f"{source.settings.source} has pooling_strategy = {name!r}", f"known are {', '.join(_POOLINGS)}"
        )
    return _POOLINGS[name]
