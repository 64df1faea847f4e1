"""The child process that runs EZKL: one job as JSON on stdin, one answer as JSON on stdout.

Started by ``zk.process.run_job`` as ``python -m zk.worker``.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mamba_int.errors import MambaintError
from mamba_int.files import canonical_json, read_json
from zk import ezkl_calls, field, table
from zk.challenge import derive_challenge
from zk.ezkl_calls import EzklError
from zk.jobs import CHALLENGE_SIZE, unpack_public


def _peak_bytes() -> int:
    try:
        # ru_maxrss would also count what the parent had before exec.
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


def _write_inputs(scratch: Path, inputs: list[list[str]]) -> Path:
    path = scratch / "input.json"
    path.write_bytes(canonical_json({"input_data": inputs}))
    return path


def _with_challenge(inputs: list[list[str]], challenge: int) -> list[list[str]]:
    return [*inputs, [field.encode(challenge), *[field.encode(0)] * (CHALLENGE_SIZE - 1)]]


def _prove(
    witness: dict[str, Any], circuit: dict[str, Any], keys: Path, srs: Path, scratch: Path
) -> dict[str, Any]:
    """Commitments and challenge, witness, check against the expected outputs, proof."""
    compiled, settings, vk = keys / "model.ezkl", keys / "settings.json", keys / "vk.key"
    started = time.perf_counter()
    inputs, expected, commitments = witness["inputs"], witness["public"], b""
    if circuit["committed"]:
        commitments = b"".join(ezkl_calls.commit(values, settings, vk, srs) for values in inputs)
    if None in expected:
        challenge = derive_challenge(circuit["circuit_id"], witness["stated"], commitments)
        inputs = _with_challenge(inputs, challenge)
        expected = [[field.encode(challenge)] if values is None else values for values in expected]
    outputs = ezkl_calls.gen_witness(_write_inputs(scratch, inputs), compiled, scratch / "witness.json")
    witnessed = time.perf_counter()
    if outputs != expected:
        raise MambaintError(
            "the circuit and the interpreter disagree on this input, so nothing was proved",
            "this is a fault of the circuit builder: report it with the model and the input",
        )
    ezkl_calls.prove(scratch / "witness.json", compiled, keys / "pk.key", scratch / "proof.json", srs)
    proved = time.perf_counter()
    proof = bytes(read_json(scratch / "proof.json")["proof"])
    if not proof.startswith(commitments):
        raise MambaintError(
            "the proof does not begin with the commitments of its inputs",
            "install the EZKL version mambaint pins",
        )
    return {
        "proof": proof.hex(),
        "witness_seconds": witnessed - started,
        "prove_seconds": proved - witnessed,
    }


def development_srs(job: dict[str, Any], scratch: Path) -> dict[str, Any]:
    """Generate an SRS file."""
    ezkl_calls.gen_srs(Path(job["path"]), job["logrows"])
    return {}


def setup(job: dict[str, Any], scratch: Path) -> dict[str, Any]:
    """Make the keys of the circuit in a folder, and prove one sample with them for the proof's length."""
    folder, circuit, srs = Path(job["folder"]), job["circuit"], Path(job["srs"])
    started = time.perf_counter()
    if circuit["lookups"]:
        table.check_edges(scratch / "edges", circuit["logrows"], bool(circuit["committed"]))
    public = unpack_public(circuit["public"])
    table.prepare(
        folder,
        logrows=circuit["logrows"],
        public=public,
        committed=circuit["committed"],
        rows=circuit["rows"],
        lookups=circuit["lookups"],
    )
    inputs, values = job["sample"]["inputs"], job["sample"]["public"]
    # Proving a witness that breaks a constraint may never return, so the constraints are asked first.
    if not _satisfies(inputs, [None] * len(values), None in values, folder / "model.ezkl", scratch):
        raise MambaintError(
            "the circuit's constraints refuse its sample, so no keys were made",
            "this is a fault of the circuit builder: report it with the model",
        )
    ezkl_calls.setup(folder / "model.ezkl", folder / "vk.key", folder / "pk.key", srs)
    seconds = time.perf_counter() - started
    sample = _prove(job["sample"], circuit, folder, srs, scratch)
    return {
        "keygen_seconds": seconds,
        "proof_bytes": len(sample["proof"]) // 2,
    }


