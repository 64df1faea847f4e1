"""The ends of a float model as integers: embedding, final norm, pooling and head."""

from __future__ import annotations

import numpy as np
from torch import nn

from mamba_int.float_models.models import MambaForSequenceClassification
from quantize.calibration import FloatModel
from quantize.conversion_config import InputFormat
from quantize.parameters import array, bias_of
from quantize.pieces import Pieces
from quantize.scales import rounded


def embed(p: Pieces, model: FloatModel, input_format: InputFormat | None) -> str:
    """The residual stream before the first layer."""
    b, embeddings = p.graph, model.backbone.embeddings
    assert isinstance(embeddings, nn.Linear | nn.Embedding)
    limit = p.config.residual_limit
    weight = array(embeddings.weight)
    if input_format is None or isinstance(embeddings, nn.Embedding):
        vocabulary = model.config.vocab_size
        source = b.add("input", "input", frac=0, low=0, high=vocabulary - 1, features=0)
        rows = np.clip(rounded(weight, p.residual_frac), -limit, limit)
        return b.add("residual", "embedding", source, frac=p.residual_frac, constants={"table": rows})
    form = input_format
    source = b.add("input", "input", frac=form.frac, low=form.low, high=form.high, features=weight.shape[1])
    embedded = p.linear("embed", source, weight, array(embeddings.bias))
    return b.requantize("residual", embedded, p.residual_frac, limit)


def head(p: Pieces, model: FloatModel, residual: str) -> str:
    """Logits of the residual stream after the last layer."""
    b = p.graph
    gamma, eps = array(model.backbone.norm_f.weight), model.backbone.norm_f.eps
    if not isinstance(model, MambaForSequenceClassification):
        weight = array(model.lm_head.weight)[: model.config.vocab_size] * gamma
        normed, scales = p.norm("final_norm", residual, eps, weight)
        return p.linear("logits", normed, weight, bias_of(model.lm_head), scales)
    pooling, bias = model.config.pooling, bias_of(model.classifier)
    if pooling == "last":
        residual = b.add("last", "reduce", residual, frac=b.frac[residual], kind="last")
    signs = np.where(gamma < 0, -1, 1) if pooling == "max" else np.ones(len(gamma), np.int64)
    weight = array(model.classifier.weight) * gamma * signs
    pooled, scales = p.norm("final_norm", residual, eps, weight)
    frac = b.frac[pooled]
    if pooling == "max":
        # What is multiplied with less than zero is largest where it is smallest itself.
        if (signs < 0).any():
            pooled = b.add("signed", "mul", pooled, frac=frac, constants={"value": signs})
        pooled = b.add("pool", "reduce", pooled, frac=frac, kind="max")
        p.stands_for(pooled, "pooled", scales)
    elif pooling == "mean":
        pooled = b.add("pool_sum", "reduce", pooled, frac=frac, kind="sum")
        # The mean's division is in the weights; eight bits more than a step has are enough.
        steps = p.config.seq_len
        pooled = b.shift("pool", pooled, frac - max(0, (steps - 1).bit_length() - 8))
        weight = weight / steps
        p.stands_for(pooled, "pooled", scales * steps)
    return p.linear("logits", pooled, weight, bias, scales)
