"""halo2's SRS file, and the few bytes of it that a verifier needs.

The file is ``u32 little-endian k | 2^k points s^i·G | 2^k Lagrange points | G2, s·G2``, points of 64
bytes uncompressed, the tail 256 bytes. Verifying reads only the first point of each list and the tail:
the *verifying SRS* is the same file with k = 0, 388 bytes, and travels in the verifier package.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

SrsKind = Literal["development", "ceremony"]
"""Who knew the secret: this machine, or nobody if one participant of the ceremony was honest."""

KINDS: tuple[str, ...] = get_args(SrsKind)

POINT_BYTES = 64
TAIL_BYTES = 256
VERIFYING_BYTES = 4 + 2 * POINT_BYTES + TAIL_BYTES


def srs_bytes(logrows: int) -> int:
    """Size in bytes of the SRS file for 2^logrows rows."""
    return 4 + ((2 * POINT_BYTES) << logrows) + TAIL_BYTES


def verifying_part(path: Path, logrows: int) -> bytes:
    """The verifying SRS of the file at ``path``."""
    points = POINT_BYTES << logrows
    with path.open("rb") as stream:
        stream.seek(4)
        first = stream.read(POINT_BYTES)
        stream.seek(4 + points)
        first_lagrange = stream.read(POINT_BYTES)
        stream.seek(4 + 2 * points)
        return bytes(4) + first + first_lagrange + stream.read(TAIL_BYTES)
