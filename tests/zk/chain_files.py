"""Files of chains whole in memory, where tests alter them; the product reads and writes them in pieces."""

from __future__ import annotations

import io
from dataclasses import dataclass

from zk.chain_proof import ChainHeader, Stages, encoded, read_chain


@dataclass(frozen=True)
class ChainProof(ChainHeader):
    """Content of a chain's proof file, whole.

    Attributes:
        segments: in order.
    """

    segments: tuple[Stages, ...]

    def encode(self) -> bytes:
        """The bytes of the file."""
        return b"".join(encoded(self, self.segments))


def decode_chain_proof(raw: bytes) -> ChainProof:
    """The file whole; see :func:`zk.chain_proof.read_chain`."""
    header, segments = read_chain(io.BytesIO(raw))
    return ChainProof(**vars(header), segments=tuple(segments))
