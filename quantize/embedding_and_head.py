"""The ends of a float model as integers: embedding, final norm, pooling and head."""

from __future__ import annotations

import numpy as np
from torch import nn

from mamba_int.float_models.models import MambaForSequenceClassification
from quantize.calibration import FloatModel
from quantize.conversion_config import InputFormat
from quantize.parameters import array
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
    b, c = p.graph, p.config
    gamma = array(model.backbone.norm_f.weight)
    classify = isinstance(model, MambaForSequenceClassification)
    last = classify and model.config.pooling == "last"
    source = residual
    if last:
        source = b.add("last", "reduce", residual, frac=b.frac[residual], kind="last")
    output = model.classifier if isinstance(model, MambaForSequenceClassification) else model.lm_head
    weight = array(output.weight)
    if not classify:
        weight = weight[: model.config.vocab_size]
    weight = weight * gamma
    eps = model.backbone.norm_f.eps
    pooled, scales = p.norm("final_norm", source, eps, weight)
    if classify and not last:
        pooled = b.add("pool_sum", "reduce", pooled, frac=b.frac[pooled], kind="sum")
        # The mean's division is in the weights; eight bits more than a step has are enough.
        places = max(0, (c.seq_len - 1).bit_length() - 8)
        pooled = b.shift("pool", pooled, b.frac[pooled] - places)
        weight = weight / c.seq_len
        p.stands_for(pooled, "pooled", scales * c.seq_len)
    bias = None if output.bias is None else array(output.bias)
    return p.linear("logits", pooled, weight, bias, scales)
