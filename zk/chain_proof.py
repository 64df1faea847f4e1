"""The proof file of a chain: proofs of the segments of one sequence, in one canonical encoding.

What links them is not in the file twice: the state after segment i *is* the state before segment i + 1, the
first state is the package's, what a stage hands on *is* what the next one takes, and positions count from 0.
So a file cannot hold links that do not fit; it can only hold proofs that do not verify.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from circuits.circuit import CHAIN_BITS
from mamba_int.files import canonical_json
from zk.proof import (
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


@dataclass(frozen=True)
class ChainProof:
    """Content of a chain's proof file.

    Attributes:
        model_id: the model it claims to be about.
        verifier_package: SHA-256 (hex) of the verifier package it was made for.
        chain: the number of the chain, drawn at random: segments of two chains do not mix.
        steps: of the sequence; those of the last segment beyond it are padding.
        prompt: where generation or a score is proved: the steps that were given; all later tokens are greedy,
            or count. Else 0.
        segments: in order, each its stages in order.
    """

    model_id: str
    verifier_package: str
    chain: int
    steps: int
    prompt: int
    segments: tuple[tuple[StageProof, ...], ...]

    def encode(self) -> bytes:
        """The bytes of the file: canonical JSON and a newline."""
        content = {
            "format": FORMAT,
            "version": VERSION,
            "model_id": self.model_id,
            "verifier_package": self.verifier_package,
            "chain": self.chain,
            "steps": self.steps,
            "prompt": self.prompt,
            "segments": [[stage.document for stage in segment] for segment in self.segments],
        }
        return canonical_json(content) + b"\n"


def is_chain(raw: bytes) -> bool:
    """Whether a proof file says that it is of a chain; the keys of canonical JSON are sorted."""
    return raw.startswith(b'{"chain":')


def decode_chain_proof(raw: bytes) -> ChainProof:
    """Read the file strictly.

    Raises:
        InvalidProof: if any byte differs from what :meth:`ChainProof.encode` writes.
    """
    value = decode_document(raw, FORMAT, VERSION, "a chain")
    expect(set(value) == _FIELDS, f"its fields are not exactly {', '.join(sorted(_FIELDS))}")
    chain, steps, prompt, items = (value[name] for name in ("chain", "steps", "prompt", "segments"))
    expect(type(chain) is int and 0 <= chain < 1 << CHAIN_BITS, "the number of the chain is out of range")
    expect(type(steps) is int and steps >= 1, "the number of steps is not a positive integer")
    expect(type(prompt) is int and 0 <= prompt <= steps, "the length of the prompt is out of range")
    expect(isinstance(items, list) and len(items) >= 1, "it has no segments")
    expect(all(isinstance(item, list) for item in items), "a segment is not a list of stages")
    proof = ChainProof(
        model_id=decode_hash(value["model_id"], "model_id"),
        verifier_package=decode_hash(value["verifier_package"], "verifier_package"),
        chain=chain,
        steps=steps,
        prompt=prompt,
        segments=tuple(tuple(decode_stage(stage) for stage in item) for item in items),
    )
    expect(proof.encode() == raw, "the file is not in the one canonical form")
    return proof


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
