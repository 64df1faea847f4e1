"""Checking a chain of segment proofs against a trusted package, as one statement about one sequence.

Fails closed, like ``zk.verify``. Every segment is checked with instances that are rebuilt here: its place in
the chain, the state before it (the package's for the first, that of the segment before for the others), the
state after it, and what crosses between its stages. A segment that was dropped, doubled, moved, taken from
another chain or made from another state was proved with other instances, and does not verify.
"""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import BinaryIO

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
from mamba_int.errors import MambaintError
from zk.chain_package import LINKS, ChainPackage, State, read_chain_package
from zk.chain_proof import ChainHeader, StageProof, Stages, read_chain
from zk.challenge import POINT_BYTES
from zk.package import MAX_REASON, Package
from zk.proof import InvalidProof
from zk.verify import Verdict, check_model, check_package, check_segment, open_proof, require_version

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
    with open_proof(proof_path) as stream:
        return check_chain(stream, package, digest, expected_model_id, workers, only)


def check_chain(
    stream: BinaryIO,
    package: ChainPackage,
    package_sha256: str,
    expected_model_id: str | None = None,
    workers: int = 1,
    only: range | None = None,
) -> Verdict:
    """:func:`verify_chain` on an open file, of which a few segments at a time are in memory."""
    require_version(package.last)
    started = time.perf_counter()
    public: dict[str, list[int]] = {}
    statement = dict(package.last.statement)
    reason = ""
    try:
        header, segments = read_chain(stream)
        _check_header(header, package, package_sha256, expected_model_id)
        count = -(-header.steps // package.segment_steps)
        places = range(count) if only is None else only
        if not 0 <= places.start < places.stop <= count:
            raise InvalidProof(f"it has segments 0 to {count - 1}")
        found: dict[str, list[int]] = {}
        for shown in _checked(header, segments, count, package, places, workers):
            for name, values in shown.items():
                if name == "logits" and not package.last.statement.get("logits_of_every_step"):
                    # Of a model that ends in the last step, only what it says at the end.
                    found[name] = []
                found.setdefault(name, []).extend(values)
        if only is not None:
            raise InvalidProof(
                f"{PARTIAL}: segments {places.start} to {places.stop - 1} of {count} verify where they "
                "stand; nothing is said of the others, so this is no proof of the sequence"
            )
        public = _public_values(found, header, count, package)
        statement |= {"seq_len": header.steps, "segments": count}
        if header.prompt:
            statement["prompt_steps"] = header.prompt
        if package.scored:
            statement["score_frac"] = package.score_frac
    except InvalidProof as error:
        reason = str(error)[:MAX_REASON]
    except BrokenProcessPool as error:
        raise MambaintError(
            "a process that checked segments was killed, most likely for lack of memory", "give --workers 1"
        ) from error
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


def _check_header(header: ChainHeader, package: ChainPackage, digest: str, expected: str | None) -> None:
    check_model(header.model_id, package.model_id, expected)
    check_package(header.verifier_package, digest)
    # The first token has no step before it.
    if not (1 <= header.prompt < header.steps if package.reads_tokens else header.prompt == 0):
        raise InvalidProof(
            f"a prompt of {header.prompt} of {header.steps} steps is none for this model's package"
        )
    if package.total_steps and header.steps != package.total_steps:
        raise InvalidProof(
            f"it is about {header.steps} steps, and the model takes {package.total_steps}: the chain is "
            "incomplete or too long"
        )


def _checked(
    header: ChainHeader,
    segments: Iterator[Stages],
    count: int,
    package: ChainPackage,
    places: range,
    workers: int,
) -> Iterator[dict[str, list[int]]]:
    """What the segments at these places show, in order, each after it was checked: so the first fault is the
    one that is named."""
    running: deque[tuple[Future[None], dict[str, list[int]]]] = deque()

    def finished(most: int) -> Iterator[dict[str, list[int]]]:
        while len(running) > most:
            future, shown = running.popleft()
            future.result()
            yield shown

    before: Stages | None = None
    found = 0
    with _checkers(workers) as pool:
        for i, segment in enumerate(segments):
            found = i + 1
            if found > count:
                break
            if len(segment) != len(package.stages):
                raise InvalidProof(f"segment {i} does not have {len(package.stages)} stages")
            if i in places:
                future = pool.submit(_check_place, header, i, count, segment, before, package)
                # No two stages show the same: the first has the input, the last all else.
                running.append((future, {k: v for stage in segment for k, v in stage.public.items()}))
            before = segment
            yield from finished(2 * workers)
        yield from finished(0)
    if found != count:
        raise InvalidProof(
            f"{header.steps} steps are {count} segments of {package.segment_steps}, and it has "
            f"{'more' if found > count else found}"
        )


def _checkers(workers: int) -> Executor:
    """Processes, since EZKL holds Python's lock while it verifies; one alone is this one."""
    if workers == 1:
        return ThreadPoolExecutor(1)
    # Forked, a child would wait for ever for the threads of EZKL that it has not got.
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, context, _leave_interrupts_to_the_parent)


def _leave_interrupts_to_the_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _check_place(
    header: ChainHeader,
    i: int,
    count: int,
    segment: Stages,
    segment_before: Stages | None,
    package: ChainPackage,
) -> None:
    """Check all stages of the segment at this position of so many."""
    last = i == count - 1
    place = header.chain, i, header.steps - i * package.segment_steps if last else 0
    flags = token_flags(header.prompt, header.steps, i, package.segment_steps, package.scored)
    received: State = ()
    for d, (stage, circuit) in enumerate(zip(segment, package.stages, strict=True)):
        ends = last and d == len(package.stages) - 1
        own = package.head if ends and package.head is not None else circuit
        before = (
            package.first_states[d] if segment_before is None else state_after(segment_before[d], circuit)
        )
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


def _public_values(
    found: dict[str, list[int]], header: ChainHeader, count: int, package: ChainPackage
) -> dict[str, list[int]]:
    """What all segments show together, without padding."""
    result: dict[str, list[int]] = {}
    for name, values in sorted(found.items()):
        if name == "logits" and not package.last.statement.get("logits_of_every_step"):
            result[name] = values
        elif name == SCORE:
            # All but the last show 0.
            result[name] = values[-1:]
        elif name == TOKENS:
            result[name] = values[header.prompt : header.steps]
        else:
            result[name] = values[: len(values) // (count * package.segment_steps) * header.steps]
    return result
