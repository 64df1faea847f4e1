"""Which conversion a block takes, by its mixer."""

from __future__ import annotations

from mamba_int.errors import MambaintError
from quantize.blocks.block import BlockConversion
from quantize.blocks.mamba import MambaConversion
from quantize.blocks.mamba2 import Mamba2Conversion
from quantize.blocks.mamba_integer import MambaIntegerV1Conversion, MambaIntegerV2Conversion
from quantize.blocks.quaternion import QuaternionConversion

BLOCKS: dict[str, BlockConversion] = {
    "mamba": MambaConversion(),
    "mamba2": Mamba2Conversion(),
    **dict.fromkeys(
        ("quaternion", "quaternion_lite", "quaternion_full", "quaternion_full_lite"), QuaternionConversion()
    ),
    "mamba_integer_v1": MambaIntegerV1Conversion(),
    "mamba_integer_v2": MambaIntegerV2Conversion(),
}
"""Conversions by the name of the mixer."""


def block_conversion(mixer: str) -> BlockConversion:
    """The conversion of blocks with this mixer.

    Raises:
        MambaintError: if there is none.
    """
    if mixer not in BLOCKS:
        raise MambaintError(
            f"the mixer '{mixer}' has no integer form here",
            f"give a model whose mixer is {' or '.join(BLOCKS)}",
        )
    return BLOCKS[mixer]
