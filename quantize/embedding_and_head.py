"""The ends of a float model as integers: embedding, final norm, pooling and head."""

from __future__ import annotations

import numpy as np
from torch import nn

from mamba_int.float_models.bit_linear import BitLinear
from mamba_int.float_models.bit_shift_norm import BitShiftNorm
from mamba_int.float_models.mixer import Mixer
from mamba_int.float_models.models import (
    MambaForFeatureExtraction,
    MambaForSequenceClassification,
    ResidualLayerNorm,
    RMSNorm,
)
from quantize.bit_linear import bit_linear
from quantize.bit_shift_norm import bit_shift_norm
from quantize.calibration import Convertible, FloatModel
from quantize.conversion_config import InputFormat
from quantize.layer_norm import layer_norm
from quantize.parameters import array, bias_of
from quantize.pieces import Pieces
from quantize.scales import FloatArray, rounded


def embed(p: Pieces, model: Convertible, input_format: InputFormat | None) -> str:
    """The residual stream before the first layer."""
    b, limit = p.graph, p.config.residual_limit
    if isinstance(model, Mixer):
        assert input_format is not None
        source = _real_input(p, input_format, model.config.d_model)
        return b.requantize("residual", source, min(p.residual_frac, input_format.frac), limit)
    embeddings = model.backbone.embeddings
    assert isinstance(embeddings, nn.Linear | nn.Embedding)
    weight = array(embeddings.weight)
    if input_format is None or isinstance(embeddings, nn.Embedding):
        vocabulary = model.config.vocab_size
        source = b.add("input", "input", frac=0, low=0, high=vocabulary - 1, features=0)
        rows = np.clip(rounded(weight, p.residual_frac), -limit, limit)
        return b.add("residual", "embedding", source, frac=p.residual_frac, constants={"table": rows})
    source = _real_input(p, input_format, weight.shape[1])
    embedded = p.linear("embed", source, weight, array(embeddings.bias))
    return b.requantize("residual", embedded, p.residual_frac, limit)


def _real_input(p: Pieces, form: InputFormat, features: int) -> str:
    return p.graph.add("input", "input", frac=form.frac, low=form.low, high=form.high, features=features)


def head(p: Pieces, model: FloatModel, residual: str) -> str:
    """Logits, or hidden states, of the residual stream after the last layer."""
    b, norm = p.graph, model.backbone.norm_f
    assert isinstance(norm, RMSNorm | BitShiftNorm | ResidualLayerNorm)
    # The weights of a norm by powers of two are in what it gives.
    gamma = np.ones(model.config.d_model) if isinstance(norm, BitShiftNorm) else array(norm.weight)
    beta = array(norm.bias) if isinstance(norm, ResidualLayerNorm) else None

    def normed(source: str, weight: FloatArray) -> tuple[str, FloatArray]:
        if isinstance(norm, BitShiftNorm):
            return bit_shift_norm(p, "final_norm", source, norm), np.ones(len(gamma))
        if isinstance(norm, ResidualLayerNorm):
            return layer_norm(p, "final_norm", source, norm, weight)
        return p.norm("final_norm", source, norm.eps, weight)

    def biased(weight: FloatArray, bias: FloatArray | None) -> FloatArray | None:
        """The bias of a matrix, and of the norm that it reads."""
        if beta is None:
            return bias
        own: FloatArray = weight @ beta
        return own if bias is None else own + bias

    if isinstance(model, MambaForFeatureExtraction):
        weight = np.diag(gamma)
        hidden, scales = normed(residual, weight)
        return p.linear("hidden", hidden, weight, beta, scales)
    if not isinstance(model, MambaForSequenceClassification):
        gain = model.config.d_model**-0.5 if model.config.scale_logits else 1.0
        matrix = array(model.lm_head.weight)[: model.config.vocab_size] * gain
        weight = matrix * gamma
        pooled, scales = normed(residual, weight)
        if isinstance(model.lm_head, BitLinear):
            return bit_linear(p, "logits", pooled, model.lm_head, gain, model.config.vocab_size)
        bias = biased(matrix, bias_of(model.lm_head))
        return p.linear("logits", pooled, weight, bias, scales, "final_norm")
    pooling, matrix = model.config.pooling, array(model.classifier.weight)
    bias = biased(matrix, bias_of(model.classifier))
    if pooling == "last":
        residual = b.add("last", "reduce", residual, frac=b.frac[residual], kind="last")
    signs = np.where(gamma < 0, -1, 1) if pooling == "max" else np.ones(len(gamma), np.int64)
    weight = matrix * gamma * signs
    pooled, scales = normed(residual, weight)
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
    # A mean or a maximum moves otherwise than a step: there is nothing to reconstruct from.
    return p.linear("logits", pooled, weight, bias, scales, "final_norm" if pooling == "last" else "")
