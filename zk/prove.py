"""Proving one inference, and asking the constraints alone about a witness that may lie."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from subprocess import Popen
from typing import Any

from circuits.circuit import Circuit, Witness
from mamba_int.errors import MambaintError
from zk.jobs import pack_circuit, pack_claim, pack_witness, stated_values
from zk.keys import Keys, job_timeout
from zk.package import decode_package
from zk.process import run_job
from zk.proof import Proof
from zk.verify import check


@dataclass(frozen=True)
class ProofResult:
    """A proof that passed its own check, and what it cost.

    Attributes:
        file: the bytes of ``proof.json``.
        commitments: as in :class:`zk.verify.Verdict`.
        proof_bytes: length of the proof itself.
        witness_seconds: time for EZKL's witness.
        prove_seconds: time for the proof.
        peak_bytes: largest memory of the proving process, in bytes.
    """

    file: bytes
    commitments: dict[str, str]
    proof_bytes: int
    witness_seconds: float
    prove_seconds: float
    peak_bytes: int


def prove(
    circuit: Circuit, witness: Witness, keys: Keys, package: bytes, timeout: float | None = None
) -> ProofResult:
    """Prove one inference and verify the proof.

    Args:
        circuit: the circuit.
        witness: of one inference; private values never leave this machine.
        keys: of this circuit.
        package: the bytes of the verifier package the proof is for (``keys.package(...).encode()``).
        timeout: seconds before giving up; default :func:`zk.keys.job_timeout`.

    Raises:
        MambaintError: if the circuit computes other outputs than the witness has, memory or time runs
            out, or the finished proof does not verify.
    """
    trusted = decode_package(package, "given to prove")
    if trusted.circuit_id != keys.circuit_id or circuit.model_id != keys.model_id:
        raise MambaintError(
            "circuit, keys and verifier package do not belong together", "make the verifier package again"
        )
    answer = prove_witness(circuit, witness, keys, timeout)
    digest = hashlib.sha256(package).hexdigest()
    segment = bytes.fromhex(answer["proof"])
    proof = Proof(
        model_id=circuit.model_id,
        circuit_id=keys.circuit_id,
        verifier_package=digest,
        public=stated_values(circuit, witness),
        segments=(segment,),
    ).encode()
    verdict = check(proof, trusted, digest)
    if not verdict.valid:
        raise MambaintError(
            f"the finished proof is not valid and was discarded: {verdict.reason}",
            f"delete the folder {keys.folder}, so that the keys are made again, and prove again",
        )
    return ProofResult(
        file=proof,
        commitments=verdict.commitments,
        proof_bytes=len(segment),
        witness_seconds=answer["witness_seconds"],
        prove_seconds=answer["prove_seconds"],
        peak_bytes=answer["peak_bytes"],
    )


def prove_witness(
    circuit: Circuit,
    witness: Witness,
    keys: Keys,
    timeout: float | None,
    threads: int | None = None,
    started: Callable[[Popen[bytes]], None] = lambda child: None,
) -> dict[str, Any]:
    """The worker's answer: the proof in hexadecimal, what it cost; nothing is checked.

    Args and errors as for :func:`prove` and :func:`zk.process.run_job`.
    """
    job = {
        "witness": pack_witness(circuit, witness),
        "circuit": {**pack_circuit(circuit), "circuit_id": keys.circuit_id},
        "keys": str(keys.folder),
        "srs": str(keys.srs.path),
    }
    limit = job_timeout(circuit.logrows) if timeout is None else timeout
    return run_job("prove", job, what="proving", timeout=limit, threads=threads, started=started)


def mock(circuit: Circuit, witnesses: Sequence[Witness], timeout: float = 120) -> list[bool]:
    """For each witness, whether the constraints accept it; no keys, no proof.

    A witness may lie in ``private`` and claim any ``public`` values. Outputs it leaves out take whatever
    the circuit computes from the lie: the claim a forger would make. Forced outputs are always at their
    forced value, as in :func:`zk.verify.verify`.

    Raises:
        MambaintError: if the circuit itself is refused or the check does not end in time.
    """
    job = {
        "onnx": circuit.onnx.hex(),
        "circuit": pack_circuit(circuit),
        "claims": [pack_claim(circuit, witness) for witness in witnesses],
    }
    accepted: list[bool] = run_job("mock", job, what="checking constraints", timeout=timeout)["accepted"]
    return accepted
