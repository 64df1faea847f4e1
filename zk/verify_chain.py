"""Checking a chain of segment proofs against a trusted package, as one statement about one sequence.

Fails closed, like ``zk.verify``. Every segment is checked with instances that are rebuilt here: its place in
the chain, the state before it (the package's for the first, that of the segment before for the others), and
the state after it. A segment that was dropped, doubled, moved, taken from another chain or made from another
state was proved with other instances, and does not verify.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from circuits.circuit import CHAIN, GENERATED, STATE_IN, STATE_OUT, TOKENS
from zk.chain_package import ChainPackage, State, read_chain_package
from zk.chain_proof import ChainProof, SegmentProof, decode_chain_proof
from zk.challenge import POINT_BYTES
from zk.package import MAX_REASON, Package
from zk.proof import InvalidProof
from zk.verify import Verdict, check_model, check_package, check_segment, read_proof, require_version

PARTIAL = "partial"
"""The first word of the reason where all that was asked for verifies, but not all was asked for."""


def verify_chain(
    proof_path: Path,
    package_path: Path,
    expected_model_id: str | None = None,
    workers: int = 1,
    only: range | None = None,
) -> Verdict:
    """Check the proof file of a chain against the package file of one; see :func:`zk.verify.verify`.

    Args:
        proof_path: the proof.
        package_path: trusted.
        expected_model_id: the model the proof has to be about, if you know it.
        workers: segments that are checked at a time.
        only: check the segments at these positions alone: the verdict says so, and is not valid.

    Raises:
        MambaintError: if the check cannot be made.
    """
    package, digest = read_chain_package(package_path)
    return check_chain(read_proof(proof_path), package, digest, expected_model_id, workers, only)


def check_chain(
    raw_proof: bytes,
    package: ChainPackage,
    package_sha256: str,
    expected_model_id: str | None = None,
    workers: int = 1,
    only: range | None = None,
) -> Verdict:
    """:func:`verify_chain` on content already in memory."""
    require_version(package.segment)
    started = time.perf_counter()
    public: dict[str, list[int]] = {}
    statement = dict(package.segment.statement)
    reason = ""
    try:
        proof = decode_chain_proof(raw_proof)
        _check_form(proof, package, package_sha256, expected_model_id)
        places = range(len(proof.segments)) if only is None else only
        if not 0 <= places.start < places.stop <= len(proof.segments):
            raise InvalidProof(f"it has segments 0 to {len(proof.segments) - 1}")
        with ThreadPoolExecutor(workers) as pool:
            # In order, so that the first fault is the one that is named.
            for _ in pool.map(lambda i: _check_place(proof, i, package), places):
                pass
        if only is not None:
            raise InvalidProof(
                f"{PARTIAL}: segments {places.start} to {places.stop - 1} of {len(proof.segments)} verify "
                "where they stand; nothing is said of the others, so this is no proof of the sequence"
            )
        public = _public_values(proof, package)
        statement |= {"seq_len": proof.steps, "segments": len(proof.segments)}
        if proof.prompt:
            statement["prompt_steps"] = proof.prompt
    except InvalidProof as error:
        reason = str(error)[:MAX_REASON]
    return Verdict(
        valid=not reason,
        reason=reason,
        model_id=package.model_id,
        circuit_id=package.segment.circuit_id,
        public=public,
        commitments={},
        statement=statement,
        srs_kind=package.segment.srs_kind,
        package_sha256=package_sha256,
        verify_seconds=time.perf_counter() - started,
    )


def _check_form(proof: ChainProof, package: ChainPackage, digest: str, expected: str | None) -> None:
    check_model(proof.model_id, package.model_id, expected)
    check_package(proof.verifier_package, digest)
    count, length = len(proof.segments), package.segment_steps
    if not (count - 1) * length < proof.steps <= count * length:
        raise InvalidProof(f"{count} segments of {length} steps are not a sequence of {proof.steps}")
    # The first token has no step before it.
    if not (1 <= proof.prompt < proof.steps if package.greedy else proof.prompt == 0):
        raise InvalidProof(
            f"a prompt of {proof.prompt} of {proof.steps} steps is none for this model's package"
        )
    if package.total_steps and proof.steps != package.total_steps:
        raise InvalidProof(
            f"it is about {proof.steps} steps, and the model takes {package.total_steps}: the chain is "
            "incomplete or too long"
        )


def _check_place(proof: ChainProof, i: int, package: ChainPackage) -> None:
    last = i == len(proof.segments) - 1
    circuit = package.head if last and package.head is not None else package.segment
    before = package.first_state if i == 0 else state_after(proof.segments[i - 1], package.segment)
    steps = proof.steps - i * package.segment_steps if last else 0
    flags = greedy_flags(proof.prompt, proof.steps, i, package.segment_steps)
    try:
        check_one(proof.segments[i], (proof.chain, i, steps), before, circuit, flags)
    except InvalidProof as error:
        raise InvalidProof(f"segment {i}: {error}") from error


def state_after(segment: SegmentProof, circuit: Package) -> State:
    """The state that a segment hands on: shown beside it, or the commitment in its proof."""
    point = _point(segment, circuit, STATE_OUT)
    return segment.state if point is None else point


def state_before(segment: SegmentProof, circuit: Package, shown: tuple[int, ...]) -> State:
    """The state that a segment starts from: ``shown`` if states are, or the commitment in its proof."""
    point = _point(segment, circuit, STATE_IN)
    return shown if point is None else point


def _point(segment: SegmentProof, circuit: Package, name: str) -> str | None:
    names = [committed for committed, _ in circuit.committed]
    if name not in names:
        return None
    first = names.index(name) * POINT_BYTES
    return segment.proof[first : first + POINT_BYTES].hex()


def greedy_flags(prompt: int, steps: int, position: int, segment_steps: int) -> list[int]:
    """Of the steps of the segment at this position, which are greedy: those after the prompt without padding;
    none where no generation is proved."""
    places = range(position * segment_steps, (position + 1) * segment_steps)
    return [int(0 < prompt <= place < steps) for place in places]


def check_one(
    segment: SegmentProof,
    place: tuple[int, int, int],
    before: State,
    circuit: Package,
    flags: list[int],
) -> None:
    """Check one segment at its place.

    Args:
        segment: with the state after it, if that is shown.
        place: the number of the chain, the position, and of the last segment its steps, else 0.
        before: the state before it.
        circuit: package of its circuit.
        flags: which of its steps are greedy, where generation is proved.

    Raises:
        InvalidProof: if it does not verify.
    """
    shown = {tensor.name for tensor in circuit.public}
    linked = {CHAIN: list(place)}
    if GENERATED in shown:
        linked[GENERATED] = flags
    if isinstance(before, str):
        if _point(segment, circuit, STATE_IN) != before:
            raise InvalidProof("it does not commit to the state that the segment before it hands on")
    else:
        linked[STATE_IN] = list(before)
    if STATE_OUT in shown:
        linked[STATE_OUT] = list(segment.state)
    elif segment.state:
        raise InvalidProof("it shows a state that its circuit does not")
    known = sorted(segment.public.keys() & {CHAIN, STATE_IN, STATE_OUT, GENERATED})
    if known:
        raise InvalidProof(f"it states its own {known[0]}")
    check_segment(segment.proof, segment.public | linked, circuit)


def _public_values(proof: ChainProof, package: ChainPackage) -> dict[str, list[int]]:
    """The logits, of every step or of the last segment, and the input if it is public, without padding."""
    steps_of_last = proof.steps - (len(proof.segments) - 1) * package.segment_steps
    result: dict[str, list[int]] = {}
    for name in sorted({name for segment in proof.segments for name in segment.public}):
        if name == "logits" and not package.segment.statement.get("logits_of_every_step"):
            result[name] = list(proof.segments[-1].public[name])
            continue
        values = [segment.public[name] for segment in proof.segments]
        if name == TOKENS:
            result[name] = [v for part in values for v in part][proof.prompt : proof.steps]
            continue
        a_step = len(values[-1]) // package.segment_steps
        result[name] = [v for part in values[:-1] for v in part] + values[-1][: a_step * steps_of_last]
    return result
