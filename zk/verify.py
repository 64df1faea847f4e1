"""Checking a proof against a trusted verifier package. Needs neither the model nor torch.

Fails closed: a proof is valid only if every check passes and EZKL answers True itself.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO

from circuits.circuit import COMMITTED_INPUT
from mamba_int.errors import MambaintError
from mamba_int.files import canonical_json
from zk import ezkl_calls, field
from zk.challenge import POINT_BYTES, derive_challenge
from zk.ezkl_calls import EzklError
from zk.package import MAX_REASON, Package, read_package
from zk.proof import MAX_FILE_BYTES, InvalidProof, Proof, decode_proof
from zk.srs_format import SrsKind


@dataclass(frozen=True)
class Verdict:
    """The outcome of checking a proof.

    Attributes:
        valid: whether the statement is proved.
        reason: why it is invalid, on one line; empty if valid.
        model_id: the trusted package's model.
        circuit_id: the trusted package's circuit.
        public: the public values that are proved, flattened row-major; empty if invalid.
        commitments: to the model input, as a hexadecimal point under its name, where the proof has one.
        statement: the trusted package's description of what a proof says.
        srs_kind: "development" or "ceremony".
        package_sha256: hash (hex) of the trusted package.
        verify_seconds: time spent.
    """

    valid: bool
    reason: str
    model_id: str
    circuit_id: str
    public: dict[str, list[int]]
    commitments: dict[str, str]
    statement: dict[str, Any]
    srs_kind: SrsKind
    package_sha256: str
    verify_seconds: float

    def refused(self, reason: str) -> Verdict:
        """The verdict on a valid proof that does not show what was asked for in addition."""
        return replace(self, valid=False, reason=reason[:MAX_REASON], public={}, commitments={})


def verify(proof_path: Path, package_path: Path, expected_model_id: str | None = None) -> Verdict:
    """Check a proof file against a verifier package file.

    Args:
        proof_path: ``proof.json``; anything wrong inside it makes it invalid.
        package_path: ``verifier.zip``; it is trusted, so it must come from a source you trust.
        expected_model_id: the model the proof has to be about, if you know it.

    Raises:
        MambaintError: if the check cannot be made: a file is missing or unreadable, the package is
            damaged or foreign, or another EZKL version is installed.
    """
    package, digest = read_package(package_path)
    return check(read_proof(proof_path), package, digest, expected_model_id)


def read_proof(proof_path: Path) -> bytes:
    """The bytes of a proof file, as far as they are read.

    Raises:
        MambaintError: if it cannot be read.
    """
    with open_proof(proof_path) as stream:
        return stream.read(MAX_FILE_BYTES + 1)


@contextmanager
def open_proof(proof_path: Path) -> Iterator[BinaryIO]:
    """Yield a proof file to read from.

    Raises:
        MambaintError: if it cannot be opened or read.
    """
    try:
        with proof_path.open("rb") as stream:
            yield stream
    except OSError as error:
        raise MambaintError(
            f"cannot read the proof {proof_path}: {error.strerror or error}", "check the path"
        ) from error


def check(
    raw_proof: bytes, package: Package, package_sha256: str, expected_model_id: str | None = None
) -> Verdict:
    """:func:`verify` on content already in memory."""
    require_version(package)
    started = time.perf_counter()
    public: dict[str, list[int]] = {}
    commitments: dict[str, str] = {}
    reason = ""
    try:
        # Parsing is linear, but megabytes of it are seconds and gigabytes for nothing.
        if len(raw_proof) > package.proof_file_bytes:
            raise InvalidProof(f"the file has more than {package.proof_file_bytes} bytes")
        proof = decode_proof(raw_proof)
        _check_identity(proof, package, package_sha256, expected_model_id)
        segment = proof.segments[0]
        check_segment(segment, proof.public, package)
        public = proof.public
        if package.commits_to_input:
            commitments = {COMMITTED_INPUT: segment[:POINT_BYTES].hex()}
    except InvalidProof as error:
        reason = str(error)[:MAX_REASON]
    return Verdict(
        valid=not reason,
        reason=reason,
        model_id=package.model_id,
        circuit_id=package.circuit_id,
        public=public,
        commitments=commitments,
        statement=package.statement,
        srs_kind=package.srs_kind,
        package_sha256=package_sha256,
        verify_seconds=time.perf_counter() - started,
    )


def require_version(package: Package) -> None:
    """Refuse to check with another EZKL than the package was made with.

    Raises:
        MambaintError: naming the version that is needed.
    """
    installed = ezkl_calls.installed_version()
    if installed != package.ezkl_version:
        raise MambaintError(
            f"the verifier package needs EZKL {package.ezkl_version} and {installed} is installed",
            f"run: pip install ezkl=={package.ezkl_version}",
        )


def check_model(proof_model_id: str, package_model_id: str, expected: str | None) -> None:
    """Whether proof, package and verifier mean one model.

    Raises:
        InvalidProof: if they do not.
    """
    if expected is not None and package_model_id != expected:
        raise InvalidProof(f"the trusted package is for model {package_model_id}, not {expected}")
    if proof_model_id != package_model_id:
        raise InvalidProof(f"it is about model {proof_model_id}, not {package_model_id}")


def check_package(proof_package: str, digest: str) -> None:
    """Whether a proof was made for the trusted package.

    Raises:
        InvalidProof: if it was not.
    """
    if proof_package != digest:
        raise InvalidProof(f"it was made for verifier package {proof_package}, not {digest}")


def _check_identity(proof: Proof, package: Package, digest: str, expected: str | None) -> None:
    check_model(proof.model_id, package.model_id, expected)
    if proof.circuit_id != package.circuit_id:
        raise InvalidProof("it is about another circuit of the same model")
    check_package(proof.verifier_package, digest)


def rebuild_instances(public: dict[str, list[int]], segment: bytes, package: Package) -> list[str]:
    """The circuit's instances from the public values: package order and shapes, forced values filled in, the
    challenge derived from the commitments at the head of the proof.

    Args:
        public: the stated values.
        segment: the bytes of the proof, of the package's length.
        package: the trusted package.

    Raises:
        InvalidProof: if a value is missing, superfluous or outside the field.
    """
    free = [tensor for tensor in package.public if tensor.stated]
    missing = sorted({tensor.name for tensor in free} - set(public))
    unknown = sorted(set(public) - {tensor.name for tensor in free})
    if missing:
        raise InvalidProof(f"public value {', '.join(missing)} is missing")
    if unknown:
        raise InvalidProof(f"unknown public value {', '.join(ascii(name) for name in unknown)}")
    instances: list[str] = []
    for tensor in package.public:
        if tensor.forced is not None:
            instances += [field.encode(tensor.forced)] * tensor.size
            continue
        if tensor.challenge:
            commitments = segment[: POINT_BYTES * (len(package.committed) - 1)]
            instances.append(field.encode(derive_challenge(package.circuit_id, public, commitments)))
            continue
        values = public[tensor.name]
        if len(values) != tensor.size:
            raise InvalidProof(
                f"public value {tensor.name} has {len(values)} numbers and must have {tensor.size}"
            )
        # Reduction modulo the prime would make v and v + p the same statement.
        if any(abs(value) > field.HALF for value in values):
            raise InvalidProof(f"public value {tensor.name} holds a number outside the field")
        instances += [field.encode(value) for value in values]
    return instances


def check_segment(proof: bytes, public: dict[str, list[int]], package: Package) -> None:
    """Ask EZKL about one proof, with instances rebuilt from its public values.

    Raises:
        InvalidProof: if it does not verify.
        MambaintError: if the check cannot be made.
    """
    # EZKL ignores bytes after the proof, so the length is ours to check.
    if len(proof) != package.proof_bytes:
        raise InvalidProof(f"the proof has {len(proof)} bytes and must have {package.proof_bytes}")
    instances = rebuild_instances(public, proof, package)
    with TemporaryDirectory(prefix="mambaint-") as name:
        folder = Path(name)
        content = {
            "proof.json": canonical_json({"instances": [instances], "proof": list(proof)}),
            "settings.json": package.settings,
            "vk.key": package.vk,
            "verifying.srs": package.verifying_srs,
        }
        try:
            for member, data in content.items():
                (folder / member).write_bytes(data)
        except OSError as error:
            raise MambaintError(
                f"cannot write a temporary file: {error.strerror or error}", "free some disk space"
            ) from error
        try:
            accepted = ezkl_calls.verify(*(folder / member for member in content))
        except EzklError as error:
            raise InvalidProof(f"the proof does not verify (EZKL: {error})") from error
    if not accepted:
        raise InvalidProof("the proof does not verify")
