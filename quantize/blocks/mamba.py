"""The Mamba-1 block (arXiv 2312.00752) as integers."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamba_int.float_models.mamba import MambaMixer
from mamba_int.float_models.scans import SELECTIVE_SCANS
from quantize.blocks.entrance import Layer, enter, record_entrance
from quantize.fits import log_step
from quantize.observations import Record, record_norm
from quantize.parameters import array, bias_of, conv_parameters
from quantize.pieces import Pieces
from quantize.scales import FloatArray, places_for
from quantize.state_space import convolve, even_state, gate, record_gain, scan, skip, step_size
from triton_kernels.activation import activate
from triton_kernels.causal_conv1d import causal_conv1d

PARTS = ("dt", "B", "C")
"""What x_proj gives, in this order."""


class MambaConversion:
    """norm; in_proj; convolution; x_proj; for every entry of the state a scan; skip; gate; out_proj.

    The heads of the scans are the channels, each with decays of its own.
    """

    matrix_inputs: tuple[str, ...] = ("norm", "x", "dt", "gated")

    def trace(self, record: Record, name: str, layer: Layer, residual: Tensor) -> Tensor:
        """See ``BlockConversion``."""

        def at(part: str, value: Tensor) -> Tensor:
            record(f"{name}.{part}", value)
            return value

        mixer = layer.mixer
        assert isinstance(mixer, MambaMixer)
        c = mixer.config
        u, z = mixer.in_proj(record_entrance(record, name, layer, residual)).chunk(2, -1)
        weight = mixer.conv1d.weight[:, 0]
        index = at("x_index", causal_conv1d(at("x_in", u), weight, mixer.conv1d.bias, "identity"))
        values = at("x", activate(index, c.activation))
        parts = mixer.x_proj(values).split([c.rank, c.d_state, c.d_state], -1)
        dt, B, C = (
            record_norm(record, f"{name}.{part}", value, c.BCdt_norm_epsilon)
            if c.BCdt_norm
            else at(part, value)
            for part, value in zip(PARTS, parts, strict=True)
        )
        at("z", z)
        delta = F.linear(dt, mixer.dt_proj.weight)
        step = F.softplus(at("step_index", delta + mixer.dt_proj.bias))
        rates = torch.exp(mixer.A_log)
        for n in range(c.d_state):
            at(f"state{n}.scan_x", values * record_gain(record, f"{name}.state{n}", step, rates[:, n]))
        scanned, _ = SELECTIVE_SCANS[c.scan_type](
            values, delta, -rates, B, C, mixer.D, None, mixer.dt_proj.bias, True
        )
        gated = at("gated", at("y", scanned) * at("gate", activate(z, c.gate_activation)))
        out: Tensor = mixer.out_proj(gated)
        return out

    def projections(self, layer: Layer) -> list[tuple[nn.Linear, nn.Parameter | None]]:
        """See ``BlockConversion``."""
        mixer = layer.mixer
        assert isinstance(mixer, MambaMixer)
        return [
            (mixer.in_proj, layer.norm_weight),
            (mixer.x_proj, None),
            (mixer.out_proj, None),
        ]

    def build(self, p: Pieces, name: str, layer: Layer, residual: str) -> str:
        """See ``BlockConversion``."""
        mixer = layer.mixer
        assert isinstance(mixer, MambaMixer)
        b, m, form = p.graph, mixer.config, p.config.weights
        at = f"{name}.{{}}".format
        E = m.d_inner
        bias = bias_of(mixer.in_proj)
        normed, weight, scales = enter(p, name, layer, residual, array(mixer.in_proj.weight), form)
        bias = np.zeros(len(weight)) if bias is None else bias
        projected = p.linear(at("in_proj"), normed, weight, bias, scales, at("norm"), form)
        source = p.part(at("x_projected"), projected, 0, E)
        x = convolve(p, at("x"), source, *conv_parameters(mixer.conv1d), m.activation)
        y = skip(p, name, self._scans(p, name, mixer, x), x, array(mixer.D))
        gated = gate(p, name, y, p.part(at("z_in"), projected, E, E), m.gate_activation)
        # Nothing normalizes this: the large channels would leave the others few bits.
        weight, seen = array(mixer.out_proj.weight), p.seen[at("gated")]
        gains = p.gains(seen.channels, weight, form)
        if gains.any():
            lifts = {"value": 1 << gains}
            reach = b.types[gated].magnitude << int(gains.max())
            excess = max(0, reach.bit_length() - (b.max_bits - 1))
            gated = b.shift(at("gated_narrow"), gated, b.frac[gated] - excess)
            gated = b.add(at("gated_channels"), "mul", gated, frac=b.frac[gated], constants=lifts)
        limit = p.config.activation_limit
        frac = min(p.places(seen, limit, gains.astype(np.float64)), b.frac[gated])
        v = b.requantize(at("gated"), gated, frac, limit)
        p.stands_for(v, at("gated"), np.exp2(gains))
        bias = bias_of(mixer.out_proj)
        return p.linear(at("out_proj"), v, weight, bias, np.exp2(gains), at("gated"), form)

    def _scans(self, p: Pieces, name: str, mixer: MambaMixer, x: str) -> str:
        """S6(x, dt, B, C) without its skip."""
        b, m, limit = p.graph, mixer.config, p.config.activation_limit
        at = f"{name}.{{}}".format
        N = m.d_state
        weight = array(mixer.x_proj.weight)
        low_rank = p.linear(at("x_proj"), x, weight, None, reads=at("x"), form=p.config.weights)
        weight = array(mixer.dt_proj.weight)
        parts, scales, start = {}, np.ones(1), 0
        for part, width in zip(PARTS, (m.rank, N, N), strict=True):
            wide = p.part(at(f"{part}_projected"), low_rank, start, width)
            start += width
            if m.BCdt_norm:
                follows = weight if part == "dt" else None
                parts[part], grown = self._normed(p, at(part), wide, m.BCdt_norm_epsilon, follows)
                scales = grown if part == "dt" else scales
                continue
            frac = min(p.places(p.seen[at(part)], limit), b.frac[wide])
            parts[part] = b.requantize(at(part), wide, frac, limit)
        dt = p.linear(at("dt_proj"), parts["dt"], weight, bias_of(mixer.dt_proj), scales, at("dt"))
        states = [at(f"state{n}") for n in range(N)]
        log_dt = step_size(p, name, dt, log_step(), [f"{state}.decay_index" for state in states])
        rates, total = np.exp(array(mixer.A_log)), ""
        for n, state in enumerate(states):
            B, C = (even_state(p, p.part(f"{state}.{part}", parts[part], n, 1)) for part in "BC")
            largest_G = float(p.seen[at("B")].channels[n] * p.seen[at("C")].channels[n])
            y = scan(p, name, state, (x, B, C, log_dt), rates[:, n], 1, largest_G)
            if total:
                y = b.shift(f"{state}.aligned", y, b.frac[total])
            total = b.add(f"{state}.sum", "add", total, y, frac=b.frac[y]) if total else y
        return total

    def _normed(
        self, p: Pieces, name: str, wide: str, eps: float, follows: FloatArray | None
    ) -> tuple[str, FloatArray]:
        """The norm without weights of dt, B or C (FalconMamba), before the matrix that follows."""
        b, limit = p.graph, p.config.internal_limit
        frac = min(places_for(p.seen[f"{name}.source"].largest, limit), b.frac[wide])
        return p.norm(name, b.requantize(f"{name}_in", wide, frac, limit), eps, follows)
