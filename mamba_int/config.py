"""Configuration of the native model: its shape, its bit budget and its choices of form."""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass
from typing import Any, Literal, Self, TypeVar, get_args, get_origin, get_type_hints

from mamba_int.errors import MambaintError

C = TypeVar("C")
Task = Literal["classification", "language_model"]


def dataclass_from_dict(cls: type[C], values: dict[str, Any], source: str) -> C:
    """Build a flat dataclass from a dictionary, refusing unknown keys and wrong types.

    Args:
        cls: the dataclass.
        values: its fields; missing ones take their defaults.
        source: what to call the dictionary in an error, such as ``[model]``.

    Raises:
        MambaintError: naming the key, and the nearest valid one for an unknown key.
    """
    hints = get_type_hints(cls)
    for key, value in values.items():
        if key not in hints:
            near = difflib.get_close_matches(key, hints, n=1)
            remedy = f"did you mean '{near[0]}'?" if near else f"valid keys: {', '.join(hints)}"
            raise MambaintError(f"{source} has an unknown key '{key}'", remedy)
        hint = hints[key]
        if get_origin(hint) is Literal:
            choices = get_args(hint)
            if value not in choices:
                raise MambaintError(
                    f"{source} {key} = {value!r} is not possible",
                    f"choose one of {', '.join(map(str, choices))}",
                )
        elif hint is float and type(value) is int:
            continue
        elif isinstance(hint, type) and type(value) is not hint:
            raise MambaintError(
                f"{source} {key} = {value!r} has the wrong type", f"give a value of type {hint.__name__}"
            )
    return cls(**{key: float(v) if hints[key] is float else v for key, v in values.items()})


# Within these every shift is defined; whether the sums stay within 24 bits is for the graph to say.
_RANGES = {
    "seq_len": (1, 1 << 20),
    "n_features": (1, 1 << 16),
    "n_classes": (1, 1 << 16),
    "vocab_size": (1, 1 << 20),
    "d_model": (1, 1024),
    "n_layer": (1, 256),
    "headdim": (1, 1024),
    "d_state": (2, 256),
    "d_conv": (1, 16),
    "chunk_size": (1, 256),
    "input_low": (-127, 127),
    "input_high": (-127, 127),
    "input_frac": (0, 12),
    "dt_gain": (-8, 4),
    "residual_bits": (7, 15),
    "residual_frac": (0, 12),
    "norm_frac": (1, 7),
    "norm_shift": (0, 8),
    "norm_input_bits": (4, 11),
    "norm_per_octave": (1, 2),
    "activation_bits": (2, 7),
    "y_bits": (2, 12),
    "gate_bits": (2, 7),
    "conv_frac": (0, 10),
    "decay_bits": (4, 8),
    "A_bits": (4, 12),
    "A_u_bits": (4, 12),
    "G_bits": (4, 12),
    "G_headroom": (0, 8),
    "G_limit": (1, 4095),
    "M_bits": (4, 12),
    "u_bits": (4, 14),
    "beta_bits": (4, 11),
    "H_bits": (4, 12),
    "rotation_frac": (6, 12),
    "D_frac": (0, 7),
    "head_frac": (0, 10),
    "pool_bits": (2, 12),
    "quotient_bits": (8, 24),
}


