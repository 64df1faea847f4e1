"""The blocks of Mamba-Integer (``mamba_int.float_models.mamba_integer``) as integers.

Ternary matrices are kept exactly, their scales become multipliers of whole numbers. Activations have one
power of two for all steps, where the float model has a scale for each. The decays of version 1 are the
integers of the scan, rounded to ``decay_bits``; those of version 2 are tables, as of every exponential.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import numpy as np
import torch
from torch import Tensor, nn

from mamba_int.float_models.bit_shift_norm import BitShiftNorm
from mamba_int.float_models.mamba_integer import (
    DECAY_BITS,
    LARGEST_DECAY,
    NORM_EPSILON,
    MambaIntegerMixer,
    MambaIntegerV1Mixer,
    MambaIntegerV2Mixer,
    step_size,
    unit,
)
from quantize import state_space
from quantize.bit_linear import bit_linear
from quantize.bit_shift_norm import bit_shift_norm, record_bit_shift_norm
from quantize.blocks.entrance import Layer
from quantize.fits import ACTIVATIONS, Curve, log_step
from quantize.observations import Record
from quantize.parameters import array, conv_parameters
from quantize.pieces import Pieces
from quantize.scales import largest_integer, places_for, rounded
from triton_kernels.activation import activate
from triton_kernels.causal_conv1d import causal_conv1d

MODULATION_LIMIT = 20
"""Of m in version 1."""
MODULATION_PLACES = 4
"""Binary places of m where it is added to a decay of 15 bits."""
STEP_CURVE = Curve(lambda m: np.clip(0.01 * ACTIVATIONS["squareplus"].evaluate(m), 0.001, 0.1))
"""dt of version 1."""
EXPONENTS = (0.001, 20.0)
"""Least and most -A of version 2."""


class MambaIntegerConversion(ABC):
    """What the two versions share: norm; in_proj; convolution; scans; gate; out_proj."""

    # Their matrices are ternary as they are.
    matrix_inputs: tuple[str, ...] = ()

    def projections(self, layer: Layer) -> list[tuple[nn.Linear, nn.Parameter | None]]:
        """See ``BlockConversion``."""
        return []

    def trace(self, record: Record, name: str, layer: Layer, residual: Tensor) -> Tensor:
        """See ``BlockConversion``."""

        def at(part: str, value: Tensor) -> Tensor:
            record(f"{name}.{part}", value)
            return value

        mixer, norm = layer.mixer, layer.norm
        assert isinstance(mixer, MambaIntegerMixer) and isinstance(norm, BitShiftNorm)
        c = mixer.config
        normed = record_bit_shift_norm(record, f"{name}.norm", residual, norm)
        u, z = mixer.in_proj(normed * (norm.weight * norm.step_size)).chunk(2, -1)
        weight = mixer.conv1d.weight[:, 0]
        index = at("x_index", causal_conv1d(at("x_in", u), weight, mixer.conv1d.bias, "identity"))
        values = at("x", activate(index, c.activation))
        self.trace_scans(record, name, mixer, values)
        y, _ = mixer.scan(values, None, None)
        gated = at("gated", at("y", y) * at("gate", activate(at("z", z), c.gate_activation)))
        out: Tensor = mixer.out_proj(gated) * mixer.res_gate
        return out

    def build(self, p: Pieces, name: str, layer: Layer, residual: str) -> str:
        """See ``BlockConversion``."""
        mixer, norm = layer.mixer, layer.norm
        assert isinstance(mixer, MambaIntegerMixer) and isinstance(norm, BitShiftNorm)
        m, E = mixer.config, mixer.config.d_inner
        at = f"{name}.{{}}".format
        projected = bit_linear(p, at("in_proj"), bit_shift_norm(p, at("norm"), residual, norm), mixer.in_proj)
        source = p.part(at("x_projected"), projected, 0, E)
        x = state_space.convolve(p, at("x"), source, *conv_parameters(mixer.conv1d), m.activation)
        y = self.build_scans(p, name, mixer, x)
        gated = state_space.gate(p, name, y, p.part(at("z_in"), projected, E, E), m.gate_activation)
        gated = requantized(p, at("gated"), gated, p.config.activation_limit)
        return bit_linear(p, at("out_proj"), gated, mixer.out_proj, float(mixer.res_gate.detach()))

    @abstractmethod
    def trace_scans(self, record: Record, name: str, mixer: MambaIntegerMixer, values: Tensor) -> None:
        """Record what :meth:`build_scans` makes, of the activated values [batch, T, d_inner]."""

    @abstractmethod
    def build_scans(self, p: Pieces, name: str, mixer: MambaIntegerMixer, x: str) -> str:
        """The nodes of C h."""


def requantized(p: Pieces, name: str, source: str, limit: int) -> str:
    """At the places that the observations of this name ask for."""
    b = p.graph
    return b.requantize(name, source, min(p.places(p.seen[name], limit), b.frac[source]), limit)


class MambaIntegerV1Conversion(MambaIntegerConversion):
    """For every entry of the state a scan, whose heads are the channels with decays of their own."""

    def trace_scans(self, record: Record, name: str, mixer: MambaIntegerMixer, values: Tensor) -> None:
        """See the base class."""
        assert isinstance(mixer, MambaIntegerV1Mixer)
        c = mixer.config
        r = mixer.x_proj(values)[..., : c.rank]
        m, B, C = mixer.parts(values)
        for part, value in (("r", r), ("B", B), ("C", C), ("step_index", m), ("dt", step_size(m))):
            record(f"{name}.{part}", value)
        record(f"{name}.scan_x", values * step_size(m))

    def build_scans(self, p: Pieces, name: str, mixer: MambaIntegerMixer, x: str) -> str:
        """See the base class."""
        assert isinstance(mixer, MambaIntegerV1Mixer)
        b, c, m = p.graph, p.config, mixer.config
        at = f"{name}.{{}}".format
        E, N, limit = m.d_inner, m.d_state, c.activation_limit
        low_rank = bit_linear(p, at("x_proj"), x, mixer.x_proj)
        parts, start = {}, 0
        for part, width in (("r", m.rank), ("B", N), ("C", N)):
            wide = p.part(at(f"{part}_projected"), low_rank, start, width)
            parts[part] = requantized(p, at(part), wide, limit)
            start += width
        modulation = bit_linear(p, at("dt_proj"), parts["r"], mixer.dt_proj)
        index = p.index(at("step_index"), modulation, c.index_bits, -MODULATION_LIMIT)
        dt_frac = p.places(p.seen[at("dt")], c.internal_limit)
        dt = p.curve(at("dt"), index, STEP_CURVE, dt_frac, c.internal_limit)
        product = b.add(at("scan_x_product"), "mul", x, dt, frac=b.frac[x] + dt_frac)
        scan_x = requantized(p, at("scan_x"), product, largest_integer(c.scan_bits))

        # n = clip(base + m, 0, 32000), at the places that the budget has for decays.
        coarse = min(MODULATION_PLACES, b.frac[modulation], b.max_bits - DECAY_BITS - 2)
        bound = MODULATION_LIMIT << coarse if coarse >= 0 else MODULATION_LIMIT >> -coarse
        m_int = b.shift(at("modulation_wide"), modulation, coarse)
        m_int = b.add(at("modulation"), "clamp", m_int, frac=coarse, low=-bound, high=bound, saturation=False)
        bits = min(c.decay_bits, DECAY_BITS)
        # Beyond these a base saturates whatever m is.
        bases = np.clip(array(mixer.base_decay_nums), -2.0 * MODULATION_LIMIT, 2.0**DECAY_BITS)
        total = ""
        for n in range(N):
            state = at(f"state{n}")
            number = b.add(
                f"{state}.decay_wide",
                "add",
                m_int,
                frac=coarse,
                constants={"value": rounded(bases[:, n], coarse)},
            )
            # In units of 2^-bits of one.
            number = b.add(
                f"{state}.decay_rounded", "shift", number, frac=bits, places=coarse + DECAY_BITS - bits
            )
            most = round(LARGEST_DECAY * 2.0 ** (bits - DECAY_BITS))
            number = b.add(f"{state}.decay", "clamp", number, frac=bits, low=0, high=most, saturation=False)
            # A state of the operation is made of pairs: this entry and one that stays zero.
            chosen = np.zeros((2, N), np.int64)
            chosen[0, n] = 1
            B, C = (
                b.add(f"{state}.{part}", "linear", source, frac=b.frac[source], constants={"weight": chosen})
                for part, source in (("B", parts["B"]), ("C", parts["C"]))
            )
            largest_G = float(p.seen[at("B")].channels[n] * p.seen[at("C")].channels[n])
            operands = (scan_x, B, C, number)
            y = state_space.convex_scan(p, name, state, operands, np.zeros(E), 1, largest_G)
            if total:
                y = b.shift(f"{state}.aligned", y, b.frac[total])
            total = b.add(f"{state}.sum", "add", total, y, frac=b.frac[y]) if total else y
        return total


class MambaIntegerV2Conversion(MambaIntegerConversion):
    """For every head a scan, with B and C divided by their lengths."""

    def trace_scans(self, record: Record, name: str, mixer: MambaIntegerMixer, values: Tensor) -> None:
        """See the base class."""
        assert isinstance(mixer, MambaIntegerV2Mixer)
        c = mixer.config
        dt, B, C = mixer.parts(values)
        record(f"{name}.step_index", dt)
        exponent = mixer.exponent(dt)
        heads = values.unflatten(-1, (c.n_heads, c.headdim))
        for h in range(c.n_heads):
            head = f"{name}.head{h}"
            u = exponent[..., h, None]
            record(f"{head}.decay_index", u.log())
            record(f"{head}.scan_x", heads[..., h, :] / -torch.expm1(-u))
            for part, value in (("B", B[..., h, :]), ("C", C[..., h, :])):
                record(f"{head}.{part}.source", value)
                record(f"{head}.{part}.square", value.square().mean(-1, keepdim=True))
                record(f"{head}.{part}", unit(value))

    def build_scans(self, p: Pieces, name: str, mixer: MambaIntegerMixer, x: str) -> str:
        """See the base class."""
        assert isinstance(mixer, MambaIntegerV2Mixer)
        b, m = p.graph, mixer.config
        at = f"{name}.{{}}".format
        H, P, N = m.n_heads, m.headdim, m.d_state
        projected = bit_linear(p, at("x_proj"), x, mixer.x_proj)
        # dt of all heads next to each other: one table for them.
        chosen = np.zeros((H, H * (1 + 2 * N)), np.int64)
        chosen[np.arange(H), np.arange(H) * (1 + 2 * N)] = 1
        dt = b.add(at("dt"), "linear", projected, frac=b.frac[projected], constants={"weight": chosen})
        indices = [at(f"head{h}.decay_index") for h in range(H)]
        log_dt = state_space.step_size(p, name, dt, log_step(0.01, 10.0), indices)
        rates = np.clip(-array(mixer.A_log), 0.01, 2.3)
        outputs = []
        for h in range(H):
            head = at(f"head{h}")
            start = h * (1 + 2 * N) + 1
            B = self._unit(p, f"{head}.B", p.part(f"{head}.B_projected", projected, start, N))
            C = self._unit(p, f"{head}.C", p.part(f"{head}.C_projected", projected, start + N, N))
            values = p.part(f"{head}.x", x, h * P, P)
            step = p.part(f"{head}.log_dt", log_dt, h, 1)
            operands = (values, state_space.even_state(p, B), state_space.even_state(p, C), step)
            # Vectors of length one have no larger product.
            outputs.append(
                state_space.scan(p, name, head, operands, rates[h : h + 1], P, 1.0, stepless=EXPONENTS)
            )
        return p.concat(at("scanned"), outputs)

    @staticmethod
    def _unit(p: Pieces, name: str, source: str) -> str:
        """v / (|v| + 1e-6), that is v over its root mean square and sqrt(N)."""
        b, c = p.graph, p.config
        N = b.types[source].shape[-1]
        seen = p.seen[f"{name}.source"]
        frac = min(places_for(seen.largest, c.internal_limit), b.frac[source])
        v = b.requantize(f"{name}_in", source, frac, c.internal_limit)
        eps = NORM_EPSILON**2 / N
        product = p.over_root_mean_square(name, v, eps, 1 / math.sqrt(N), np.zeros(N, np.int64))
        return requantized(p, name, product, c.activation_limit)
