"""What selective state-space blocks have in common, as nodes: convolution, step size, scan, skip, gate.

h' = e^(dt A) h + dt B x becomes h' = a h + (1 - a) B x', the recurrence of ``ssd``, with x' = x dt / (1 - a):
a and dt |A| / (1 - a) are tables of one index, log(dt |A|); see ``quantize.fits.fit_decay``. B and C are not
rotated: B^ = B' = B, C^ = C.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from mamba_int.float_models.config import Activation
from quantize.fits import Curve, fit_decay, fit_table
from quantize.observations import Record
from quantize.pieces import LOWEST, SPREAD, Pieces
from quantize.scales import FloatArray, largest_integer, places_for, rounded
from quantize.scan_fit import ScanShape, fit_scan

LEAST_DECAY = 2.0**-60
"""Less than this of a state is lost in a step only where nothing enters it either."""


def convolve(
    p: Pieces, at: str, source: str, taps: FloatArray, bias: FloatArray, activation: Activation
) -> str:
    """The convolution and its activation: x, B or C.

    Args:
        at: name of the result. source: of the channels to convolve.
        taps: [channels, width]. bias: [channels].
    """
    b, c = p.graph, p.config
    limit = c.internal_limit
    frac = min(p.places(p.seen[f"{at}_in"], limit), b.frac[source])
    x = b.requantize(f"{at}_in", source, frac, limit)
    # Taps as fine as the budget of a sum of so many products allows.
    largest = min(limit, ((1 << (b.max_bits - 2)) // limit) // taps.shape[1])
    tap_frac = places_for(float(np.abs(taps).max()), largest)
    constants = {"taps": rounded(taps, tap_frac), "bias": rounded(bias, frac + tap_frac)}
    linear = b.add(f"{at}_conv", "conv", x, frac=frac + tap_frac, constants=constants)
    index = p.index(f"{at}_index", linear, c.index_bits, LOWEST)
    out = p.places(p.seen[at], c.activation_limit)
    return p.activation(at, index, activation, out, c.activation_limit)


def step_size(p: Pieces, layer: str, dt: str, curve: Curve, decay_indices: list[str]) -> str:
    """The logarithm of the step size, so fine that the index of a decay has its bits.

    Args:
        dt: the step size before its softplus. curve: see ``quantize.fits.log_step``.
        decay_indices: observations of log(dt |A|) of all scans that take this step size.
    """
    b, c = p.graph, p.config
    name = f"{layer}.log_dt"
    span = max(p.seen[index].high - p.seen[index].low for index in decay_indices)
    frac = math.floor(math.log2(((1 << c.decay_index_bits) - 2) / max(span + 0.5, 1.0)))
    t = p.index(f"{layer}.step_index", dt, c.decay_index_bits, -math.inf)
    tensor = b.types[t]
    fit = fit_table(curve, tensor.low, tensor.high, b.frac[t], frac, 1 << 14)
    p.tables[name] = fit
    return b.add(name, "table", t, frac=frac, constants={"values": fit.values}, low=fit.low)


def even_state(p: Pieces, source: str) -> str:
    """B or C with an entry more that is always zero, if they are odd: a state of ``ssd`` is made of pairs."""
    b = p.graph
    width = b.types[source].shape[-1]
    if width % 2 == 0:
        return source
    last = p.part(f"{source}_last", source, width - 1, 1)
    zero = b.add(f"{source}_zero", "mul", last, frac=b.frac[source], constants={"value": 0})
    return b.add(f"{source}_even", "concat", source, zero, frac=b.frac[source])


def scan(
    p: Pieces,
    layer: str,
    name: str,
    inputs: tuple[str, str, str, str],
    rates: FloatArray,
    headdim: int,
    largest_G: float,
) -> str:
    """C h of every step.

    Args:
        layer: whose y says how fine this must be. name: of the scan.
        inputs: x, B, C and the logarithm of the step size. rates: -A of every head.
        headdim: channels of a head.
        largest_G: magnitude of C . B that was seen.
    """
    b, c = p.graph, p.config
    at = f"{name}.{{}}".format
    x, B, C, log_dt = inputs
    # log(dt |A|) = log softplus(t) + log |A|
    seen, frac = p.seen[at("decay_index")], b.frac[log_dt]
    offset = np.broadcast_to(rounded(np.log(rates), frac), b.types[log_dt].shape[-1:])
    v = b.add(at("log_decay_wide"), "add", log_dt, frac=frac, constants={"value": offset})
    first, last = math.floor((seen.low - 0.2) * 2.0**frac), math.ceil((seen.high + 0.2) * 2.0**frac)
    v = b.saturate(at("log_decay"), v, first, last)
    p.stands_for(v, at("decay_index"))
    tensor = b.types[v]
    decays = fit_decay(tensor.low, tensor.high, frac, c.decay_bits, c.gain_bits)
    p.decays[at("decay")] = decays
    n = b.add(at("decay"), "table", v, frac=c.decay_bits, constants={"values": decays.decay}, low=decays.low)
    gain = b.add(
        at("gain"), "table", v, frac=decays.gain_frac, constants={"values": decays.gain}, low=decays.low
    )

    # x' = x g / |A|, every head times the power of two that brings it near the largest.
    seen = p.seen[at("scan_x")]
    heads = np.maximum(seen.channels.reshape(len(rates), -1).max(1), 2.0**-40)
    lifts = np.minimum(np.floor(np.log2(heads.max() / heads)), SPREAD)
    factors = np.exp2(lifts) / rates
    width = b.max_bits - 1 - b.types[x].magnitude.bit_length() - b.types[gain].magnitude.bit_length()
    factor_frac = places_for(float(factors.max()), (1 << min(width, 12)) - 1)
    whole, fine = rounded(factors, factor_frac), decays.gain_frac + factor_frac
    if headdim == 1:
        factor = b.add(at("factor"), "mul", gain, frac=fine, constants={"value": whole})
    else:
        columns = np.kron(np.diag(whole), np.ones((headdim, 1), np.int64))
        factor = b.add(at("factor"), "linear", gain, frac=fine, constants={"weight": columns})
    product = b.add(at("scan_x_product"), "mul", x, factor, frac=b.frac[x] + fine)
    limit = largest_integer(c.scan_bits)
    lifted = np.repeat(lifts, headdim)
    scan_frac = min(p.places(seen, limit, lifted), b.frac[product])
    scan_x = b.requantize(at("scan_x"), product, scan_frac, limit)
    p.stands_for(scan_x, at("scan_x"), np.exp2(lifted))

    G = math.ceil(2 * largest_G * 2.0 ** (b.frac[B] + b.frac[C])) + 1
    shape = ScanShape(
        x=b.types[scan_x],
        B=b.types[B],
        C=b.types[C],
        n=b.types[n],
        x_frac=b.frac[scan_x],
        B_frac=b.frac[B],
        C_frac=b.frac[C],
        headdim=headdim,
        chunk_size=c.chunk_size,
        decay_bits=c.decay_bits,
        A_bits=c.A_bits,
        largest_G=G,
        seq_len=c.seq_len,
        carried=p.carries_state,
        max_bits=b.max_bits,
    )
    fit = fit_scan(shape)
    operands = [scan_x, B, C, n, B] if p.carries_state else [scan_x, B, C, n]
    y = b.add(at("ssd"), "ssd", *operands, frac=fit.frac, constants=dict(fit.constants), **fit.attributes)
    # Every head keeps its lift until here; bring all to the largest.
    largest = int(lifts.max())
    limit = (1 << (c.internal_bits + largest)) - 1
    frac = min(p.places(p.seen[f"{layer}.y"], c.internal_limit) + 1, fit.frac)
    y = b.requantize(at("scanned"), y, frac, limit)
    if largest:
        aligned = {"value": 1 << (largest - lifted.astype(np.int64))}
        y = b.add(at("scanned_heads"), "mul", y, frac=frac + largest, constants=aligned)
    return y


def skip(p: Pieces, layer: str, scanned: str, x: str, D: FloatArray) -> str:
    """C h + D x."""
    b = p.graph
    frac = places_for(float(np.abs(D).max()), 1 << 10)
    product = b.add(
        f"{layer}.Dx_product", "mul", x, frac=b.frac[x] + frac, constants={"value": rounded(D, frac)}
    )
    product = b.shift(f"{layer}.Dx", product, b.frac[scanned])
    return b.add(f"{layer}.y_sum", "add", scanned, product, frac=b.frac[scanned])


def gate(p: Pieces, layer: str, y: str, z_in: str, activation: Activation) -> str:
    """y act(z)."""
    b, c = p.graph, p.config
    at = f"{layer}.{{}}".format
    y_frac = min(p.places(p.seen[at("y")], c.internal_limit), b.frac[y])
    y = b.requantize(at("y"), y, y_frac, c.internal_limit)
    p.stands_for(y, at("y"))
    z = p.index(at("z"), z_in, c.index_bits, LOWEST)
    gate_frac = p.places(p.seen[at("gate")], c.activation_limit)
    opened = p.activation(at("gate"), z, activation, gate_frac, c.activation_limit)
    return b.add(at("gated_product"), "mul", y, opened, frac=y_frac + gate_frac)


def record_gain(record: Record, name: str, step: Tensor, rates: Tensor) -> Tensor:
    """x' / x of h' = a h + (1 - a) B x', see ``quantize.fits.DecayFit``; records log(step rates)."""
    u = step * rates
    record(f"{name}.decay_index", u.clamp(min=LEAST_DECAY).log())
    # For small u the limit.
    return torch.where(u > 1e-6, u / -torch.expm1(-u), 1.0) / rates
