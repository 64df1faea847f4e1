"""Checking a proof and, with the model at hand, that the verifier package is really that model's.

The verifying key is a deterministic function of the integer graph, EZKL's version and the SRS: it is made
anew and compared to the byte. So is everything else of the package but its description for people.
"""

from __future__ import annotations

from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

from circuits.circuit import COMMITTED_INPUT, Witness
from circuits.lowering import LoweredCircuit, build_circuit
from circuits.sample import sample_input
from circuits.segment import Segment, reduction
from circuits.stages import chain_forms, cut_points
from mamba_int.graph import Graph
from zk.chain_package import ChainPackage, read_chain_package
from zk.keys import make_keys
from zk.package import Package, read_package
from zk.prove_chain import first_commitment, first_state, sample_witness
from zk.srs import Srs, find_srs
from zk.verify import Verdict, check, open_proof, read_proof
from zk.verify_chain import check_chain

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


def verify_chain_rederived(
    proof_path: Path,
    package_path: Path,
    graph: Graph,
    expected_model_id: str | None = None,
    srs_path: Path | None = None,
    cache: Path | None = None,
    workers: int = 1,
) -> Verdict:
    """:func:`zk.verify_chain.verify_chain`, and then derive the chain's package anew from the model.

    Args and errors as for :func:`verify_rederived`; ``workers`` as for ``verify_chain``.
    """
    package, digest = read_chain_package(package_path)
    with open_proof(proof_path) as stream:
        verdict = check_chain(stream, package, digest, expected_model_id, workers)
    if not verdict.valid:
        return verdict
    reason = chain_fault(package, graph, srs_path, cache)
    return verdict.refused(reason) if reason else verdict


def package_fault(
    package: Package, graph: Graph, srs_path: Path | None = None, cache: Path | None = None
) -> str:
    """Why a package is not that of a model; empty if it is. Its statement for people is not compared."""
    if package.model_id != graph.model_id:
        return f"the trusted package is for model {package.model_id}, not {graph.model_id}"
    srs = _named_srs(package, srs_path, cache)
    lowered = _lowered(package, graph)
    return _key_fault(package, lowered, lowered.witness(sample_input(graph)), srs)


def chain_fault(
    package: ChainPackage, graph: Graph, srs_path: Path | None = None, cache: Path | None = None
) -> str:
    """Why a chain's package is not that of a model; empty if it is. See :func:`package_fault`."""
    if package.model_id != graph.model_id:
        return f"the trusted package is for model {package.model_id}, not {graph.model_id}"
    ends, steps = reduction(graph) is not None, package.segment_steps
    if ends != (package.head is not None) or package.total_steps != (graph.seq_len if ends else 0):
        return "the trusted package is for sequences of another form than this model's"
    if not set(package.stage_starts[1:]) <= set(cut_points(graph, package.greedy)):
        return "its stages are not stages of this model"
    edges = (*package.stage_starts, len(graph.nodes))
    form = Segment(steps, hidden=package.hides_states, greedy=package.greedy)
    forms = chain_forms(graph, tuple(range(*edge) for edge in pairwise(edges)), form)
    bodies = forms[: len(package.stages)]
    for circuit, own, first in zip(package.stages, bodies, package.first_states, strict=True):
        srs = _named_srs(circuit, srs_path, cache)
        lowered = _lowered(circuit, graph, own)
        reason = _key_fault(circuit, lowered, sample_witness(graph, lowered, steps), srs)
        if reason:
            return reason
        point = first_commitment(lowered, circuit, srs.path) if package.hides_states else ""
        if first != (point or tuple(first_state(lowered).tolist())):
            return "the first state is not that of this model"
    if package.head is None:
        return ""
    srs = _named_srs(package.head, srs_path, cache)
    lowered = _lowered(package.head, graph, forms[-1])
    return _key_fault(package.head, lowered, sample_witness(graph, lowered, steps), srs)


def _lowered(package: Package, graph: Graph, segment: Segment | None = None) -> LoweredCircuit:
    """The circuit of the form that a package has."""
    return build_circuit(
        graph,
        public_input=any(tensor.name == "input" for tensor in package.public),
        logrows=package.logrows,
        challenged=any(tensor.challenge for tensor in package.public),
        commit_input=any(name == COMMITTED_INPUT for name, _ in package.committed),
        lookups=any(tensor.name == "anchor" for tensor in package.public),
        segment=segment,
    )


def _key_fault(package: Package, lowered: LoweredCircuit, sample: Witness, srs: Srs) -> str:
    """What of a package differs from that of a circuit; empty if nothing does."""
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
