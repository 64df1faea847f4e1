"""The quaternion language model and its presets.

| preset | d_model, layers, d_state | expand | called in the source | there | here |
|---|---|---|---|---|---|
| small | 512, 8, 32 | 2 | 50 M | 2,201 M | 46 M |
| base | 768, 12, 64 | 2 | 150 M | 14,657 M | 143 M |
| large | 1024, 24, 64 | 1.5 | 350 M | 52,080 M | 334 M |

With a vocabulary of 10,000, embedding and head untied. Groups share B and C
(``mamba_int.float_models.quaternion``); the channels of ``large`` are 1.5 times d_model instead of twice.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Self

from mamba_int.errors import MambaintError
from mamba_int.float_models.config import MambaConfig
from mamba_int.float_models.models import MambaForCausalLM

_BASE = MambaConfig(
    mixer="quaternion",
    vocab_size=10000,
    d_model=768,
    n_layer=12,
    d_state=64,
    n_groups=2,
    tie_embeddings=False,
)
QUATERNION_PRESETS = {
    "small": replace(_BASE, d_model=512, n_layer=8, d_state=32),
    "base": _BASE,
    "large": replace(_BASE, d_model=1024, n_layer=24, expand=1.5),
}
"""Configurations by name."""


class QuaternionMamba2(MambaForCausalLM):
    """A language model of quaternion blocks: ``outputs["loss"]``, ``outputs["logits"]``, ``generate``.

    Its files are those of ``MambaForCausalLM``: the configuration says what the mixer is.

    Args:
        config: of the model; its mixer is one of those named ``quaternion``.
    """

    architecture = MambaForCausalLM.__name__

    def __init__(self, config: MambaConfig) -> None:
        if not config.mixer.startswith("quaternion"):
            raise MambaintError(f"[model] mixer = '{config.mixer}'", "choose quaternion, or MambaForCausalLM")
        super().__init__(config)

    @classmethod
    def from_preset(cls, name: str, **changes: Any) -> Self:
        """The model of a preset.

        Args:
            name: ``small``, ``base`` or ``large``.
            changes: fields of the configuration in place of the preset's, such as ``vocab_size``.
        """
        if name not in QUATERNION_PRESETS:
            raise MambaintError(f"there is no preset '{name}'", f"choose {', '.join(QUATERNION_PRESETS)}")
        return cls(replace(QUATERNION_PRESETS[name], **changes))
