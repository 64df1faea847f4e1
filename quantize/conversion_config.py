"""What a converted model is made with: the format of its inputs, and its bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mamba_int.errors import MambaintError
from quantize.scales import Method, largest_integer

WeightForm = Literal["int8", "ternary"]
Target = Literal["runtime", "circuit"]
AUTOMATIC = -1


@dataclass(frozen=True)
class InputFormat:
    """Integers that stand for a model's real inputs: reals are integer * 2**-frac.

    Attributes:
        low, high: range of the integers. frac: their binary places.
    """

    low: int
    high: int
    frac: int = 0

    def __post_init__(self) -> None:
        if not -(1 << 15) <= self.low < self.high <= 1 << 15 or not 0 <= self.frac <= 24:
            raise MambaintError(
                f"inputs of {self.low}..{self.high} with {self.frac} binary places",
                "choose low < high inside 16 bits and 0 to 24 places",
            )


@dataclass(frozen=True)
class ConversionConfig:
    """Bits of a converted model. All counts include the sign.

    Attributes:
        seq_len: steps that the graph is exported and proved at; 0 for those of the calibration data.
        weights: of the projections, in_proj, x_proj and out_proj: ``ternary`` with a scale for every row, or
            ``int8`` like all other matrices.
        reconstruct: choose the integers of matrices by their outputs on the calibration data; see
            ``quantize.reconstruction``.
        weight_bits: of int8 matrices, with a power-of-two scale for every row.
        activation_bits: of what matrices and the scan's B and C are multiplied with.
        internal_bits: of what is only multiplied elementwise: inputs of convolutions, y and its gating.
        residual_bits: of the residual stream.
        norm_bits: of a norm's sum of squares once it is bounded, which in a circuit a lookup must hold.
        target: where the model is to be cheap: a runtime gathers from tables, in a circuit every element pays
            for every entry of a table, and for every line.
        pieces: straight lines that activations, step sizes, decays and gains are made of, 0 for tables, or
            ``AUTOMATIC``: the cheapest form at the target that is near enough; see ``quantize.forms``.
        error_steps: near enough for an activation, in units of its last place beyond the error of a table.
        step_error: near enough for decay and gain: relative error of the step size they amount to.
        index_bits: of the index of an activation. decay_index_bits: of the indices of step size and decay.
        decay_bits, A_bits: of a decay and of products of decays; see ``mamba_int.operations.ssd``.
        M_bits: of the products of decays and C . B, which a circuit looks up.
        scan_bits: of x in the scan. gain_bits: of dt / (1 - a).
        chunk_size: steps of a chunk of the scan.
        max_bits: no intermediate exceeds 2**max_bits; 29 is what ONNX Runtime computes in int32, 24 what
            float32 holds.
        scales: how an activation's scale is found; see ``quantize.scales.activation_places``.
        percentile: share of magnitudes that must not saturate, if ``scales`` is ``percentile``.
    """

    seq_len: int = 0
    weights: WeightForm = "int8"
    reconstruct: bool = False
    weight_bits: int = 8
    activation_bits: int = 8
    internal_bits: int = 14
    residual_bits: int = 15
    norm_bits: int = 29
    index_bits: int = 10
    target: Target = "runtime"
    pieces: int = AUTOMATIC
    error_steps: float = 1.0
    step_error: float = 0.125
    decay_index_bits: int = 10
    decay_bits: int = 12
    A_bits: int = 16
    M_bits: int = 24
    scan_bits: int = 10
    gain_bits: int = 9
    chunk_size: int = 16
    max_bits: int = 29
    scales: Method = "mse"
    percentile: float = 0.9999

    def __post_init__(self) -> None:
        ranges = {
            "weight_bits": (2, 12),
            "activation_bits": (3, 12),
            "internal_bits": (4, 16),
            "residual_bits": (6, 20),
            "norm_bits": (8, 40),
            "index_bits": (4, 10),
            "pieces": (AUTOMATIC, 64),
            "decay_index_bits": (4, 10),
            "decay_bits": (2, 20),
            "A_bits": (self.decay_bits, 24),
            "M_bits": (4, 24),
            "scan_bits": (3, 16),
            "gain_bits": (3, 16),
            "chunk_size": (1, 256),
            "max_bits": (16, 53),
        }
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise MambaintError(f"[conversion] {name} = {value}", f"choose {low} to {high}")
        if self.weights not in ("int8", "ternary"):
            raise MambaintError(f"[conversion] weights = {self.weights!r}", "choose int8 or ternary")
        if self.scales not in ("mse", "percentile", "minmax"):
            raise MambaintError(f"[conversion] scales = {self.scales!r}", "choose mse, percentile or minmax")
        if self.target not in ("runtime", "circuit"):
            raise MambaintError(f"[conversion] target = {self.target!r}", "choose runtime or circuit")
        for name, largest in (("error_steps", 64), ("step_error", 4)):
            number = getattr(self, name)
            if not 0 < number <= largest:
                raise MambaintError(
                    f"[conversion] {name} = {number}", f"choose more than 0, at most {largest}"
                )
        if not 0.5 < self.percentile <= 1:
            raise MambaintError(f"[conversion] percentile = {self.percentile}", "choose 0.5 to 1")

    @property
    def activation_limit(self) -> int:
        """Largest magnitude of an activation."""
        return largest_integer(self.activation_bits)

    @property
    def internal_limit(self) -> int:
        """Largest magnitude of what is multiplied elementwise."""
        return largest_integer(self.internal_bits)

    @property
    def residual_limit(self) -> int:
        """Largest magnitude of the residual stream."""
        return largest_integer(self.residual_bits)


PROVABLE = ConversionConfig(
    internal_bits=12,
    residual_bits=12,
    norm_bits=16,
    index_bits=8,
    target="circuit",
    decay_index_bits=8,
    decay_bits=12,
    A_bits=12,
    M_bits=13,
    scan_bits=8,
    gain_bits=9,
    max_bits=24,
)
"""For small circuits: all within 24 bits, curves of straight lines."""
