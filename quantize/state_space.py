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
from quantize.fits import Curve
from quantize.graph_builder import exceeded
from quantize.observations import Record
from quantize.pieces import SPREAD, Pieces, lowest
from quantize.scales import FloatArray, largest_integer, places_for, rounded
from quantize.scan_fit import ScanShape, fit_scan

FACTOR_BITS = 12
"""Of what x is multiplied with to become x'."""
LOOKUP_BITS = 13
"""Of the result of a scan in a circuit: the table of 2^16 rows holds twice that above the lowest."""
D_BITS, LEAST_D_BITS = 10, 6
"""Of the largest skip weight, if the budget allows, and at least."""
LEAST_TAP = 7
"""The largest tap of a convolution must be at least this: four bits, its sign included."""
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
    if c.target == "circuit":
        # A shift by many places costs another lookup.
        largest = min(largest, largest_integer(c.weight_bits))
    if largest < LEAST_TAP:
        raise exceeded(f"{at}_conv", "conv", LEAST_TAP * limit * taps.shape[1] * 4, b.max_bits)
    tap_frac = places_for(float(np.abs(taps).max()), largest)
    if bias.any():
        # What was seen may be so small that its bias, at its places, exceeds the budget.
        finest = math.floor(math.log2((1 << (b.max_bits - 2)) / float(np.abs(bias).max())))
        tap_frac = min(tap_frac, finest - frac)
    constants = {"taps": rounded(taps, tap_frac), "bias": rounded(bias, frac + tap_frac)}
    linear = b.add(f"{at}_conv", "conv", x, frac=frac + tap_frac, constants=constants)
    index = p.index(f"{at}_index", linear, c.index_bits, lowest(activation))
    out = p.places(p.seen[at], c.activation_limit)
    return p.activation(at, index, activation, out, c.activation_limit)


def step_size(p: Pieces, layer: str, dt: str, curve: Curve, decay_indices: list[str]) -> str:
    """The logarithm of the step size, so fine that the index of a decay has its bits.

    Args:
        dt: the step size before its softplus. curve: see ``quantize.fits.log_step``.
        decay_indices: observations of log(dt |A|) of all scans that take this step size.
    """
    c = p.config
    span = max(p.seen[index].high - p.seen[index].low for index in decay_indices)
    frac = math.floor(math.log2(((1 << c.decay_index_bits) - 2) / max(span + 0.5, 1.0)))
    t = p.index(f"{layer}.step_index", dt, c.decay_index_bits, -math.inf)
    return p.curve(f"{layer}.log_dt", t, curve, frac, 1 << 14)


def even_state(p: Pieces, source: str) -> str:
    """B or C with an entry more that is always zero, if they are odd: a state of ``ssd`` is made of pairs."""
    b = p.graph
    width = b.types[source].shape[-1]
    if width % 2 == 0:
        return source
    last = p.part(f"{source}_last", source, width - 1, 1)
    zero = p.zero(f"{source}_zero", last)
    return b.add(f"{source}_even", "concat", source, zero, frac=b.frac[source])


def scan(
    p: Pieces,
    layer: str,
    name: str,
    inputs: tuple[str, str, str, str],
    rates: FloatArray,
    headdim: int,
    largest_G: float,
    stepless: tuple[float, float] | None = None,
) -> str:
    """C h of every step.

    Args:
        layer: whose y says how fine this must be. name: of the scan.
        inputs: x, B, C and the logarithm of the step size. rates: -A of every head.
        headdim: channels of a head.
        largest_G: magnitude of C . B that was seen.
        stepless: the step size decides the decay alone, h' = e^(dt A) h + B x, and dt |A| is within these.
    """
    b, c = p.graph, p.config
    at = f"{name}.{{}}".format
    x, B, C, log_dt = inputs
    # log(dt |A|) = log softplus(t) + log |A|
    seen, frac = p.seen[at("decay_index")], b.frac[log_dt]
    offset = np.broadcast_to(rounded(np.log(rates), frac), b.types[log_dt].shape[-1:])
    v = b.add(at("log_decay_wide"), "add", log_dt, frac=frac, constants={"value": offset})
    first, last = math.floor((seen.low - 0.2) * 2.0**frac), math.ceil((seen.high + 0.2) * 2.0**frac)
    if stepless is not None:
        least, most = (round(math.log(end) * 2.0**frac) for end in stepless)
        first, last = max(first, least), min(last, most)
    v = b.saturate(at("log_decay"), v, first, last)
    p.stands_for(v, at("decay_index"))
    n, gain = p.decay_and_gain(name, v, stepless is not None)

    # x' = x g / |A|, every head times the power of two that brings it near the largest.
    seen = p.seen[at("scan_x")]
    heads = np.maximum(seen.channels.reshape(len(rates), -1).max(1), 2.0**-40)
    lifts = np.minimum(np.floor(np.log2(heads.max() / heads)), SPREAD)
    factors = np.exp2(lifts) / (np.ones_like(rates) if stepless else rates)
    width = b.max_bits - 1 - b.types[x].magnitude.bit_length() - b.types[gain].magnitude.bit_length()
    factor_frac = places_for(float(factors.max()), (1 << min(width, 12)) - 1)
    whole, fine = rounded(factors, factor_frac), b.frac[gain] + factor_frac
    if headdim == 1:
        factor = b.add(at("factor"), "mul", gain, frac=fine, constants={"value": whole})
    else:
        # Heads are few: one more rounding of theirs spares that of the channels places.
        factor = b.add(at("factor_wide"), "mul", gain, frac=fine, constants={"value": whole})
        fine -= max(0, b.types[factor].magnitude.bit_length() - FACTOR_BITS)
        factor = b.shift(at("factor_heads"), factor, fine)
        columns = np.kron(np.eye(len(rates), dtype=np.int64), np.ones((headdim, 1), np.int64))
        factor = b.add(at("factor"), "linear", factor, frac=fine, constants={"weight": columns})
    product = b.add(at("scan_x_product"), "mul", x, factor, frac=b.frac[x] + fine)
    # Without a step size x' = x / (1 - a) has the range of the decays as well.
    limit = c.internal_limit if stepless else largest_integer(c.scan_bits)
    lifted = np.repeat(lifts, headdim)
    scan_frac = min(p.places(seen, limit, lifted), b.frac[product])
    scan_x = b.requantize(at("scan_x"), product, scan_frac, limit)
    p.stands_for(scan_x, at("scan_x"), np.exp2(lifted))
    return convex_scan(p, layer, name, (scan_x, B, C, n), lifted, headdim, largest_G)


