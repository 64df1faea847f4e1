"""Post-training quantization: checkpoints to integer graphs.

>>> from quantize import quantize
>>> model = quantize("runs/digits-mamba2")  # doctest: +SKIP
>>> model.run(images)  # doctest: +SKIP
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quantize.integer_model import InputProof, IntegerModel, quantize

__all__ = ["InputProof", "IntegerModel", "quantize"]


def __getattr__(name: str) -> Any:
    # Imported late: the commands' help and the verifier need no PyTorch.
    if name not in __all__:
        raise AttributeError(f"module 'quantize' has no attribute {name!r}")
    from quantize import integer_model

    return getattr(integer_model, name)
