"""Signed integers as elements of the BN254 scalar field, in the text form EZKL reads and writes."""

from __future__ import annotations

PRIME = 21888242871839275222246405745257275088548364400416034343698204186575808495617
"""Order of the BN254 scalar field."""

HALF = PRIME // 2
"""Largest magnitude a signed public value may have; every field element is one v with -HALF <= v <= HALF."""


def encode(value: int) -> str:
    """The field element of ``value`` (taken modulo the prime): 32 bytes little-endian, as 64 hex digits."""
    return (int(value) % PRIME).to_bytes(32, "little").hex()


def decode(text: str) -> int:
    """The signed integer of a field element, in [-HALF, HALF].

    Raises:
        ValueError: if ``text`` is not 64 hex digits of a canonical element.
    """
    value = int.from_bytes(bytes.fromhex(text), "little")
    if len(text) != 64 or value >= PRIME:
        raise ValueError(f"not a canonical field element: {text!r}")
    return value if value <= HALF else value - PRIME
