"""``proof.json``: the public values and the proof, in one canonical encoding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mamba_int.errors import MambaintError
from mamba_int.files import canonical_json, parse_json
from zk.field import HALF
from zk.identity import is_sha256

FORMAT = "mambaint-proof"
VERSION = 1
MAX_FILE_BYTES = 64 << 20
NOT_CANONICAL = "the file is not in the one canonical form"

_FIELDS = {"format", "version", "model_id", "circuit_id", "verifier_package", "public", "segments"}


class InvalidProof(Exception):
    """The proof is not valid; the text is the reason, on one line."""


@dataclass(frozen=True)
class Proof:
    """Content of a proof file.

    Attributes:
        model_id: the model it claims to be about.
        circuit_id: the circuit it claims to be about.
        verifier_package: SHA-256 (hex) of the verifier package it was made for.
        public: every public tensor that is not forced, flattened row-major.
        segments: the proof bytes of each segment, in order.
    """

    model_id: str
    circuit_id: str
    verifier_package: str
    public: dict[str, list[int]]
    segments: tuple[bytes, ...]

    def encode(self) -> bytes:
        """The bytes of the file: canonical JSON and a newline."""
        return (
            canonical_json(
                {
                    "format": FORMAT,
                    "version": VERSION,
                    "model_id": self.model_id,
                    "circuit_id": self.circuit_id,
                    "verifier_package": self.verifier_package,
                    "public": self.public,
                    "segments": [{"proof": segment.hex()} for segment in self.segments],
                }
            )
            + b"\n"
        )


def expect(condition: bool, reason: str) -> None:
    """Raise InvalidProof(reason) unless the file obeys the rule."""
    if not condition:
        raise InvalidProof(reason)


def decode_hash(value: Any, name: str) -> str:
    """A SHA-256."""
    expect(is_sha256(value), f"{name} is not a SHA-256")
    return str(value)


def decode_numbers(value: Any, name: str) -> list[int]:
    """Integers inside the field."""
    expect(isinstance(value, list), f"{name} is not a list")
    for number in value:
        # bool is a subclass of int: only int itself will do.
        expect(type(number) is int, f"{name} holds something that is not an integer")
        expect(-HALF <= number <= HALF, f"{name} holds a number outside the field")
    return list(value)


def decode_proof_bytes(text: Any) -> bytes:
    """The bytes of one proof."""
    expect(
        isinstance(text, str) and len(text) % 2 == 0 and not set(text) - set("0123456789abcdef"),
        "the proof bytes are not lower-case hexadecimal",
    )
    return bytes.fromhex(text)


def decode_public(value: Any) -> dict[str, list[int]]:
    """Public values by name."""
    expect(isinstance(value, dict), "public is not an object")
    return {str(name): decode_numbers(numbers, f"public value {name!a}") for name, numbers in value.items()}


def _decode_segments(value: Any) -> tuple[bytes, ...]:
    expect(isinstance(value, list) and len(value) == 1, "there must be exactly one segment")
    (item,) = value
    expect(isinstance(item, dict) and set(item) == {"proof"}, "a segment has wrong fields")
    return (decode_proof_bytes(item["proof"]),)


def decode_document(raw: bytes, format_name: str, version: int, what: str) -> dict[str, Any]:
    """The JSON object of a file that says it is of this format and version.

    Args:
        what: the format in words.

    Raises:
        InvalidProof: if it is none, or too long.
    """
    expect(len(raw) <= MAX_FILE_BYTES, f"the file has more than {MAX_FILE_BYTES} bytes")
    try:
        value = parse_json(raw, "the proof file")
    except MambaintError as error:
        raise InvalidProof(error.cause) from error
    if not isinstance(value, dict) or value.get("format") != format_name:
        raise InvalidProof(f"it is not {what} of mambaint")
    found = value.get("version")
    expect(
        type(found) is int and found == version,
        f"it has format version {found!a} and this mambaint reads version {version}",
    )
    return value


def decode_proof(raw: bytes) -> Proof:
    """Read a proof file strictly.

    Raises:
        InvalidProof: if any byte differs from what :meth:`Proof.encode` writes.
    """
    value = decode_document(raw, FORMAT, VERSION, "a proof file")
    missing, unknown = sorted(_FIELDS - set(value)), sorted(set(value) - _FIELDS)
    expect(not missing, f"field {', '.join(missing)} is missing")
    expect(not unknown, f"unknown field {', '.join(ascii(name) for name in unknown)}")
    proof = Proof(
        model_id=decode_hash(value["model_id"], "model_id"),
        circuit_id=decode_hash(value["circuit_id"], "circuit_id"),
        verifier_package=decode_hash(value["verifier_package"], "verifier_package"),
        public=decode_public(value["public"]),
        segments=_decode_segments(value["segments"]),
    )
    expect(proof.encode() == raw, NOT_CANONICAL)
    return proof
