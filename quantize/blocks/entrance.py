"""What a mixer reads: the norm of the residual stream, or, of a mixer alone, its inputs as they are."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from torch import Tensor, nn

from mamba_int.float_models.bit_shift_norm import BitShiftNorm
from mamba_int.float_models.mixer import Mixer
from mamba_int.float_models.models import ResidualSum, RMSNorm
from quantize.conversion_config import WeightForm
from quantize.observations import Record, record_norm
from quantize.parameters import array
from quantize.pieces import Pieces
from quantize.scales import FloatArray


class Layer(NamedTuple):
    """A mixer and the norm before it; ``norm`` is None for a mixer alone, a sum where there is no norm."""

    norm: RMSNorm | BitShiftNorm | ResidualSum | None
    mixer: Mixer

    @property
    def norm_weight(self) -> nn.Parameter | None:
        """What a norm by the root mean square multiplies its channels with."""
        return self.norm.weight if isinstance(self.norm, RMSNorm) else None


def record_entrance(record: Record, name: str, layer: Layer, residual: Tensor) -> Tensor:
    """What the mixer of the layer ``name`` reads of the stream [batch, T, d_model]."""
    if not isinstance(layer.norm, RMSNorm):
        if layer.norm is not None:
            record(f"{name}.norm.source", residual)
        record(f"{name}.norm", residual)
        return residual
    return record_norm(record, f"{name}.norm", residual, layer.norm.eps) * layer.norm.weight


def enter(
    p: Pieces, name: str, layer: Layer, residual: str, weight: FloatArray, form: WeightForm
) -> tuple[str, FloatArray, FloatArray]:
    """The node that the mixer's first matrix reads.

    Args:
        p: the graph so far. name: of the layer. layer: norm and mixer. residual: node of the stream.
        weight: of that matrix [outputs, d_model]. form: of its integers.

    Returns:
        The node; the matrix with the norm's own weight folded in; by how much every channel of the node is
        larger than what the matrix is to read.
    """
    at = f"{name}.norm"
    if isinstance(layer.norm, RMSNorm):
        weight = weight * array(layer.norm.weight)
        normed, scales = p.norm(at, residual, layer.norm.eps, weight, form)
        return normed, weight, scales
    if layer.norm is not None:
        p.stands_for(residual, f"{at}.source")
    b, limit = p.graph, p.config.activation_limit
    frac = min(p.places(p.seen[at], limit), b.frac[residual])
    return b.requantize(at, residual, frac, limit), weight, np.ones(weight.shape[1])
