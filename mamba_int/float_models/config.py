"""Configuration of the float models, as a dataclass that JSON and TOML files round-trip through."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from mamba_int.config import dataclass_from_dict
from mamba_int.errors import MambaintError
from mamba_int.files import read_json, read_toml, write_bytes, write_json

Activation = Literal["silu", "gelu", "relu", "identity", "squareplus", "algebraic_sigmoid"]
"""As in ``triton_kernels.activation``, which needs torch and this module does not."""
ScanType = Literal["sequential", "chunked", "associative"]
Pooling = Literal["last", "mean", "max"]
NormKind = Literal["rms", "bit_shift", "none"]
FinalNorm = Literal["same", "layer"]
HeadKind = Literal["linear", "bit_linear"]

_RANGES = {
    "vocab_size": (1, 1 << 24),
    "pad_vocab_size_multiple": (1, 1 << 16),
    "n_features": (0, 1 << 20),
    "num_labels": (1, 1 << 20),
    "d_model": (1, 1 << 16),
    "n_layer": (1, 1024),
    "d_state": (1, 256),
    "d_conv": (1, 4),
    "dt_rank": (0, 1 << 16),
    "headdim": (1, 256),
    "n_groups": (1, 1 << 12),
    "norm_min_shift": (-16, 16),
    "norm_max_shift": (-16, 16),
}


@dataclass(frozen=True)
class MambaConfig:
    """Shape and forms of a float model. Names follow state-spaces' ``MambaConfig`` and HuggingFace's.

    Attributes:
        mixer: name in ``mamba_int.float_models.mixer.MIXERS``: ``mamba`` (S6, arXiv 2312.00752), ``mamba2``
            (SSD, arXiv 2405.21060), ``complex_mamba`` (complex diagonal states), ``quaternion`` (also
            ``_lite``, ``_full``, ``_full_lite``: quaternion states), ``mamba_integer_v1`` and
            ``mamba_integer_v2`` (ternary projections), or a registered one.
        vocab_size: tokens. pad_vocab_size_multiple: rows of the embedding are a multiple of this.
        n_features: channels of real inputs; 0 for token ids.
        d_model, n_layer, expand, d_state, d_conv: as in the papers; d_inner = expand d_model.
        dt_rank: rank of the step sizes (mamba, mamba_integer_v1); 0 for ceil(d_model / 16).
        headdim: of mamba2 and mamba_integer_v2, which have d_inner / headdim heads.
        n_groups: mamba2: B and C, which the heads share; those of mamba_integer_v2 have their own.
        activation: after the convolution. gate_activation: of the gate z.
        scan_type: how the recurrence is computed: one step after the other (``sequential``, also called
            linear), all chunks at once (``chunked``, on GPUs as Triton kernels), or ``associative``.
        conv_bias: of the convolution. bias: of in_proj and out_proj.
        D_has_hdim: mamba2: a skip weight for every channel rather than every head.
        norm_per_group: mamba2: the gated norm's mean is taken in each group rather than over all channels.
        BCdt_norm: mamba: norms without weights on B, C and dt (FalconMamba), of BCdt_norm_epsilon.
        dt_min, dt_max, dt_init_floor: initial step sizes, log-uniform and floored.
        dt_limit_low, dt_limit_high: mamba2: step sizes are clamped to these; 0 for no upper limit.
        A_min, A_max: mamba2: initial -A, uniform.
        selective_axis: quaternion: the input turns the axes of the states' rotations.
        norm: before blocks, ``rms``, ``bit_shift`` (by powers of two) or, of quaternion mixers, ``none``.
        final_norm: after the last block, ``same`` as before blocks or, of quaternion mixers, ``layer`` (with
            a bias, the mean taken off).
        norm_epsilon: added to mean squares (rms, layer).
        norm_min_shift, norm_max_shift: bit_shift divides by 2^norm_min_shift to 2^norm_max_shift.
        head: of the language model, ``linear`` or ``bit_linear`` (ternary).
        scale_logits: the language model's logits are divided by sqrt(d_model).
        residual_in_fp32: keep the residual stream in float32 under autocast.
        tie_embeddings: the head of the language model is the embedding.
        num_labels: classes. pooling: what a classifier reads of a sequence. dropout: of the pooled vector.
    """

    mixer: str = "mamba"
    vocab_size: int = 32000
    pad_vocab_size_multiple: int = 8
    n_features: int = 0
    d_model: int = 768
    n_layer: int = 12
    expand: float = 2.0
    d_state: int = 16
    d_conv: int = 4
    dt_rank: int = 0
    headdim: int = 64
    n_groups: int = 1
    activation: Activation = "silu"
    gate_activation: Activation = "silu"
    scan_type: ScanType = "chunked"
    conv_bias: bool = True
    bias: bool = False
    D_has_hdim: bool = False
    norm_per_group: bool = True
    BCdt_norm: bool = False
    BCdt_norm_epsilon: float = 1e-6
    dt_min: float = 1e-3
    dt_max: float = 0.1
    dt_init_floor: float = 1e-4
    dt_limit_low: float = 0.0
    dt_limit_high: float = 0.0
    A_min: float = 1.0
    A_max: float = 16.0
    selective_axis: bool = False
    norm: NormKind = "rms"
    final_norm: FinalNorm = "same"
    norm_epsilon: float = 1e-5
    norm_min_shift: int = -3
    norm_max_shift: int = 8
    head: HeadKind = "linear"
    scale_logits: bool = False
    residual_in_fp32: bool = True
    tie_embeddings: bool = True
    num_labels: int = 2
    pooling: Pooling = "last"
    dropout: float = 0.1

    @property
    def d_inner(self) -> int:
        """Channels inside a block, expand * d_model."""
        return int(self.expand * self.d_model)

    @property
    def n_heads(self) -> int:
        """Heads of mamba2 and mamba_integer_v2, d_inner / headdim."""
        return self.d_inner // self.headdim

    @property
    def rank(self) -> int:
        """dt_rank, or its default."""
        return self.dt_rank or math.ceil(self.d_model / 16)

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding."""
        return math.ceil(self.vocab_size / self.pad_vocab_size_multiple) * self.pad_vocab_size_multiple

    def __post_init__(self) -> None:
        def need(condition: bool, cause: str, remedy: str) -> None:
            if not condition:
                raise MambaintError(f"[model] {cause}", remedy)

        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            need(low <= value <= high, f"{name} = {value}", f"choose {low} to {high}")
        need(0 < self.expand <= 64, f"expand = {self.expand}", "choose a number up to 64")
        need(self.d_inner >= 1, f"expand*d_model = {self.d_inner}", "choose a larger one")
        if self.mixer in ("mamba2", "mamba_integer_v2"):
            need(
                self.d_inner % self.headdim == 0,
                f"expand*d_model = {self.d_inner} is not a multiple of headdim = {self.headdim}",
                "choose a headdim that divides it",
            )
        if self.mixer == "mamba2":
            need(
                self.n_heads % self.n_groups == 0,
                f"{self.n_heads} heads cannot share {self.n_groups} groups",
                "choose n_groups that divides d_inner / headdim",
            )
        if self.mixer in ("quaternion", "quaternion_lite"):
            need(
                self.d_inner % self.n_groups == 0,
                f"expand*d_model = {self.d_inner} is not a multiple of n_groups = {self.n_groups}",
                "choose n_groups that divides it",
            )
        if self.selective_axis:
            need(self.mixer == "quaternion", f"selective_axis with mixer = '{self.mixer}'", "set it to false")
        if not self.mixer.startswith("quaternion"):
            need(
                self.norm != "none" and self.final_norm == "same",
                f"norm = '{self.norm}', final_norm = '{self.final_norm}' with mixer = '{self.mixer}'",
                "only quaternion mixers have 'none' and 'layer'",
            )
        need(
            self.norm != "none" or self.final_norm == "layer",
            "norm = 'none' with final_norm = 'same'",
            "set final_norm to 'layer'",
        )
        need(0 < self.dt_min <= self.dt_max, "dt_min/dt_max", "choose 0 < dt_min <= dt_max")
        need(self.dt_init_floor > 0, f"dt_init_floor = {self.dt_init_floor}", "choose a positive one")
        need(
            self.dt_limit_low >= 0 and (self.dt_limit_high == 0 or self.dt_limit_low < self.dt_limit_high),
            "dt_limit_low/dt_limit_high",
            "choose 0 <= low < high, or high = 0 for none",
        )
        need(0 < self.A_min <= self.A_max, "A_min/A_max", "choose 0 < A_min <= A_max")
        need(
            self.norm_min_shift <= self.norm_max_shift,
            "norm_min_shift exceeds norm_max_shift",
            "choose norm_min_shift <= norm_max_shift",
        )
        need(self.norm_epsilon > 0, f"norm_epsilon = {self.norm_epsilon}", "choose a positive one")
        need(self.BCdt_norm_epsilon > 0, "BCdt_norm_epsilon", "choose a positive one")
        need(0 <= self.dropout < 1, f"dropout = {self.dropout}", "choose 0 up to, not including, 1")

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON-able values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str = "[model]") -> Self:
        """Inverse of :meth:`to_dict`; MambaintError on unknown keys, wrong types or impossible shapes."""
        return dataclass_from_dict(cls, values, source)

    def save(self, path: Path) -> None:
        """Write to ``path``, as TOML with one table ``[model]`` if it ends in .toml, otherwise as JSON."""
        if path.suffix == ".toml":
            lines = (f"{name} = {_toml(value)}" for name, value in self.to_dict().items())
            write_bytes(path, "\n".join(["[model]", *lines, ""]).encode())
        else:
            write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what :meth:`save` wrote.

        Raises:
            MambaintError: if the file cannot be read, or is no such configuration.
        """
        if path.suffix == ".toml":
            values = read_toml(path).get("model")
            source = f"{path} [model]"
        else:
            values, source = read_json(path), str(path)
        if not isinstance(values, dict):
            raise MambaintError(f"{source} is no table of settings", "give a configuration of a float model")
        return cls.from_dict(values, source)


def _toml(value: str | bool | int | float) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    # JSON's numbers and quoted strings are TOML's.
    return json.dumps(value)