def convex_scan(
    p: Pieces,
    layer: str,
    name: str,
    inputs: tuple[str, str, str, str],
    lifted: FloatArray,
    headdim: int,
    largest_G: float,
) -> str:
    """C h of every step, with h' = a h + (1 - a) B x' and a = n / 2^k.

    Args:
        layer: whose y says how fine this must be. name: of the scan.
        inputs: x', B, C and n, of which n has k places.
        lifted: by how many places each channel of x' is larger, whole numbers.
        headdim: channels of a head.
        largest_G: magnitude of C . B that was seen.
    """
    b, c = p.graph, p.config
    at = f"{name}.{{}}".format
    scan_x, B, C, n = inputs
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
        decay_bits=b.frac[n],
        A_bits=c.A_bits,
        M_bits=c.M_bits,
        largest_G=G,
        seq_len=c.seq_len,
        carried=p.carries_state,
        max_bits=b.max_bits,
    )
    fit = fit_scan(at("ssd"), shape)
    operands = [scan_x, B, C, n, B] if p.carries_state else [scan_x, B, C, n]
    y = b.add(at("ssd"), "ssd", *operands, frac=fit.frac, constants=dict(fit.constants), **fit.attributes)
    # Every head keeps its lift until here; bring all to the largest.
    largest = int(lifted.max())
    bits, frac = c.internal_bits + largest, p.places(p.seen[f"{layer}.y"], c.internal_limit) + 1
    if c.target == "circuit":
        frac -= max(0, bits - LOOKUP_BITS)
        bits = min(bits, LOOKUP_BITS)
    limit, frac = (1 << bits) - 1, min(frac, fit.frac)
    y = b.requantize(at("scanned"), y, frac, limit)
    if largest:
        aligned = {"value": 1 << (largest - lifted.astype(np.int64))}
        y = b.add(at("scanned_heads"), "mul", y, frac=frac + largest, constants=aligned)
    return y


def skip(p: Pieces, layer: str, scanned: str, x: str, D: FloatArray) -> str:
    """C h + D x."""
    b, limit = p.graph, p.config.activation_limit
    largest = float(np.abs(D).max())
    finest, coarsest = places_for(largest, 1 << D_BITS), places_for(largest, 1 << LEAST_D_BITS)

    def summed(places: int) -> tuple[int, int]:
        """Places of the sum if neither part is rounded, and its magnitude."""
        own = b.frac[x] + places
        frac = max(own, b.frac[scanned])
        skipped = int(np.abs(rounded(D, places)).max()) * b.types[x].magnitude
        return frac, (b.types[scanned].magnitude << (frac - b.frac[scanned])) + (skipped << (frac - own))

    # Best is a sum that is rounded once, after the gate; then one that is rounded before.
    fine = range(finest, coarsest - 1, -1)
    fits = [places for places in fine if summed(places)[1] * limit < 1 << (b.max_bits - 1)]
    places = fits[0] if fits else finest
    frac, reach = summed(places)
    if reach >= 1 << (b.max_bits - 1):
        frac = b.frac[scanned]
    held = {"value": rounded(D, places)}
    product = b.add(f"{layer}.Dx_product", "mul", x, frac=b.frac[x] + places, constants=held)
    scanned = b.shift(f"{layer}.scanned_aligned", scanned, frac)
    product = b.shift(f"{layer}.Dx", product, frac)
    return b.add(f"{layer}.y_sum", "add", scanned, product, frac=frac)


def gate(p: Pieces, layer: str, y: str, z_in: str, activation: Activation) -> str:
    """y act(z)."""
    b, c = p.graph, p.config
    at = f"{layer}.{{}}".format
    if b.types[y].magnitude * c.activation_limit >= 1 << (b.max_bits - 1):
        y_frac = min(p.places(p.seen[at("y")], c.internal_limit), b.frac[y])
        y = b.requantize(at("y"), y, y_frac, c.internal_limit)
    p.stands_for(y, at("y"))
    z = p.index(at("z"), z_in, c.index_bits, lowest(activation))
    gate_frac = p.places(p.seen[at("gate")], c.activation_limit)
    opened = p.activation(at("gate"), z, activation, gate_frac, c.activation_limit)
    return b.add(at("gated_product"), "mul", y, opened, frac=b.frac[y] + gate_frac)


def record_gain(record: Record, name: str, step: Tensor, rates: Tensor) -> Tensor:
    """x' / x of h' = a h + (1 - a) B x', see ``quantize.fits.DecayFit``; records log(step rates)."""
    u = step * rates
    record(f"{name}.decay_index", u.clamp(min=LEAST_DECAY).log())
    # For small u the limit.
    return torch.where(u > 1e-6, u / -torch.expm1(-u), 1.0) / rates
