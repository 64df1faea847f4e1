"""The challenge of a proof, by Fiat-Shamir: nobody can know it before the private values are fixed.

EZKL puts the commitments of committed inputs at the head of a proof. The challenge is a hash over the
circuit, the statement and those commitments; prover and verifier compute it alike, and the circuit shows it
among its public values. See "Challenges" in docs/security.md.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from mamba_int.files import canonical_json
from zk.field import PRIME

POINT_BYTES = 64
"""A commitment: both coordinates of a point of BN254, 32 bytes big-endian each, as the proof holds them."""

_DOMAIN = b"mambaint challenge 1\0"


def derive_challenge(circuit_id: str, stated: Mapping[str, list[int]], commitments: bytes) -> int:
    """The challenge, an element of the scalar field.

    512 bits are reduced, so that every element is as likely as any other to within 2^-256.

    Args:
        circuit_id: SHA-256 (hex); see :func:`zk.identity.circuit_id`.
        stated: the public values that are part of the statement.
        commitments: of all committed inputs but the challenge itself, in order.
    """
    parts = (bytes.fromhex(circuit_id), hashlib.sha512(canonical_json(dict(stated))).digest(), commitments)
    return int.from_bytes(hashlib.sha512(_DOMAIN + b"".join(parts)).digest(), "big") % PRIME
