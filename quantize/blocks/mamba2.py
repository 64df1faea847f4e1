"""The Mamba-2 block (arXiv 2405.21060) as integers."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_int.errors import MambaintError
from mamba_int.float_models.config import MambaConfig
from mamba_int.float_models.mamba2 import Mamba2Mixer
from mamba_int.float_models.models import MambaBlock
from mamba_int.float_models.scans import STATE_SPACE_DUALITIES
from quantize.fits import log_step
from quantize.observations import Record, record_norm
from quantize.parameters import array, bias_of, conv_parameters
from quantize.pieces import Pieces
from quantize.scales import places_for
from quantize.state_space import convolve, gate, record_gain, scan, skip, step_size
from triton_kernels.activation import activate
from triton_kernels.causal_conv1d import causal_conv1d


class Mamba2Conversion:
    """norm; in_proj; convolution; SSD; skip; gate; norm; out_proj."""

    def check(self, config: MambaConfig) -> None:
        """See ``BlockConversion``."""
        c = config
        if c.n_groups != 1:
            raise MambaintError(f"n_groups = {c.n_groups} has no integer form here", "convert another model")
        if c.d_state % 2:
            raise MambaintError(f"d_state = {c.d_state} is odd", "give a model whose d_state is even")

    def trace(self, record: Record, name: str, layer: MambaBlock, residual: Tensor) -> Tensor:
        """See ``BlockConversion``."""

        def at(part: str, value: Tensor) -> Tensor:
            record(f"{name}.{part}", value)
            return value

        mixer = layer.mixer
        assert isinstance(mixer, Mamba2Mixer)
        c = mixer.config
        x = record_norm(record, f"{name}.norm", residual, layer.norm.eps) * layer.norm.weight
        z, xBC, dt = mixer.in_proj(x).split([c.d_inner, mixer.conv_channels, c.n_heads], -1)
        at("z", z)
        convolved = causal_conv1d(xBC, mixer.conv1d.weight[:, 0], mixer.conv1d.bias, "identity")
        widths = [c.d_inner, c.d_state, c.d_state]
        for part, value in zip("xBC", xBC.split(widths, -1), strict=True):
            at(f"{part}_in", value)
        values, B, C = (
            at(part, activate(at(f"{part}_index", value), c.activation))
            for part, value in zip("xBC", convolved.split(widths, -1), strict=True)
        )
        step = F.softplus(at("step_index", dt + mixer.dt_bias))
        if c.dt_limit_low > 0 or c.dt_limit_high > 0:
            step = step.clamp(c.dt_limit_low, c.dt_limit_high or math.inf)
        rates = torch.exp(mixer.A_log)
        heads = values.unflatten(-1, (c.n_heads, c.headdim))
        at("scan_x", (heads * record_gain(record, name, step, rates)[..., None]).flatten(-2))
        at("G", (C @ B.mT).tril())
        scanned, _ = STATE_SPACE_DUALITIES[c.scan_type](heads, step, -rates, B[:, :, None], C[:, :, None])
        D = mixer.D.view(c.n_heads, -1)
        y = at("y", (scanned + D * heads).flatten(2))
        gated = y * at("gate", activate(z, c.gate_activation))
        normed = record_norm(record, f"{name}.gated_norm", gated, c.norm_epsilon)
        out: Tensor = mixer.out_proj(normed * mixer.norm.weight)
        return out

    def build(self, p: Pieces, name: str, layer: MambaBlock, residual: str) -> str:
        """See ``BlockConversion``."""
        mixer = layer.mixer
        assert isinstance(mixer, Mamba2Mixer)
        b, c, m = p.graph, p.config, mixer.config
        at = f"{name}.{{}}".format
        E, N, H = m.d_inner, m.d_state, m.n_heads
        weight = array(mixer.in_proj.weight) * array(layer.norm.weight)
        bias = bias_of(mixer.in_proj)
        bias = np.zeros(len(weight)) if bias is None else bias
        bias[-H:] += array(mixer.dt_bias)
        normed, scales = p.norm(at("norm"), residual, layer.norm.eps, weight)
        projected = p.linear(at("in_proj"), normed, weight, bias, scales)
        taps, conv_bias = conv_parameters(mixer.conv1d)
        parts, start = {}, 0
        for part, width in (("x", E), ("B", N), ("C", N)):
            source = p.part(at(f"{part}_projected"), projected, E + start, width)
            rows = slice(start, start + width)
            parts[part] = convolve(p, at(part), source, taps[rows], conv_bias[rows], m.activation)
            start += width
        x, B, C = (parts[part] for part in "xBC")
        dt = p.part(at("dt"), projected, E + start, H)
        log_dt = step_size(p, name, dt, log_step(m.dt_limit_low, m.dt_limit_high), [at("decay_index")])
        rates = np.exp(array(mixer.A_log))
        largest_G = p.seen[at("G")].largest
        scanned = scan(p, name, name, (x, B, C, log_dt), rates, m.headdim, largest_G)
        D = array(mixer.D)
        y = skip(p, name, scanned, x, D if m.D_has_hdim else np.repeat(D, m.headdim))
        gated = gate(p, name, y, p.part(at("z_in"), projected, 0, E), m.gate_activation)
        seen = p.seen[at("gated_norm.source")]
        gated_frac = min(places_for(seen.largest, c.internal_limit), b.frac[gated])
        gated = b.requantize(at("gated"), gated, gated_frac, c.internal_limit)
        weight = array(mixer.out_proj.weight) * array(mixer.norm.weight)
        v, scales = p.norm(at("gated_norm"), gated, m.norm_epsilon, weight)
        return p.linear(at("out_proj"), v, weight, bias_of(mixer.out_proj), scales)