@dataclass(frozen=True)
class MambaIntConfig:
    """Shape, forms and bit budget of a ``MambaInt`` model.

    Widths ending in ``_bits`` are magnitudes: ``|value| <= 2**bits``. ``*_frac`` are binary places: the
    real value of an integer v is ``v * 2**-frac``. Names follow the Mamba-2 paper (arXiv 2405.21060).

    Attributes:
        task: what the head predicts.
        seq_len: steps per sequence (classification), or the length exported and proved (language model).
        n_features: input channels per step (classification).
        n_classes: classes (classification).
        vocab_size: tokens (language model).
        input_low, input_high: smallest and largest integer of the input.
        input_frac: binary places of the input integers.
        d_model, n_layer, expand, headdim, d_state, d_conv, chunk_size: as in Mamba-2;
            ``chunk_size`` is Q of the integer scan.
        weights: form of the projections.
        input_weights: form of the input projection (classification).
        conv_bias: whether the convolutions have one.
        activation: after the convolution, on x.
        activate_BC: relu on B and C too, as Mamba-2 applies its activation.
        gate: ``hard_silu`` z*clamp(z+2,0,4)/4; ``algebraic`` (1 + z/(1+|z|))/2;
            ``hard_sigmoid`` clamp(z + 1/2, 0, 1) at ``gate_bits`` places, no requantization around it.
        rotation: form of the rotation of B and C: dyadic cos/sin ``table``, three ``shear`` steps, ``none``.
        G_bits, G_headroom, G_limit: the products C.B get a scale at which their worst case has
            G_bits + G_headroom bits, and saturate at G_limit; typical ones are far below the worst case.
        quotient_bits: scales of y are kept coarse enough for its quotients to be proven within this many
            bits: 13 keeps them inside the lookup table of 2^14 rows.
        pooling: how a classifier reads the sequence.
        pool_bits: scale of the pooled vector: 4 root mean squares have so many bits.
        final_norm: whether a norm precedes the head.
        arithmetic: ``integer``, or ``float`` for the twin: same shapes, no rounding, float weights.
        dt_gain: gain from the dt projection to the decay, a power of two exponent (0.25 is -2).
        decay_min, decay_max: 1 - decay of the heads at the start, log-spaced.
    """

    task: Task = "classification"
    seq_len: int = 8
    n_features: int = 8
    n_classes: int = 10
    vocab_size: int = 256
    input_low: int = 0
    input_high: int = 16
    input_frac: int = 3
    d_model: int = 32
    n_layer: int = 1
    expand: float = 2.0
    headdim: int = 16
    d_state: int = 16
    d_conv: int = 4
    conv_bias: bool = True
    activate_BC: bool = False
    chunk_size: int = 8
    weights: Literal["ternary", "int8"] = "ternary"
    input_weights: Literal["ternary", "int8"] = "int8"
    activation: Literal["relu", "squareplus"] = "relu"
    gate: Literal["hard_silu", "algebraic", "hard_sigmoid"] = "hard_silu"
    rotation: Literal["table", "shear", "none"] = "table"
    pooling: Literal["mean", "last"] = "mean"
    final_norm: bool = True
    arithmetic: Literal["integer", "float"] = "integer"
    dt_gain: int = -2
    decay_min: float = 0.05
    decay_max: float = 0.7
    residual_bits: int = 15
    residual_frac: int = 8
    norm_frac: int = 5
    norm_shift: int = 4
    norm_input_bits: int = 9
    norm_per_octave: int = 2
    activation_bits: int = 7
    y_bits: int = 7
    gate_bits: int = 7
    conv_frac: int = 6
    decay_bits: int = 8
    A_bits: int = 12
    A_u_bits: int = 10
    G_bits: int = 12
    G_headroom: int = 4
    G_limit: int = 4095
    M_bits: int = 8
    u_bits: int = 13
    beta_bits: int = 11
    H_bits: int = 11
    rotation_frac: int = 10
    D_frac: int = 6
    head_frac: int = 7
    pool_bits: int = 10
    quotient_bits: int = 24

    @property
    def d_inner(self) -> int:
        """Channels inside a block, expand * d_model."""
        return int(self.expand * self.d_model)

    @property
    def n_heads(self) -> int:
        """Heads of the scan, d_inner / headdim."""
        return self.d_inner // self.headdim

    @property
    def n_outputs(self) -> int:
        """Length of the logits: classes or vocabulary."""
        return self.n_classes if self.task == "classification" else self.vocab_size

    def __post_init__(self) -> None:
        def need(condition: bool, cause: str, remedy: str) -> None:
            if not condition:
                raise MambaintError(f"[model] {cause}", remedy)

        need(0 < self.expand <= 16, f"expand = {self.expand}", "choose a number up to 16")
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            need(low <= value <= high, f"{name} = {value}", f"choose {low} to {high}")
        need(self.d_inner >= 1, f"expand*d_model = {self.d_inner}", "choose a larger one")
        need(
            self.d_inner % self.headdim == 0,
            f"expand*d_model = {self.d_inner} is not a multiple of headdim = {self.headdim}",
            "choose a headdim that divides it",
        )
        need(
            self.d_state % 2 == 0,
            f"d_state = {self.d_state} is odd",
            "the rotation needs pairs: choose an even one",
        )
        need(
            self.input_low < self.input_high,
            f"inputs {self.input_low}..{self.input_high} are no range",
            "choose input_low < input_high",
        )
        need(
            self.decay_bits <= self.A_bits,
            f"A_bits = {self.A_bits} is below decay_bits = {self.decay_bits}",
            "choose decay_bits <= A_bits",
        )
        need(0.0 < self.decay_min <= self.decay_max < 1.0, "decay_min/decay_max", "choose 0 < min <= max < 1")

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON-able values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Inverse of :meth:`to_dict`; MambaintError on unknown keys, wrong types or impossible shapes."""
        return dataclass_from_dict(cls, values, "[model]")
