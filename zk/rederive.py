"""Checking a proof and, with the model at hand, that the verifier package is really that model's.

The verifying key is a deterministic function of the integer graph, EZKL's version and the SRS: it is made
anew and compared to the byte. So is everything else of the package but its description for people.
"""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from circuits.circuit import COMMITTED_INPUT
from circuits.lowering import build_circuit
from circuits.sample import sample_input
from mamba_int.graph import Graph
from zk.keys import make_keys
from zk.package import Package, read_package
from zk.srs import Srs, find_srs
from zk.verify import Verdict, check, read_proof

OTHER_KEY = "the verifying key is not that of this model"


def verify_rederived(
    proof_path: Path,
    package_path: Path,
    graph: Graph,
    expected_model_id: str | None = None,
    srs_path: Path | None = None,
    cache: Path | None = None,
) -> Verdict:
    """:func:`zk.verify.verify`, and then derive the verifier package anew from the model.

    Args:
        proof_path: ``proof.json``.
        package_path: ``verifier.zip``; not trusted but for the SRS it names and its description.
        graph: the model that the proof is meant to be about.
        expected_model_id: as for :func:`zk.verify.verify`.
        srs_path: the SRS file the package names by hash; needed unless it is this machine's development SRS.
        cache: see :func:`zk.store.cache_folder`; only read.

    Raises:
        MambaintError: if it cannot be checked: the faults of ``verify``, a missing or other SRS, too little
            memory, a crash of EZKL.
    """
    package, digest = read_package(package_path)
    verdict = check(read_proof(proof_path), package, digest, expected_model_id)
    if not verdict.valid:
        return verdict
    reason = package_fault(package, graph, srs_path, cache)
    return verdict.refused(reason) if reason else verdict


def package_fault(
    package: Package, graph: Graph, srs_path: Path | None = None, cache: Path | None = None
) -> str:
    """Why a package is not that of a model; empty if it is. Its statement for people is not compared."""
    if package.model_id != graph.model_id:
        return f"the trusted package is for model {package.model_id}, not {graph.model_id}"
    srs = _named_srs(package, srs_path, cache)
    lowered = build_circuit(
        graph,
        public_input=any(tensor.name == "input" for tensor in package.public),
        logrows=package.logrows,
        challenged=any(tensor.challenge for tensor in package.public),
        commit_input=any(name == COMMITTED_INPUT for name, _ in package.committed),
        lookups=any(tensor.name == "anchor" for tensor in package.public),
    )
    sample = lowered.witness(sample_input(graph))
    # The keys, with a proving key among them, live no longer than this block.
    with TemporaryDirectory(prefix="mambaint-") as folder:
        derived = make_keys(lowered.circuit, sample, srs, Path(folder)).package(package.statement)
    derived = replace(derived, mambaint_version=package.mambaint_version, srs_kind=package.srs_kind)
    if derived.vk != package.vk:
        return OTHER_KEY
    others = [f.name for f in fields(Package) if getattr(derived, f.name) != getattr(package, f.name)]
    return f"{others[0]} of the verifier package is not that of this model" if others else ""


def _named_srs(package: Package, srs_path: Path | None, cache: Path | None) -> Srs:
    path = find_srs(package.srs_sha256, package.logrows, srs_path, cache)
    return Srs(path, package.srs_kind, package.srs_sha256, package.logrows)
