"""What the conversion of a block is: what to note of the float block, and its integer nodes."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from mamba_int.float_models.models import MambaBlock
from quantize.observations import Record
from quantize.pieces import Pieces


class BlockConversion(Protocol):
    """Converts the blocks of one mixer: norm and mixer, up to what is added to the residual stream.

    The forms are kept in pairs: what :meth:`build` asks of the observations, :meth:`trace` records, under
    names that begin with the layer's.
    """

    def trace(self, record: Record, name: str, layer: MambaBlock, residual: Tensor) -> Tensor:
        """The float block in eval mode.

        Args:
            record: told name and value of every tensor that :meth:`build` makes too.
            name: of the layer. layer: norm and mixer.
            residual: stream [batch, T, d_model].

        Returns:
            What is added to it.
        """
        ...

    def build(self, p: Pieces, name: str, layer: MambaBlock, residual: str) -> str:
        """The nodes of the block.

        Args:
            p: the graph so far. name: of the layer. layer: norm and mixer. residual: node of the stream.

        Returns:
            The node that is added to it, at any scale.
        """
        ...