def prove(job: dict[str, Any], scratch: Path) -> dict[str, Any]:
    """Prove one witness with finished keys."""
    return _prove(job["witness"], job["circuit"], Path(job["keys"]), Path(job["srs"]), scratch)


def commit(job: dict[str, Any], scratch: Path) -> dict[str, Any]:
    """The commitment of a committed input, as a proof for a verifier package shows it."""
    settings, vk = scratch / "settings.json", scratch / "vk.key"
    settings.write_bytes(bytes.fromhex(job["settings"]))
    vk.write_bytes(bytes.fromhex(job["vk"]))
    return {"commitment": ezkl_calls.commit(job["values"], settings, vk, Path(job["srs"])).hex()}


def mock(job: dict[str, Any], scratch: Path) -> dict[str, Any]:
    """For each claim, whether the circuit's constraints accept it."""
    circuit = job["circuit"]
    (scratch / "circuit.onnx").write_bytes(bytes.fromhex(job["onnx"]))
    public = unpack_public(circuit["public"])
    table.prepare(
        scratch,
        logrows=circuit["logrows"],
        public=public,
        committed=circuit["committed"],
        rows=circuit["rows"],
        lookups=circuit["lookups"],
    )
    compiled = scratch / "model.ezkl"
    return {
        "accepted": [
            _satisfies(claim["inputs"], claim["public"], claim["challenged"], compiled, scratch)
            for claim in job["claims"]
        ]
    }


def _satisfies(
    inputs: list[list[str]],
    public: list[list[str] | None],
    challenged: bool,
    compiled: Path,
    scratch: Path,
) -> bool:
    """Whether the constraints accept a witness; public values that are None are what the circuit computes."""
    witness = scratch / "witness.json"
    if challenged:
        # Without keys there are no commitments; a hash of the inputs themselves fixes them as well.
        inputs = _with_challenge(inputs, derive_challenge("", {}, canonical_json(inputs)))
    computed = ezkl_calls.gen_witness(_write_inputs(scratch, inputs), compiled, witness)
    written = read_json(witness)
    written["outputs"] = [
        own if claimed is None else claimed for own, claimed in zip(computed, public, strict=True)
    ]
    witness.write_text(json.dumps(written))
    return ezkl_calls.mock(witness, compiled)


JOBS: dict[str, Callable[[dict[str, Any], Path], dict[str, Any]]] = {
    "development_srs": development_srs,
    "setup": setup,
    "prove": prove,
    "commit": commit,
    "mock": mock,
}


def _die_with_parent() -> None:
    """A prover must not outlive a killed caller (Linux only; elsewhere it finishes and is ignored)."""
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def main() -> None:
    """Run the job on stdin; EZKL's own output goes to stderr, only the answer to stdout."""
    _die_with_parent()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    request = json.load(sys.stdin)
    try:
        answer = JOBS[request["kind"]](request["job"], Path(request["scratch"]))
        answer["peak_bytes"] = _peak_bytes()
    except MambaintError as error:
        answer = {"cause": error.cause, "remedy": error.remedy}
    except EzklError as error:
        answer = {
            "cause": f"EZKL failed: {error}",
            "remedy": "check free disk space and memory; if it persists, report it with the model",
        }
    except OSError as error:
        answer = {
            "cause": f"cannot write {error.filename}: {error.strerror or error}",
            "remedy": "free some disk space (temporary and cache folder)",
        }
    with answers:
        json.dump(answer, answers)


if __name__ == "__main__":
    main()
