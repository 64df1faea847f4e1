"""The norm of quaternions as integers (``triton_kernels.quaternion_layer_norm``), components in planes.

The mean of |y_d|^2 over D channels is four times that of the squares of all 4 D components: the norm that
keeps directions is one by the root mean square,
y / sqrt(mean |y|^2 + eps) = y / 2 / sqrt(mean y_c^2 + eps / 4). The half, gamma and beta are in the matrix
that follows.

The centered form of the source takes |y_d| by ``isqrt``, normalizes what it is above its mean, and divides
the product of that and y_d by it: one ``div`` for each component.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from mamba_int.float_models.quaternion import QuaternionLayerNorm
from quantize.layer_norm import centred
from quantize.observations import Record, record_norm
from quantize.parameters import array
from quantize.pieces import NORM_ROOM, Pieces
from quantize.scales import FloatArray, places_for


def folded(norm: QuaternionLayerNorm, weight: FloatArray) -> tuple[FloatArray, FloatArray]:
    """The matrix after the norm [outputs, 4 D] with all that is learned of the norm in it, and its bias."""
    gamma = np.tile(array(norm.gamma), 4)
    bias: FloatArray = weight @ array(norm.beta).T.ravel()
    return weight * gamma * (1.0 if norm.centered else 0.5), bias


def record_quaternion_layer_norm(record: Record, name: str, y: Tensor, norm: QuaternionLayerNorm) -> Tensor:
    """What the integers have of the norm, before the matrix of :func:`folded`.

    Args:
        y: [..., 4 D], components in planes.
    """
    if not norm.centered:
        return record_norm(record, name, y, norm.eps / 4)
    planes: Tensor = y.reshape(*y.shape[:-1], 4, -1)
    magnitude = torch.sqrt(planes.square().sum(-2) + norm.eps)
    record(f"{name}.magnitude", magnitude)
    width = magnitude.shape[-1]
    deviation = width * magnitude - magnitude.sum(-1, keepdim=True)
    above = record_norm(record, f"{name}.above", deviation, norm.eps * width * width)
    normed = ((above / (magnitude + norm.eps))[..., None, :] * planes).flatten(-2)
    record(f"{name}.source", y)
    record(name, normed)
    return normed


def quaternion_layer_norm(
    p: Pieces, name: str, source: str, norm: QuaternionLayerNorm, weight: FloatArray
) -> tuple[str, FloatArray]:
    """The norm before ``weight`` of :func:`folded`, and the scale of every channel."""
    b, c = p.graph, p.config
    if c.target == "circuit" and not norm.centered:
        # It is rounded once, as it is squared.
        return p.norm(name, source, norm.eps / 4, weight, steady=True)
    seen = p.seen[f"{name}.source"]
    frac = min(places_for(seen.largest, c.internal_limit), b.frac[source])
    y = b.requantize(f"{name}_in", source, frac, c.internal_limit)
    if not norm.centered:
        return p.norm(name, y, norm.eps / 4, weight, steady=True)
    p.stands_for(y, f"{name}.source")
    width = b.types[y].shape[-1] // 4

    # Four squares of y fill the budget; nor may eps exceed it where almost nothing was seen.
    room = b.max_bits - 1
    square_limit = math.isqrt((1 << room) // 4)
    finest = math.floor(math.log2((1 << (room - 2)) / norm.eps) / 2)
    square_frac = min(places_for(seen.largest, square_limit), frac, finest)
    ys = b.requantize(f"{name}_ys", y, square_frac, square_limit)
    squares = b.add(f"{name}_squares", "mul", ys, ys, frac=2 * square_frac)
    ones = {
        "weight": np.tile(np.eye(width, dtype=np.int64), 4),
        "bias": np.full(width, max(1, round(norm.eps * 4.0**square_frac))),
    }
    sums = b.add(f"{name}_sums", "linear", squares, frac=2 * square_frac, constants=ones)
    # A magnitude far below those seen is one of these, for a quotient to be bounded.
    low = p.seen[f"{name}.magnitude"].low * 2.0**square_frac / 2.0**NORM_ROOM
    root = b.add(f"{name}_root", "isqrt", sums, frac=square_frac)
    magnitude = b.saturate(f"{name}.magnitude", root, max(1, math.floor(low)), b.types[root].high)

    above = f"{name}.above"
    deviation = centred(p, f"{above}_centred", magnitude, p.seen[f"{above}.source"].largest)
    limit = c.internal_limit
    wide = p.over_root_mean_square(above, deviation, norm.eps * width * width, 1.0, np.zeros(width, np.int64))
    normed = b.requantize(above, wide, min(places_for(p.seen[above].largest, limit), b.frac[wide]), limit)
    spread = b.add(f"{name}_spread", "concat", normed, normed, normed, normed, frac=b.frac[normed])
    below = b.add(f"{name}_below", "concat", *[magnitude] * 4, frac=square_frac)
    product = b.add(f"{name}_product", "mul", ys, spread, frac=square_frac + b.frac[normed])
    ratio = b.add(f"{name}_ratio", "div", product, below, frac=b.frac[normed])
    limit = c.activation_limit
    result = b.requantize(name, ratio, min(p.places(p.seen[name], limit), b.frac[ratio]), limit)
    return result, np.ones(4 * width)
