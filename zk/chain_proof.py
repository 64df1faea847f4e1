"""The proof file of a chain: proofs of the segments of one sequence, in one canonical encoding.

What links them is not in the file twice: the state after segment i *is* the state before segment i + 1, the
first state is the package's, what a stage hands on *is* what the next one takes, and positions count from 0.
So a file cannot hold links that do not fit; it can only hold proofs that do not verify.

It is written and read segment by segment, so that its length needs no memory: what does not repeat stands in
its first and last bytes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from circuits.circuit import CHAIN_BITS
from mamba_int.errors import MambaintError
from mamba_int.files import canonical_json, parse_json
from zk.proof import (
    MAX_FILE_BYTES,
    NOT_CANONICAL,
    InvalidProof,
    decode_document,
    decode_hash,
    decode_numbers,
    decode_proof_bytes,
    decode_public,
    expect,
)

FORMAT = "mambaint-chain"
VERSION = 1

_FIELDS = {"format", "version", "model_id", "verifier_package", "chain", "steps", "prompt", "segments"}
_EDGE = 1024
"""Bytes at either end that hold all of the file but its segments."""
_OPENING, _BETWEEN, _CLOSING = b'"segments":[', b"}],[{", b'],"steps":'
_BLOCK = 1 << 20
_STAGE = {"public", "state", "activations", "proof"}


@dataclass(frozen=True)
class StageProof:
    """One stage of one segment of a chain: all of it, if the model is not cut by layers.

    Attributes:
        public: what its circuit shows besides its place and links: logits, and the input if public.
        state: after it, flat; empty where states are hidden, and of a head.
        activations: that it hands to the next stage, flat; empty where they are hidden, and of the last.
        proof: the bytes of the proof.
    """

    public: dict[str, list[int]]
    state: tuple[int, ...]
    activations: tuple[int, ...]
    proof: bytes

    @property
    def document(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "public": self.public,
            "state": list(self.state),
            "activations": list(self.activations),
            "proof": self.proof.hex(),
        }


Stages = tuple[StageProof, ...]
"""One segment: its stages in order."""


@dataclass(frozen=True)
class ChainHeader:
    """What a chain's file says once.

    Attributes:
        model_id: the model it claims to be about.
        verifier_package: SHA-256 (hex) of the verifier package it was made for.
        chain: the number of the chain, drawn at random: segments of two chains do not mix.
        steps: of the sequence; those of the last segment beyond it are padding.
        prompt: where generation or a score is proved: the steps that were given; all later tokens are greedy,
            or count. Else 0.
    """

    model_id: str
    verifier_package: str
    chain: int
    steps: int
    prompt: int

    def edges(self) -> tuple[bytes, bytes]:
        """The bytes of the file before and after its segments."""
        content = {
            "format": FORMAT,
            "version": VERSION,
            "model_id": self.model_id,
            "verifier_package": self.verifier_package,
            "chain": self.chain,
            "steps": self.steps,
            "prompt": self.prompt,
            "segments": [],
        }
        head, tail = canonical_json(content).split(_OPENING + b"]")
        return head + _OPENING, b"]" + tail + b"\n"


def encoded(header: ChainHeader, segments: Iterable[Stages]) -> Iterator[bytes]:
    """The bytes of the file, segment by segment."""
    head, tail = header.edges()
    yield head
    for i, stages in enumerate(segments):
        yield (b"," if i else b"") + canonical_json([stage.document for stage in stages])
    yield tail


def is_chain(start: bytes) -> bool:
    """Whether a file that starts so says that it is of a chain; the keys of canonical JSON are sorted."""
    return start.startswith(b'{"chain":')


def read_chain(stream: BinaryIO) -> tuple[ChainHeader, Iterator[Stages]]:
    """Read a file strictly: what it says once, and its segments as they are asked for.

    Args:
        stream: the file, which can be searched.

    Raises:
        InvalidProof: if any byte differs from what :func:`encoded` writes; of a segment, when it is reached.
    """
    size = stream.seek(0, os.SEEK_END)
    stream.seek(0)
    first = stream.read(_EDGE)
    stream.seek(max(0, size - _EDGE))
    last = stream.read(_EDGE)
    opened, closed = first.find(_OPENING) + len(_OPENING), last.rfind(_CLOSING)
    expect(opened >= len(_OPENING) and closed >= 0, "it is not a whole chain of mambaint")
    start, stop = opened, size - len(last) + closed
    value = decode_document(first[:start] + last[closed:], FORMAT, VERSION, "a chain")
    expect(set(value) == _FIELDS, f"its fields are not exactly {', '.join(sorted(_FIELDS))}")
    chain, steps, prompt = (value[name] for name in ("chain", "steps", "prompt"))
    expect(type(chain) is int and 0 <= chain < 1 << CHAIN_BITS, "the number of the chain is out of range")
    expect(type(steps) is int and steps >= 1, "the number of steps is not a positive integer")
    expect(type(prompt) is int and 0 <= prompt <= steps, "the length of the prompt is out of range")
    header = ChainHeader(
        model_id=decode_hash(value["model_id"], "model_id"),
        verifier_package=decode_hash(value["verifier_package"], "verifier_package"),
        chain=chain,
        steps=steps,
        prompt=prompt,
    )
    head, tail = header.edges()
    expect(head == first[:start] and tail == last[closed:], NOT_CANONICAL)
    return header, _segments(stream, start, stop)


def _segments(stream: BinaryIO, start: int, stop: int) -> Iterator[Stages]:
    """The segments between two places of a file."""
    expect(start < stop, "it has no segments")
    held, seen, place = b"", 0, start
    while place < stop or held:
        cut = held.find(_BETWEEN, seen)
        if cut < 0 and place < stop:
            # The end of one may have been read in part.
            seen = max(0, len(held) - len(_BETWEEN))
            expect(len(held) <= MAX_FILE_BYTES, f"a segment has more than {MAX_FILE_BYTES} bytes")
            stream.seek(place)
            more = stream.read(min(_BLOCK, stop - place))
            expect(bool(more), "the file ends in the middle of a segment")
            held, place = held + more, place + len(more)
            continue
        last = cut < 0
        raw = held if last else held[: cut + _BETWEEN.index(b",")]
        held, seen = (b"", 0) if last else (held[len(raw) + 1 :], 0)
        yield _decode_stages(raw)


def _decode_stages(raw: bytes) -> Stages:
    try:
        items = parse_json(raw, "a segment")
    except MambaintError as error:
        raise InvalidProof(error.cause) from error
    expect(isinstance(items, list), "a segment is not a list of stages")
    stages = tuple(decode_stage(item) for item in items)
    expect(canonical_json([stage.document for stage in stages]) == raw, NOT_CANONICAL)
    return stages


def decode_stage(item: Any) -> StageProof:
    """The reverse of :attr:`StageProof.document`.

    Raises:
        InvalidProof: if it is malformed.
    """
    expect(isinstance(item, dict) and set(item) == _STAGE, "a stage of a segment has wrong fields")
    return StageProof(
        public=decode_public(item["public"]),
        state=tuple(decode_numbers(item["state"], "a state")),
        activations=tuple(decode_numbers(item["activations"], "activations")),
        proof=decode_proof_bytes(item["proof"]),
    )
