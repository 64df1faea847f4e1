"""The Mamba-2 block (arXiv 2405.21060) as integers."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamba_int.float_models.config import MambaConfig
from mamba_int.float_models.mamba2 import Mamba2Mixer
from mamba_int.float_models.scans import STATE_SPACE_DUALITIES
from quantize.blocks.entrance import Layer, enter, record_entrance
from quantize.fits import log_step
from quantize.observations import Record, record_norm
from quantize.parameters import array, bias_of, conv_parameters
from quantize.pieces import Pieces
from quantize.scales import FloatArray, places_for
from quantize.state_space import convolve, even_state, gate, record_gain, scan, skip, step_size
from triton_kernels.activation import activate
from triton_kernels.causal_conv1d import causal_conv1d


class Mamba2Conversion:
    """norm; in_proj; convolution; SSD; skip; gate; norm; out_proj."""

    matrix_inputs: tuple[str, ...] = ("norm", "gated_norms")

    def trace(self, record: Record, name: str, layer: Layer, residual: Tensor) -> Tensor:
        """See ``BlockConversion``."""

        def at(part: str, value: Tensor) -> Tensor:
            record(f"{name}.{part}", value)
            return value

        mixer = layer.mixer
        assert isinstance(mixer, Mamba2Mixer)
        c = mixer.config
        x = record_entrance(record, name, layer, residual)
        z, xBC, dt = mixer.in_proj(x).split([c.d_inner, mixer.conv_channels, c.n_heads], -1)
        at("z", z)
        convolved = causal_conv1d(xBC, mixer.conv1d.weight[:, 0], mixer.conv1d.bias, "identity")
        shared = c.n_groups * c.d_state
        widths = [c.d_inner, shared, shared]
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
        B, C = (value.unflatten(-1, (c.n_groups, c.d_state)) for value in (B, C))
        for g, (scanned_name, rows) in enumerate(_groups(name, c)):
            gain = record_gain(record, scanned_name, step[..., rows], rates[rows])
            record(f"{scanned_name}.scan_x", (heads[..., rows, :] * gain[..., None]).flatten(-2))
            record(f"{scanned_name}.G", (C[:, :, g] @ B[:, :, g].mT).tril())
        scanned, _ = STATE_SPACE_DUALITIES[c.scan_type](heads, step, -rates, B, C)
        D = mixer.D.view(c.n_heads, -1)
        y = at("y", (scanned + D * heads).flatten(2))
        gated = at("gated", y * at("gate", activate(z, c.gate_activation)))
        normed = torch.cat(
            [
                record_norm(record, norm_name, gated[..., channels], c.norm_epsilon)
                for norm_name, channels in _norms(name, c)
            ],
            -1,
        )
        out: Tensor = mixer.out_proj(at("gated_norms", normed) * mixer.norm.weight)
        return out

    def projections(self, layer: Layer) -> list[tuple[nn.Linear, nn.Parameter | None]]:
        """See ``BlockConversion``."""
        mixer = layer.mixer
        assert isinstance(mixer, Mamba2Mixer)
        return [
            (mixer.in_proj, layer.norm_weight),
            (mixer.out_proj, mixer.norm.weight),
        ]

    def build(self, p: Pieces, name: str, layer: Layer, residual: str) -> str:
        """See ``BlockConversion``."""
        mixer = layer.mixer
        assert isinstance(mixer, Mamba2Mixer)
        b, c, m = p.graph, p.config, mixer.config
        at = f"{name}.{{}}".format
        E, N, H = m.d_inner, m.n_groups * m.d_state, m.n_heads
        bias = bias_of(mixer.in_proj)
        bias = np.zeros(mixer.in_proj.out_features) if bias is None else bias
        bias[-H:] += array(mixer.dt_bias)
        normed, weight, scales = enter(p, name, layer, residual, array(mixer.in_proj.weight), c.weights)
        projected = p.linear(at("in_proj"), normed, weight, bias, scales, at("norm"), c.weights)
        taps, conv_bias = conv_parameters(mixer.conv1d)
        parts, start = {}, 0
        for part, width in (("x", E), ("B", N), ("C", N)):
            source = p.part(at(f"{part}_projected"), projected, E + start, width)
            rows = slice(start, start + width)
            parts[part] = convolve(p, at(part), source, taps[rows], conv_bias[rows], m.activation)
            start += width
        dt = p.part(at("dt"), projected, E + start, H)
        y = self._scans(p, name, mixer, parts, dt)
        D = array(mixer.D)
        y = skip(p, name, y, parts["x"], D if m.D_has_hdim else np.repeat(D, m.headdim))
        gated = gate(p, name, y, p.part(at("z_in"), projected, 0, E), m.gate_activation)
        gated_frac = min(places_for(p.seen[at("gated")].largest, c.internal_limit), b.frac[gated])
        gated = b.requantize(at("gated"), gated, gated_frac, c.internal_limit)
        weight = array(mixer.out_proj.weight) * array(mixer.norm.weight)
        v, scales = self._norms(p, name, m, gated, weight)
        bias = bias_of(mixer.out_proj)
        return p.linear(at("out_proj"), v, weight, bias, scales, at("gated_norms"), c.weights)

    def _scans(self, p: Pieces, name: str, mixer: Mamba2Mixer, parts: dict[str, str], dt: str) -> str:
        """SSD(x, dt, B, C) without its skip: a scan for every group."""
        m = mixer.config
        at = f"{name}.{{}}".format
        groups = _groups(name, m)
        limits = log_step(m.dt_limit_low, m.dt_limit_high)
        log_dt = step_size(p, name, dt, limits, [f"{scanned}.decay_index" for scanned, _ in groups])
        rates, found = np.exp(array(mixer.A_log)), []
        for g, (scanned, rows) in enumerate(groups):
            x = self._of_group(p, f"{scanned}.x", parts["x"], g, m.n_groups)
            B, C = (
                even_state(p, self._of_group(p, f"{scanned}.{part}", parts[part], g, m.n_groups))
                for part in "BC"
            )
            steps = self._of_group(p, f"{scanned}.log_dt", log_dt, g, m.n_groups)
            largest_G = p.seen[f"{scanned}.G"].largest
            found.append(scan(p, name, scanned, (x, B, C, steps), rates[rows], m.headdim, largest_G))
        return p.concat(at("scanned_groups"), found)

    def _of_group(self, p: Pieces, name: str, source: str, group: int, groups: int) -> str:
        """The channels of one of so many groups."""
        width = p.graph.types[source].shape[-1] // groups
        return p.part(name, source, group * width, width) if groups > 1 else source

    def _norms(
        self, p: Pieces, name: str, m: MambaConfig, gated: str, weight: FloatArray
    ) -> tuple[str, FloatArray]:
        """The norm after the gate, of every group by itself, and by how much its channels are larger."""
        b, form, found, factors = p.graph, p.config.weights, [], []
        norms = _norms(name, m)
        # Ternary rows have no columns of other scales: all groups keep their own.
        same = form == "ternary" and len(norms) > 1
        for norm, channels in norms:
            width = channels.stop - channels.start
            source = gated
            if len(norms) > 1:
                source = p.part(f"{norm}_in", gated, channels.start, width)
            follows = None if same else weight[:, channels]
            v, scales = p.norm(norm, source, m.norm_epsilon, follows, form)
            found.append(v)
            factors.append(np.broadcast_to(scales, width) * 2.0 ** b.frac[v])
        if len(found) == 1:
            return found[0], factors[0] * 2.0 ** -b.frac[found[0]]
        if same:
            return p.concat(f"{name}.gated_norms", found), np.ones(m.d_inner)
        # The bits of each are full as they are: what its places differ is one more scale of its channels.
        frac = b.frac[found[0]]
        joined = b.add(f"{name}.gated_norms", "concat", *found, frac=frac)
        scales = np.concatenate(factors) * 2.0**-frac
        p.stands_for(joined, f"{name}.gated_norms", scales)
        return joined, scales


def _groups(name: str, config: MambaConfig) -> list[tuple[str, slice]]:
    """Name and heads of every scan."""
    heads = config.n_heads // config.n_groups
    if config.n_groups == 1:
        return [(name, slice(0, heads))]
    return [(f"{name}.group{g}", slice(g * heads, (g + 1) * heads)) for g in range(config.n_groups)]


def _norms(name: str, config: MambaConfig) -> list[tuple[str, slice]]:
    """Name and channels of every norm after the gate."""
    groups = config.n_groups if config.norm_per_group else 1
    if groups == 1:
        return [(f"{name}.gated_norm", slice(0, config.d_inner))]
    width = config.d_inner // groups
    return [(f"{name}.group{g}.gated_norm", slice(g * width, (g + 1) * width)) for g in range(groups)]
