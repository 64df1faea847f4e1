"""Attacks on the challenge: a forger who knows it in time can satisfy every claim with false values."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from circuits.cells import FIELD
from circuits.lowering import LoweredCircuit, build_circuit
from tests.attacks.command import accepted, assert_invalid
from tests.circuits.conftest import Array, chain, node, random_input
from zk import field
from zk.challenge import POINT_BYTES, derive_challenge
from zk.jobs import CHALLENGE_SIZE, pack_circuit, pack_witness, stated_values
from zk.keys import Keys, make_keys
from zk.process import run_job
from zk.proof import Proof, decode_proof
from zk.prove import prove
from zk.srs import development_srs

WEIGHT = [[1, -1, 0, 1], [0, 1, 1, -1], [-1, 0, 1, 1]]


@dataclass(frozen=True)
class Claimed:
    """A circuit whose outputs are claimed, its keys, and an honest proof."""

    lowered: LoweredCircuit
    x: Array
    keys: Keys
    package: bytes
    proof: bytes


@pytest.fixture(scope="module")
def claimed(cache: Path) -> Iterator[Claimed]:
    graph = chain(node("y", "linear", "input", constants={"weight": WEIGHT}), T=3)
    lowered = build_circuit(graph, public_input=True, challenged=True)
    assert lowered.circuit.challenged
    x = random_input(graph)
    keys = make_keys(
        lowered.circuit, lowered.witness(x), development_srs(lowered.circuit.logrows, cache), cache
    )
    package = keys.package({}).encode()
    yield Claimed(lowered, x, keys, package, prove(lowered.circuit, lowered.witness(x), keys, package).file)
    shutil.rmtree(keys.folder)


def forge(claimed: Claimed, challenge: int, steps: tuple[int, int] = (0, 1)) -> bytes:
    """A proof with a challenge of the forger's choice and two false outputs that cancel at that challenge."""
    circuit, keys = claimed.lowered.circuit, claimed.keys
    witness = claimed.lowered.witness(claimed.x)
    # Element (t, j) weighs alpha^(s j + t): one unit more at step t is taken back at step u.
    t, u = steps
    lie = {t: 1, u: -pow(challenge, t - u, FIELD)}
    outputs = len(WEIGHT)
    private = dict(witness.private)
    values = list(private["y.values"])
    logits = list(witness.public["logits"])
    for step, delta in lie.items():
        values[step * outputs] = (values[step * outputs] + delta) % FIELD
        logits[step * outputs] = field.decode(field.encode(values[step * outputs]))
    private["y.values"] = values
    lied = dataclasses.replace(witness, private=private, public={**witness.public, "logits": logits})
    packed = pack_witness(circuit, lied)
    chosen = [field.encode(challenge)]
    packed["inputs"] += [chosen + [field.encode(0)] * (CHALLENGE_SIZE - 1)]
    packed["public"] = [chosen if values is None else values for values in packed["public"]]
    job = {
        "witness": packed,
        "circuit": {**pack_circuit(circuit), "circuit_id": keys.circuit_id},
        "keys": str(keys.folder),
        "srs": str(keys.srs.path),
    }
    segment = bytes.fromhex(run_job("prove", job, what="forging", timeout=60)["proof"])
    return Proof(
        model_id=circuit.model_id,
        circuit_id=keys.circuit_id,
        verifier_package=hashlib.sha256(claimed.package).hexdigest(),
        public=stated_values(circuit, lied),
        segments=(segment,),
    ).encode()


def honest_challenge(claimed: Claimed) -> int:
    proof = decode_proof(claimed.proof)
    return derive_challenge(proof.circuit_id, proof.public, proof.segments[0][:POINT_BYTES])


def test_honest_claims_are_accepted(claimed: Claimed) -> None:
    assert accepted(claimed.proof, claimed.package)


@pytest.mark.parametrize("challenge", [1, 2, FIELD - 1])
def test_chosen_challenge_with_outputs_that_cancel_there(claimed: Claimed, challenge: int) -> None:
    # The circuit itself accepts: that the forged proof exists at all shows that only the derivation stops it.
    assert_invalid(forge(claimed, challenge), claimed.package, "does not verify")


def test_challenge_replayed_from_an_honest_proof(claimed: Claimed) -> None:
    assert_invalid(forge(claimed, honest_challenge(claimed)), claimed.package, "does not verify")


@pytest.mark.parametrize("byte", [0, 31, 32, 63])
def test_wrong_commitment(claimed: Claimed, byte: int) -> None:
    proof = json.loads(claimed.proof)
    segment = bytearray.fromhex(proof["segments"][0]["proof"])
    segment[byte] ^= 1
    changed: Any = dataclasses.replace(decode_proof(claimed.proof), segments=(bytes(segment),))
    assert_invalid(changed.encode(), claimed.package, "does not verify")


def test_commitment_taken_from_another_proof_of_the_same_statement(claimed: Claimed) -> None:
    again = decode_proof(
        prove(claimed.lowered.circuit, claimed.lowered.witness(claimed.x), claimed.keys, claimed.package).file
    )
    first = decode_proof(claimed.proof)
    # Fresh salts: the same values do not give the same commitment.
    assert first.segments[0][:64] != again.segments[0][:64]
    spliced = again.segments[0][:64] + first.segments[0][64:]
    forged = dataclasses.replace(first, segments=(spliced,)).encode()
    assert_invalid(forged, claimed.package, "does not verify")
