"""The layer norm of the residual stream (arXiv 1607.06450) as integers: the norm by the root mean square of
what is left without the mean."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from mamba_int.float_models.models import ResidualLayerNorm
from quantize.observations import Record, record_norm
from quantize.pieces import Pieces
from quantize.scales import FloatArray, places_for


def record_layer_norm(record: Record, name: str, x: Tensor, norm: ResidualLayerNorm) -> Tensor:
    """The norm of x before its weight and bias.

    What the integers have of x - mean x is d times it, whose root mean square does not have to be divided.
    """
    d = x.shape[-1]
    centred = d * x - x.sum(-1, keepdim=True)
    return record_norm(record, name, centred, norm.eps * d * d)


def layer_norm(
    p: Pieces, name: str, source: str, norm: ResidualLayerNorm, weight: FloatArray | None
) -> tuple[str, FloatArray]:
    """The norm before its weight and bias, and the scale of every channel.

    Args:
        weight: as of ``Pieces.norm``.
    """
    d = p.graph.types[source].shape[-1]
    deviation = centred(p, f"{name}_centred", source, p.seen[f"{name}.source"].largest)
    return p.norm(name, deviation, norm.eps * d * d, weight)


def centred(p: Pieces, name: str, source: str, largest: float) -> str:
    """d x - sum x, exactly but for one rounding.

    Args:
        largest: magnitude of it that was seen; the residual stream may double.
    """
    b, limit = p.graph, p.config.internal_limit
    d = b.types[source].shape[-1]
    weight = {"weight": d * np.eye(d, dtype=np.int64) - 1}
    wide = b.add(f"{name}_sums", "linear", source, frac=b.frac[source], constants=weight)
    return b.requantize(name, wide, min(places_for(2 * largest, limit), b.frac[wide]), limit)
