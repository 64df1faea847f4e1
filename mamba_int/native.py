"""The native model as an integer graph: one function makes the nodes, for training and for export alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import ceil, log2
from typing import Any, NamedTuple

import numpy as np

from mamba_int.config import MambaIntConfig
from mamba_int.errors import MambaintError
from mamba_int.graph import Node, TensorType
from mamba_int.operations import OPERATIONS

Constants = Callable[[str, int], Any]
"""Gives the integers of a constant, named ``node.constant``, at a number of binary places."""


MAX_FRAC = 12
"""Static scales have 0 to this many binary places."""
BIAS_LIMIT = 1 << 18
"""Largest magnitude of a bias, as an integer of its accumulator."""


@dataclass
class NativeNodes:
    """The nodes of a native model and what training needs to know about them.

    Attributes:
        nodes: in order.
        output: name of the logits.
        observed: static scale -> the tensor, before its shift, whose size sets it.
    """

    nodes: list[Node] = field(default_factory=list)
    output: str = ""
    observed: dict[str, str] = field(default_factory=dict)


def weight_names(config: MambaIntConfig) -> list[str]:
    """Projections that carry a power-of-two weight scale of their own."""
    layers = [f"layer{i}.{name}" for i in range(config.n_layer) for name in ("in_proj", "out_proj")]
    return (["embed"] if config.task == "classification" else []) + layers


def activation_names(config: MambaIntConfig) -> list[str]:
    """Activations that carry a static power-of-two scale, in a fixed order."""
    per_layer = []
    if requantizes_projection(config):
        per_layer.append("xBC_in")
    if config.gate != "hard_sigmoid":
        per_layer += ["z", "g", "v"]
    per_layer += ["x", "BC", "y"]
    names = [f"layer{i}.{name}" for i in range(config.n_layer) for name in per_layer]
    return names + (["pooled"] if pools(config) else [])


def requantizes_projection(config: MambaIntConfig) -> bool:
    """Whether x, B and C become int8 before the convolution.

    Ternary accumulators of up to 256 terms times int8 taps fit 24 bits as they are.
    """
    return config.weights == "int8" or config.d_model > 256


def pools(config: MambaIntConfig) -> bool:
    """Whether the head reads a requantized pooled vector."""
    return config.task == "classification" and (config.pooling == "mean" or not config.final_norm)


def pools_in_last_block(config: MambaIntConfig) -> bool:
    """Whether the sum over time is taken before the last out_proj, which is linear, instead of after it.

    So the last block's output is projected and rounded once, not once a step.
    """
    return config.task == "classification" and config.pooling == "mean" and not config.final_norm


def chunked(config: MambaIntConfig) -> bool:
    """Whether the scan carries a state from chunk to chunk."""
    return config.task == "language_model" or config.seq_len > config.chunk_size


def ssd_attributes(config: MambaIntConfig) -> dict[str, int]:
    """Shifts of the scan that depend on the bit budget alone (integer-training.md, section 1)."""
    lg = ceil(log2(config.d_state))
    M_shift = config.A_bits + config.G_bits - config.M_bits
    # A G and the half that its shift adds stay within 24 bits.
    G_limit = min(config.G_limit, ((1 << 24) - (1 << M_shift >> 1)) >> config.A_bits)
    return {
        "chunk_size": config.chunk_size,
        "headdim": config.headdim,
        "decay_bits": config.decay_bits,
        "A_bits": config.A_bits,
        "G_shift": max(0, 14 + lg - config.G_bits - config.G_headroom),
        "G_limit": G_limit,
        "M_shift": M_shift,
        "A_u_bits": min(config.A_u_bits, config.A_bits),
        "u_shift": config.H_bits + 6 + lg - config.u_bits,
        "beta_shift": config.A_bits + 8 - config.beta_bits,
        "H_align": config.A_bits + config.H_bits - config.beta_bits - 7,
        "rotation_frac": config.rotation_frac,
    }


class _Builder:
    def __init__(self, constants: Constants) -> None:
        self.constants = constants
        self.frac: dict[str, int] = {}
        self.result = NativeNodes()

    def add(
        self,
        name: str,
        op: str,
        *inputs: str,
        frac: int,
        constants: Mapping[str, int] | None = None,
        **attributes: Any,
    ) -> str:
        held = {key: self.constants(f"{name}.{key}", places) for key, places in (constants or {}).items()}
        self.result.nodes.append(Node(name, op, inputs, attributes, held, frac))
        self.frac[name] = frac
        return name

    def shift(self, name: str, source: str, frac: int) -> str:
        return self.add(name, "shift", source, frac=frac, places=self.frac[source] - frac)

    def saturate(self, name: str, source: str, bits: int) -> str:
        limit = (1 << bits) - 1
        return self.add(
            name, "clamp", source, frac=self.frac[source], low=-limit, high=limit, saturation=True
        )

    def requantize(self, name: str, source: str, frac: int, bits: int) -> str:
        """Shift to ``frac`` and saturate; ``name`` is the result, ``name``_wide before saturation."""
        self.result.observed[name] = source
        return self.saturate(name, self.shift(f"{name}_wide", source, frac), bits)

    def norm(self, name: str, source: str, config: MambaIntConfig) -> str:
        wide = self.add(
            f"{name}_wide",
            "norm",
            source,
            frac=config.norm_frac,
            input_shift=config.norm_shift,
            input_limit=(1 << config.norm_input_bits) - 1,
            # Enough for the largest sum of squares the input bits allow.
            octaves=config.norm_input_bits + 1,
            per_octave=config.norm_per_octave,
        )
        return self.saturate(name, wide, config.activation_bits)


def build_nodes(config: MambaIntConfig, fracs: Mapping[str, int], constants: Constants) -> NativeNodes:
    """The nodes of a native model.

    Args:
        config: the model.
        fracs: binary places of every scale in ``weight_names`` and ``activation_names``.
        constants: gives the integers of ``node.constant`` at a number of binary places: int64 arrays of a
            frozen model, or float tensors with gradients while training.
    """
    b = _Builder(constants)
    c = config
    if c.task == "classification":
        inputs = b.add(
            "input", "input", frac=c.input_frac, low=c.input_low, high=c.input_high, features=c.n_features
        )
        frac = c.input_frac + fracs["embed"]
        held = {"weight": fracs["embed"], "bias": frac}
        embedded = b.add("embed", "linear", inputs, frac=frac, constants=held)
        residual = b.saturate(
            "residual", b.shift("residual_wide", embedded, c.residual_frac), c.residual_bits
        )
    else:
        inputs = b.add("input", "input", frac=0, low=0, high=c.vocab_size - 1, features=0)
        held = {"table": c.residual_frac}
        residual = b.add("residual", "embedding", inputs, frac=c.residual_frac, constants=held)
    for i in range(c.n_layer):
        last = i == c.n_layer - 1
        residual = _block(b, c, fracs, f"layer{i}", residual, last and pools_in_last_block(c))
    _head(b, c, fracs, residual)
    return b.result


def _head(b: _Builder, c: MambaIntConfig, fracs: Mapping[str, int], residual: str) -> None:
    source = b.norm("final_norm", residual, c) if c.final_norm else residual
    if c.task == "classification" and not pools_in_last_block(c):
        source = b.add(
            "pool", "reduce", source, frac=b.frac[source], kind="sum" if c.pooling == "mean" else "last"
        )
    if pools(c):
        b.result.observed["pooled"] = source
        wide = b.shift("pooled_wide", source, fracs["pooled"])
        # The widest limit at which the head stays within 24 bits; a proven interval below it needs no clamp.
        limit = ((1 << 24) - BIAS_LIMIT) // (127 * c.d_model)
        source = b.add("pooled", "clamp", wide, frac=b.frac[wide], low=-limit, high=limit, saturation=True)
    frac = b.frac[source] + c.head_frac
    held = {"weight": c.head_frac, "bias": frac}
    b.result.output = b.add("logits", "linear", source, frac=frac, constants=held)


def _block(
    b: _Builder, c: MambaIntConfig, fracs: Mapping[str, int], layer: str, residual: str, pooled: bool
) -> str:
    """The nodes of one block; with ``pooled``, its result is the sum of the residual over time, ``pool``."""

    def at(name: str) -> str:
        return f"{layer}.{name}"

    E, N, bits = c.d_inner, c.d_state, c.activation_bits
    normed = b.norm(at("norm"), residual, c)
    fa = c.norm_frac + fracs[at("in_proj")]
    held = {"weight": fracs[at("in_proj")], "bias": fa}
    projected = b.add(at("in_proj"), "linear", normed, frac=fa, constants=held)

    def part(name: str, start: int, stop: int) -> str:
        return b.add(at(name), "slice", projected, frac=fa, start=start, stop=stop)

    z_in, dt = part("z_in", 0, E), part("dt", 2 * E + 2 * N, 2 * E + 2 * N + c.n_heads)
    x_in, BC_in = part("x_in", E, 2 * E), part("BC_in", 2 * E, 2 * E + 2 * N)
    if requantizes_projection(c):
        x_in = b.requantize(at("x_in_int8"), x_in, fracs[at("xBC_in")], bits)
        BC_in = b.requantize(at("BC_in_int8"), BC_in, fracs[at("xBC_in")], bits)
        b.result.observed[at("xBC_in")] = b.result.observed.pop(at("x_in_int8"))
        b.result.observed.pop(at("BC_in_int8"))

    conv_frac = b.frac[x_in] + c.conv_frac
    held = {"taps": c.conv_frac} | ({"bias": conv_frac} if c.conv_bias else {})
    x = b.add(at("conv_x"), "conv", x_in, frac=conv_frac, constants=held)
    x = _activation(b, c, fracs, layer, x)
    BC = b.add(at("conv_BC"), "conv", BC_in, frac=conv_frac, constants=held)
    if c.activate_BC:
        BC = _relu_requantize(b, at("BC"), BC, fracs[at("BC")], bits)
    else:
        BC = b.requantize(at("BC"), BC, fracs[at("BC")], bits)
    B = b.add(at("B"), "slice", BC, frac=b.frac[BC], start=0, stop=N)
    C = b.add(at("C"), "slice", BC, frac=b.frac[BC], start=N, stop=2 * N)

    places = fa - c.dt_gain - c.decay_bits
    decay = b.add(at("decay_wide"), "shift", dt, frac=c.decay_bits, places=places)
    top = (1 << c.decay_bits) - 1
    decay = b.add(at("decay"), "clamp", decay, frac=c.decay_bits, low=0, high=top, saturation=False)

    y = _scan(b, c, layer, x, B, C, decay)
    y = b.requantize(at("y"), y, fracs[at("y")], c.y_bits)
    v = _gate(b, c, fracs, layer, y, z_in)
    held = {"weight": fracs[at("out_proj")]}
    if pooled:
        v = _summed_over_time(b, c, layer, v)
        out = b.add(at("out_proj"), "linear", v, frac=b.frac[v] + fracs[at("out_proj")], constants=held)
        out = b.shift(at("out"), out, c.residual_frac)
        total = b.add("residual_sum", "reduce", residual, frac=c.residual_frac, kind="sum")
        return b.add("pool", "add", total, out, frac=c.residual_frac)
    out = b.add(at("out_proj"), "linear", v, frac=b.frac[v] + fracs[at("out_proj")], constants=held)
    out = b.shift(at("out"), out, c.residual_frac)
    total = b.add(at("residual_wide"), "add", residual, out, frac=c.residual_frac)
    return b.saturate(at("residual"), total, c.residual_bits)


def _summed_over_time(b: _Builder, c: MambaIntConfig, layer: str, v: str) -> str:
    """The sum of v over time, with as many places fewer as keep out_proj within 24 bits in the worst case."""
    total = b.add(f"{layer}.v_sum", "reduce", v, frac=b.frac[v], kind="sum")
    if c.gate == "hard_sigmoid":
        largest = ((1 << c.y_bits) - 1) << b.frac[f"{layer}.gate"]
    else:
        largest = (1 << c.activation_bits) - 1
    # One place of room for the rounding.
    places = max(0, (largest * c.seq_len * c.d_inner).bit_length() - 23)
    if not places:
        return total
    return b.add(f"{layer}.v_mean", "shift", total, frac=b.frac[v] - places, places=places)


def _activation(b: _Builder, c: MambaIntConfig, fracs: Mapping[str, int], layer: str, conv: str) -> str:
    name, frac, bits = f"{layer}.x", fracs[f"{layer}.x"], c.activation_bits
    if c.activation == "relu":
        return _relu_requantize(b, name, conv, frac, bits)
    b.result.observed[name] = conv
    wide = b.shift(f"{name}_wide", conv, frac)
    # squareplus (x + sqrt(x^2 + 4)) / 2 (Barron 2021, arXiv 2112.11687) with the exact integer root
    x = b.saturate(f"{name}_int8", wide, bits)
    square = b.add(f"{name}_square", "mul", x, x, frac=2 * frac)
    square = b.add(f"{name}_square4", "add", square, frac=2 * frac, constants={"value": 2 * frac})
    root = b.add(f"{name}_root", "isqrt", square, frac=frac)
    total = b.add(f"{name}_sum", "add", x, root, frac=frac + 1)
    return b.saturate(name, b.shift(f"{name}_half", total, frac), bits)


def _relu_requantize(b: _Builder, name: str, source: str, frac: int, bits: int) -> str:
    b.result.observed[name] = source
    wide = b.shift(f"{name}_wide", source, frac)
    return b.saturate(name, b.add(f"{name}_relu", "relu", wide, frac=frac), bits)


def _rotate(b: _Builder, c: MambaIntConfig, name: str, source: str) -> str:
    if c.rotation == "none":
        return source
    frac = c.rotation_frac
    table, shear = {"cos": frac, "sin": frac}, {"lam": frac, "gam": frac, "sign": 0}
    return b.add(
        name,
        "rotate",
        source,
        frac=b.frac[source],
        constants=table if c.rotation == "table" else shear,
        form=c.rotation,
        period=c.chunk_size,
        constant_frac=c.rotation_frac,
    )


class ScanFracs(NamedTuple):
    """Binary places inside the scan: of M, u (times A_u), D, and of the accumulator y."""

    M: int
    u: int
    D: int
    y: int


def scan_fracs(c: MambaIntConfig, f_x: int, f_B: int) -> ScanFracs:
    """Binary places of the three sums that meet in y, whose finest sets the scale.

    D is never finer than the other two need, so that aligning them stays within 24 bits.
    """
    s = ssd_attributes(c)
    f_M = s["A_bits"] + 2 * f_B - s["G_shift"] - s["M_shift"]
    f_H = f_B + f_x - s["beta_shift"] + s["H_align"]
    f_u = s["A_u_bits"] + f_H + f_B - s["u_shift"]
    finest = max(f_x + f_M, f_u) if chunked(c) else f_x + f_M
    f_D = max(0, min(c.D_frac, finest - f_x))
    return ScanFracs(f_M, f_u, f_D, max(finest, f_x + f_D))


def BC_frac_range(c: MambaIntConfig) -> tuple[int, int]:
    """Binary places of B and C for which the scan provably stays within 24 bits, whatever is learned.

    Raises:
        MambaintError: if there are none: the bit budget is too large for this shape.
    """
    # The alignments depend on f_B alone, so any f_x will do.
    allowed = [f_B for f_B in range(MAX_FRAC + 1) if _worst_scan(c, 5, f_B).peak <= 1 << 24]
    if not allowed:
        raise MambaintError(
            f"[model] the scan exceeds 24 bits at chunk_size = {c.chunk_size}, d_state = {c.d_state}",
            "lower H_bits, u_bits, A_bits or G_limit",
        )
    # The allowed values are consecutive: too few places align u to the left, too many D.
    return allowed[0], allowed[-1]


def largest_y_frac(c: MambaIntConfig, f_x: int, f_B: int) -> int:
    """Most binary places of y for which its quotient provably stays within ``quotient_bits``."""
    places = (_worst_scan(c, f_x, f_B).magnitude >> c.quotient_bits).bit_length()
    return scan_fracs(c, f_x, f_B).y - places


def _worst_scan(c: MambaIntConfig, f_x: int, f_B: int) -> TensorType:
    """Type of the scan's accumulator for the worst constants and inputs."""
    carried = chunked(c)
    rotated = ceil(2**0.5 * ((1 << c.activation_bits) - 1) + 1)
    x = TensorType((c.seq_len, c.d_inner), -(1 << c.activation_bits), 1 << c.activation_bits)
    B = TensorType((c.seq_len, c.d_state), -rotated, rotated, pair_norm=rotated)
    n = TensorType((c.seq_len, c.n_heads), 0, (1 << c.decay_bits) - 1)
    constants = {"D": np.full(c.n_heads, 127)}
    if carried:
        half = c.d_state // 2
        # Rounded cosines and sines may leave the unit circle by less than one unit.
        constants |= {"cos_Q": np.full(half, (1 << c.rotation_frac) + 1), "sin_Q": np.zeros(half, np.int64)}
    node = Node("ssd", "ssd", (), scan_attributes(c, f_x, f_B), constants)
    inputs = [x, B, B, n, B] if carried else [x, B, B, n]
    try:
        return OPERATIONS["ssd"].infer(node, inputs, c.seq_len)
    except ValueError:
        return TensorType(x.shape, -(1 << 62), 1 << 62)


