"""Checking a chain of segment proofs against a trusted package, as one statement about one sequence.

Fails closed, like ``zk.verify``. Every segment is checked with instances that are rebuilt here: its place in
the chain, the state before it (the package's for the first, that of the segment before for the others), the
state after it, and what crosses between its stages. A segment that was dropped, doubled, moved, taken from
another chain or made from another state was proved with other instances, and does not verify.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from circuits.circuit import (
    ACTIVATIONS_IN,
    ACTIVATIONS_OUT,
    CHAIN,
    GENERATED,
    LAST,
    SCORE,
    SCORED,
    STATE_IN,
    STATE_OUT,
    TOKENS,
)
from zk.chain_package import LINKS, ChainPackage, State, read_chain_package
from zk.chain_proof import ChainProof, StageProof, decode_chain_proof
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
    require_version(package.last)
    started = time.perf_counter()
    public: dict[str, list[int]] = {}
    statement = dict(package.last.statement)
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
        if package.scored:
            statement["score_frac"] = package.score_frac
    except InvalidProof as error:
        reason = str(error)[:MAX_REASON]
    return Verdict(
        valid=not reason,
        reason=reason,
        model_id=package.model_id,
        circuit_id=package.last.circuit_id,
        public=public,
        commitments={},
        statement=statement,
        srs_kind=package.last.srs_kind,
        package_sha256=package_sha256,
        verify_seconds=time.perf_counter() - started,
    )


def _check_form(proof: ChainProof, package: ChainPackage, digest: str, expected: str | None) -> None:
    check_model(proof.model_id, package.model_id, expected)
    check_package(proof.verifier_package, digest)
    count, length = len(proof.segments), package.segment_steps
    if any(len(segment) != len(package.stages) for segment in proof.segments):
        raise InvalidProof(f"a segment does not have {len(package.stages)} stages")
    if not (count - 1) * length < proof.steps <= count * length:
        raise InvalidProof(f"{count} segments of {length} steps are not a sequence of {proof.steps}")
    # The first token has no step before it.
    if not (1 <= proof.prompt < proof.steps if package.reads_tokens else proof.prompt == 0):
        raise InvalidProof(
            f"a prompt of {proof.prompt} of {proof.steps} steps is none for this model's package"
        )
    if package.total_steps and proof.steps != package.total_steps:
        raise InvalidProof(
            f"it is about {proof.steps} steps, and the model takes {package.total_steps}: the chain is "
            "incomplete or too long"
        )


def _check_place(proof: ChainProof, i: int, package: ChainPackage) -> None:
    """Check all stages of the segment at this position."""
    last = i == len(proof.segments) - 1
    place = proof.chain, i, proof.steps - i * package.segment_steps if last else 0
    flags = token_flags(proof.prompt, proof.steps, i, package.segment_steps, package.scored)
    received: State = ()
    for d, (stage, circuit) in enumerate(zip(proof.segments[i], package.stages, strict=True)):
        ends = last and d == len(package.stages) - 1
        own = package.head if ends and package.head is not None else circuit
        before = package.first_states[d] if i == 0 else state_after(proof.segments[i - 1][d], circuit)
        try:
            check_stage(stage, place, before, received, own, flags)
        except InvalidProof as error:
            where = f"segment {i}" + (f", stage {d}" if len(package.stages) > 1 else "")
            raise InvalidProof(f"{where}: {error}") from error
        received = handed_on(stage, own)


def state_after(stage: StageProof, circuit: Package) -> State:
    """The state that a stage leaves to the next segment: shown beside it, or the commitment in its proof."""
    return point_of(stage, circuit, STATE_OUT) or stage.state


def handed_on(stage: StageProof, circuit: Package) -> State:
    """The activations that a stage hands to the next one, likewise."""
    return point_of(stage, circuit, ACTIVATIONS_OUT) or stage.activations


def point_of(stage: StageProof, circuit: Package, link: str) -> str:
    """The commitment to one of the links at the beginning of a proof; empty if it is not committed to."""
    names = [committed for committed, _ in circuit.committed]
    if link not in names:
        return ""
    first = names.index(link) * POINT_BYTES
    return stage.proof[first : first + POINT_BYTES].hex()


def token_flags(prompt: int, steps: int, position: int, segment_steps: int, ahead: bool) -> list[int]:
    """Of the tokens of the segment at this position, which count: those after the prompt without padding;
    none where there is no prompt.

    Args:
        ahead: count, at each step, not its own token but the one after it, which it scores.
    """
    first = position * segment_steps + ahead
    return [int(0 < prompt <= place < steps) for place in range(first, first + segment_steps)]


def check_stage(
    stage: StageProof,
    place: tuple[int, int, int],
    before: State,
    received: State,
    circuit: Package,
    flags: list[int],
) -> None:
    """Check one stage of a segment at its place.

    Args:
        stage: with what leaves it, if that is shown.
        place: the number of the chain, the position, and of the last segment its steps, else 0.
        before: the state before it.
        received: the activations of the stage before; empty for the first.
        circuit: package of its circuit.
        flags: which of its tokens count, where generation or a score is proved: see :func:`token_flags`.

    Raises:
        InvalidProof: if it does not verify.
    """
    shown = {tensor.name for tensor in circuit.public}
    committed = {name for name, _ in circuit.committed}
    linked = {CHAIN: list(place)}
    if GENERATED in shown:
        linked[GENERATED] = flags
    if SCORED in shown:
        linked |= {SCORED: flags, LAST: [int(place[2] > 0)]}
    for name, value, source in (
        (STATE_IN, before, "state that the segment before it"),
        (ACTIVATIONS_IN, received, "activations that the stage before it"),
    ):
        if name in shown:
            linked[name] = list(value) if isinstance(value, tuple) else []
        elif name in committed and point_of(stage, circuit, name) != value:
            raise InvalidProof(f"it does not commit to the {source} hands on")
    for name, own in ((STATE_OUT, stage.state), (ACTIVATIONS_OUT, stage.activations)):
        if name in shown:
            linked[name] = list(own)
        elif own:
            raise InvalidProof(f"it shows {name}, which its circuit does not")
    known = sorted(stage.public.keys() & {CHAIN, GENERATED, SCORED, LAST, *LINKS})
    if known:
        raise InvalidProof(f"it states its own {known[0]}")
    check_segment(stage.proof, stage.public | linked, circuit)


def _public_values(proof: ChainProof, package: ChainPackage) -> dict[str, list[int]]:
    """The logits, of every step or of the last segment, and the input if it is public, without padding."""
    steps_of_last = proof.steps - (len(proof.segments) - 1) * package.segment_steps
    # No two stages show the same: the first has the input, the last all else.
    shown = [{k: v for stage in segment for k, v in stage.public.items()} for segment in proof.segments]
    result: dict[str, list[int]] = {}
    for name in sorted({name for segment in shown for name in segment}):
        if name == "logits" and not package.last.statement.get("logits_of_every_step"):
            result[name] = list(shown[-1][name])
            continue
        if name == SCORE:
            # All others show 0.
            result[name] = list(shown[-1][name])
            continue
        values = [segment[name] for segment in shown]
        if name == TOKENS:
            result[name] = [v for part in values for v in part][proof.prompt : proof.steps]
            continue
        a_step = len(values[-1]) // package.segment_steps
        result[name] = [v for part in values[:-1] for v in part] + values[-1][: a_step * steps_of_last]
    return result
