"""What the conversion of a block is: what to note of the float block, and its integer nodes."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from quantize.blocks.entrance import Layer
from quantize.observations import Record
from quantize.pieces import Pieces


class BlockConversion(Protocol):
    """Converts the blocks of one mixer: norm and mixer, up to what is added to the residual stream.

    The forms are kept in pairs: what :meth:`build` asks of the observations, :meth:`trace` records, under
    names that begin with the layer's.

    Attributes:
        matrix_inputs: names, without the layer's, of the traced tensors that matrices read.
    """

    matrix_inputs: tuple[str, ...]

    def trace(self, record: Record, name: str, layer: Layer, residual: Tensor) -> Tensor:
        """The float block in eval mode.

        Args:
            record: told name and value of every tensor that :meth:`build` makes too.
            name: of the layer. layer: norm and mixer.
            residual: stream [batch, T, d_model].

        Returns:
            What is added to it.
        """
        ...

    def projections(self, layer: Layer) -> list[tuple[nn.Linear, nn.Parameter | None]]:
        """The matrices that are ternary where ``ConversionConfig.weights`` is, each with the weight of the
        norm that it alone reads, if there is one."""
        ...

    def build(self, p: Pieces, name: str, layer: Layer, residual: str) -> str:
        """The nodes of the block.

        Args:
            p: the graph so far. name: of the layer. layer: norm and mixer. residual: node of the stream.

        Returns:
            The node that is added to it, at any scale.
        """
        ...