def scan_attributes(c: MambaIntConfig, f_x: int, f_B: int) -> dict[str, int]:
    """All shifts of the scan, given the binary places of x and of B and C."""
    f = scan_fracs(c, f_x, f_B)
    return ssd_attributes(c) | {
        "M_align": f.y - f_x - f.M,
        "u_align": f.y - f.u if chunked(c) else 0,
        "D_align": f.y - f_x - f.D,
    }


def _scan(b: _Builder, c: MambaIntConfig, layer: str, x: str, B: str, C: str, decay: str) -> str:
    f = scan_fracs(c, b.frac[x], b.frac[B])
    inputs = [x, _rotate(b, c, f"{layer}.B_hat", B), _rotate(b, c, f"{layer}.C_hat", C), decay]
    held = {"D": f.D}
    if chunked(c):
        inputs.append(_rotate(b, c, f"{layer}.B_next", B))
        held |= {"cos_Q": c.rotation_frac, "sin_Q": c.rotation_frac}
    attributes = scan_attributes(c, b.frac[x], b.frac[B])
    return b.add(f"{layer}.ssd", "ssd", *inputs, frac=f.y, constants=held, **attributes)


def _gate(b: _Builder, c: MambaIntConfig, fracs: Mapping[str, int], layer: str, y: str, z_in: str) -> str:
    def at(name: str) -> str:
        return f"{layer}.{name}"

    if c.gate == "hard_sigmoid":
        # The offset of 1/2 is in the bias of in_proj. y * gate fits 24 bits in out_proj unshifted.
        frac = min(b.frac[z_in], c.gate_bits)
        gate = b.shift(at("gate_wide"), z_in, frac) if frac < b.frac[z_in] else z_in
        gate = b.add(at("gate"), "clamp", gate, frac=frac, low=0, high=1 << frac, saturation=False)
        return b.add(at("v"), "mul", y, gate, frac=b.frac[y] + frac)
    f_z, bits = fracs[at("z")], c.activation_bits
    z = b.requantize(at("z"), z_in, f_z, bits)
    if c.gate == "hard_silu":
        ramp = b.add(at("z_plus2"), "add", z, frac=f_z, constants={"value": f_z})
        ramp = b.add(at("ramp"), "clamp", ramp, frac=f_z + 2, low=0, high=4 << f_z, saturation=False)
        gate = b.add(at("g_acc"), "mul", z, ramp, frac=2 * f_z + 2)
    else:
        # (1 + z / (1 + |z|)) / 2 with 7 places, from floor((z << 7) / (1 + |z|))
        negative = b.add(at("minus_z"), "mul", z, frac=f_z, constants={"value": 0})
        negative = b.add(at("z_below"), "relu", negative, frac=f_z)
        magnitude = b.add(at("z_above"), "relu", z, frac=f_z)
        magnitude = b.add(at("z_abs"), "add", magnitude, negative, frac=f_z)
        divisor = b.add(at("divisor"), "add", magnitude, frac=f_z, constants={"value": f_z})
        dividend = b.add(at("dividend"), "shift", z, frac=f_z + 7, places=-7)
        ratio = b.add(at("ratio"), "div", dividend, divisor, frac=7)
        gate = b.add(at("g_acc"), "add", ratio, frac=8, constants={"value": 7})
    g = b.requantize(at("g"), gate, fracs[at("g")], bits)
    product = b.add(at("v_acc"), "mul", y, g, frac=b.frac[y] + b.frac[g])
    return b.requantize(at("v"), product, fracs[at("v")], bits)
