"""Proving a sequence as a chain of segments: a key pair for each stage of the model, and one for an end.

Segments are independent jobs once their states are known, and those cost no proof: the witnesses are computed
one after the other, ahead of the provers. A finished proof is written to the chain's folder at once, under a
name made of its content; a run that was killed goes on from what it finds there, after checking it.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from circuits.circuit import (
    ACTIVATIONS_IN,
    ACTIVATIONS_OUT,
    CHAIN_BITS,
    GENERATED,
    SALTS,
    SCORE,
    SCORED,
    STATE_IN,
    STATE_OUT,
    TOKENS,
    Witness,
)
from circuits.lowering import LoweredCircuit, build_circuit
from circuits.segment import (
    ENDS,
    FLAGS,
    FOLLOWING,
    LARGEST_TOTAL,
    PLACE,
    TOTAL,
    Segment,
    by_name,
    initial_state,
    leaving,
    reduction,
)
from circuits.stages import chain_forms, cut_stages
from mamba_int.decoding_state import DecodingState
from mamba_int.errors import MambaintError
from mamba_int.files import (
    canonical_json,
    parse_json,
    read_bytes,
    read_json,
    replacing,
    write_bytes,
    write_json,
)
from mamba_int.graph import Graph, IntArray
from mamba_int.interpreter import evaluate, evaluate_step
from mamba_int.log_score import LogScore
from zk import field
from zk.chain_package import ChainPackage, decode_chain_package
from zk.chain_proof import ChainHeader, StageProof, Stages, decode_stage, encoded
from zk.identity import is_sha256
from zk.keys import Keys, make_keys
from zk.local_provers import LocalProvers
from zk.package import Package
from zk.process import JobKilled, run_job
from zk.proof import InvalidProof
from zk.provable import statement
from zk.provers import Provers
from zk.srs import check_choice, chosen_srs
from zk.verify_chain import check_chain, check_stage, point_of, token_flags

FORMAT = "mambaint-chain-folder"
SECRET, PROOF = "chain.json", "proof.json"
"""In a chain's folder, beside the finished stages."""
VERSION = 1
PURPOSE = "secret until the chain is proved: with this seed anyone can test guesses of a hidden input"


@dataclass(frozen=True)
class StageCircuit:
    """One of a chain's circuits with its keys."""

    lowered: LoweredCircuit
    keys: Keys
    package: Package


@dataclass(frozen=True)
class ProvableChain:
    """A model with the circuits of its segments.

    Attributes:
        graph: the integer graph.
        steps: of a segment.
        stages: the circuits of every segment.
        head: the circuit that stands for the last stage in the last segment; None where that is like others.
        package: bytes of the verifier package.
    """

    graph: Graph
    steps: int
    stages: tuple[StageCircuit, ...]
    head: StageCircuit | None
    package: bytes

    @property
    def circuits(self) -> tuple[StageCircuit, ...]:
        """All of them."""
        return self.stages if self.head is None else (*self.stages, self.head)

    @property
    def hidden(self) -> bool:
        """Whether proofs commit to the links instead of showing them."""
        return any(group.name == STATE_IN for group in self.stages[0].lowered.circuit.inputs)

    @property
    def greedy(self) -> bool:
        """Whether proofs show what was generated instead of logits."""
        return self._shows(GENERATED)

    @property
    def scored(self) -> bool:
        """Whether proofs show the log-score of a text instead of logits."""
        return self._shows(SCORED)

    def _shows(self, name: str) -> bool:
        return any(tensor.name == name for tensor in self.stages[-1].lowered.circuit.public)


@dataclass(frozen=True)
class ChainResult:
    """A chain that passed its own check.

    Attributes:
        file: ``proof.json``, in the chain's folder, to be moved from there.
        steps: of the sequence. segments: how many there are. stages: of each.
        proved: how many proofs were made now, rather than found.
        prove_seconds: of the proofs made now, in sum. wall_seconds: until all were there.
        job_seconds: of each proof made now, as they ended: from the start of its process to its end.
        peak_bytes: largest memory of one proving process.
        public: as in the verdict.
    """

    file: Path
    steps: int
    segments: int
    stages: int
    proved: int
    prove_seconds: float
    job_seconds: tuple[float, ...]
    wall_seconds: float
    peak_bytes: int
    public: dict[str, list[int]]


def prepare_chain(
    graph: Graph,
    steps: int,
    *,
    stages: int = 1,
    public_input: bool = False,
    public_states: bool = False,
    greedy: bool = False,
    scored: bool = False,
    logrows: int | None = None,
    srs_path: Path | None = None,
    srs_sha256: str | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> ProvableChain:
    """Build the circuits of a chain, and get their keys: from the cache, or made now.

    Args:
        graph: the model.
        steps: of a segment; for a model that ends in a sum or maximum over time, a part of ``graph.seq_len``.
        stages: to cut the model into by layers, each with keys of its own.
        public_input: show the input in proofs.
        public_states: show the states and activations between circuits, which say much of the input, instead
            of committing.
        greedy: prove which tokens a language model generated instead of its logits.
        scored: prove the log-score of a text instead of logits; not both.
        logrows: make circuits of 2^logrows rows; None for the fewest that hold each.
        srs_path, srs_sha256: SRS of a ceremony and its hash; None for one made here.
        say: told what is being done.

    Raises:
        MambaintError: for a length that cannot be, and any fault of lowering, the SRS and key generation.
    """
    check_choice(srs_path, srs_sha256)
    if greedy and scored:
        raise MambaintError("a chain proves what was generated or a score, not both", "make a proof of each")
    ended = reduction(graph) is not None
    if ended and (graph.seq_len % steps or graph.seq_len == steps):
        raise MambaintError(
            f"segments of {steps} steps do not make up the {graph.seq_len} steps of the model",
            f"choose a smaller divisor of {graph.seq_len}",
        )
    stated = statement(graph, public_input, False, "table") | {
        "segment_steps": steps,
        "states_are_public": public_states,
        "greedy": greedy,
        "scored": scored,
        "logits_of_every_step": graph.types[graph.output].shape[:1] == (graph.seq_len,) and not ended,
    }

    def lowered_at(form: Segment, rows: int | None) -> LoweredCircuit:
        where = "the last segment" if form.head else "a segment"
        if form.nodes is not None and stages > 1:
            where = f"stage {[part.start for part in parts].index(form.nodes.start)} of {where}"
        say(f"building the circuit of {where}")
        return build_circuit(graph, public_input, rows, segment=form)

    def made(lowered: LoweredCircuit) -> StageCircuit:
        k = lowered.circuit.logrows
        srs = chosen_srs(srs_path, srs_sha256, k)
        say(f"keys for {lowered.circuit.rows:,} rows of 2^{k} (made once)")
        keys = make_keys(lowered.circuit, sample_witness(graph, lowered, steps), srs)
        return StageCircuit(lowered, keys, keys.package(stated))

    form = Segment(steps, hidden=not public_states, greedy=greedy, scored=scored)
    parts = cut_stages(graph, stages, form.reads_tokens)
    forms = chain_forms(graph, parts, form)
    lowered = [lowered_at(form, logrows) for form in forms]
    most = max(circuit.circuit.logrows for circuit in lowered)
    if not public_states:
        # Commitments of circuits with other numbers of rows cannot be compared.
        lowered = [
            circuit if circuit.circuit.logrows == most else lowered_at(form, most)
            for form, circuit in zip(forms, lowered, strict=True)
        ]
    circuits = [made(circuit) for circuit in lowered]
    body, head = tuple(circuits[: len(parts)]), circuits[-1] if ended else None
    package = ChainPackage(
        stages=tuple(stage.package for stage in body),
        stage_starts=tuple(part.start for part in parts),
        head=None if head is None else head.package,
        segment_steps=steps,
        total_steps=graph.seq_len if ended else 0,
        first_states=tuple(
            tuple(first_state(stage.lowered).tolist())
            if public_states
            else first_commitment(stage.lowered, stage.package, stage.keys.srs.path)
            for stage in body
        ),
        score_frac=LogScore.of(graph).score_frac if scored else 0,
    )
    return ProvableChain(graph, steps, body, head, package.encode())


FIRST_SALTS = tuple(range(1, SALTS + 1))
"""Of the first state, which is no secret; not zero, since EZKL has no name for the commitment to zeros."""


def first_state(lowered: LoweredCircuit) -> IntArray:
    """The state of a stage before the first step, flat."""
    assert lowered.carried is not None
    return initial_state(lowered.carried.shapes, lowered.carried.first)


def sample_witness(graph: Graph, lowered: LoweredCircuit, steps: int) -> Witness:
    """An honest witness of a stage: the lowest input, from the first state."""
    low, features = graph.input.integer("low"), graph.input.integer("features")
    inputs = np.full((steps, features) if features else (steps,), low, np.int64)
    carried = lowered.carried
    assert carried is not None
    received = [np.zeros(0, np.int64)]
    for name in carried.activations_in:
        cells = carried.entered([name])
        lowest, highest = lowered.cells.bounds(cells)
        received.append(np.full(cells.size, min(max(0, lowest), highest), np.int64))
    return segment_witness(lowered, inputs, first_state(lowered), np.concatenate(received), (0, 0, 0))


def first_commitment(lowered: LoweredCircuit, package: Package, srs: Path) -> str:
    """The commitment to the state before the first segment, as :attr:`ChainPackage.first_states` has it.

    Args:
        lowered: the circuit of a stage. package: its verifier package. srs: the full SRS file.
    """
    values = (*_padded_state(lowered, first_state(lowered)), *FIRST_SALTS)
    job = {
        "values": [field.encode(value) for value in values],
        "settings": package.settings.hex(),
        "vk": package.vk.hex(),
        "srs": str(srs),
    }
    point: str = run_job("commit", job, what="committing", timeout=300)["commitment"]
    return point


def _padded_state(lowered: LoweredCircuit, state: IntArray) -> list[int]:
    """A flat state as its ONNX input holds it: odd parts have a spare cell."""
    assert lowered.carried is not None
    values: list[int] = []
    for part in by_name(lowered.carried.shapes, state).values():
        values += [*part.ravel().tolist(), *[0] * (part.size % 2)]
    return values


def segment_witness(
    lowered: LoweredCircuit,
    inputs: IntArray,
    state: IntArray,
    received: IntArray,
    place: tuple[int, int, int],
    flags: list[int] | None = None,
    following: int = 0,
) -> Witness:
    """The witness of one stage of a segment.

    Args:
        lowered: its circuit.
        inputs: steps of the segment.
        state: before it, flat.
        received: the activations of the stage before, flat.
        place: the number of the chain, the position, and of the last segment its steps, else 0.
        flags: which tokens count, where generation or a score is proved; default: none.
        following: the token after the segment, where a score is proved and there is one.
    """
    assert lowered.carried is not None
    given = by_name(lowered.carried.shapes, state) | {PLACE: np.array(place, dtype=object)}
    given |= by_name(lowered.carried.activations_in, received)
    given[FLAGS] = np.array(flags if flags is not None else [0] * len(inputs), np.int64)
    given |= {FOLLOWING: np.array([following]), ENDS: np.array([int(place[2] > 0)])}
    return lowered.witness(inputs, given=given)


@dataclass(frozen=True)
class ChainSecret:
    """What a chain's number and the salts of its states come from: drawn once, kept while it is proved."""

    seed: bytes

    @property
    def number(self) -> int:
        """Of the chain; public in the proof."""
        return int.from_bytes(self.tag("number")[: CHAIN_BITS // 8], "big")

    def salts(self, link: str, position: int, stage: int, values: IntArray) -> list[int]:
        """Of the state or the activations that enter this stage of the segment at this position. The same
        salts never stand behind two of them: their commitments would show the difference."""
        if link == STATE_IN and position == 0:
            return list(FIRST_SALTS)
        own = self.tag(link, position, stage, values.tolist())
        parts = (hmac.digest(own, str(i).encode(), "sha512") for i in range(SALTS))
        return [int.from_bytes(part, "big") % field.PRIME for part in parts]

    def tag(self, *content: Any) -> bytes:
        """A name for what the content is, which says nothing to who has no seed."""
        return hmac.digest(self.seed, canonical_json(list(content)), "sha512")


@dataclass(frozen=True)
class Job:
    """One stage of a segment to be proved: independent of all others, and named by its content.

    Attributes:
        place: the number of the chain, the position, and of the last segment its steps, else 0.
        stage: which one.
        flags: which of its tokens count. circuit: its circuit. witness: the values.
        name: of the file that holds its proof.
    """

    place: tuple[int, int, int]
    stage: int
    flags: list[int]
    circuit: StageCircuit
    witness: Witness
    name: str


def cut(pieces: Iterable[IntArray], steps: int) -> Iterator[tuple[IntArray, IntArray | None]]:
    """Inputs as they come, cut into segments: each but the last whole, and the step after it, or None.

    Only after the last segment is known can it be yielded, so one segment is always held back.

    Args:
        pieces: int64 [any number of steps, ...].
        steps: of a segment.
    """
    held: list[IntArray] = []
    for piece in pieces:
        held.append(piece)
        if sum(map(len, held)) > steps:
            joined = np.concatenate(held)
            whole = (len(joined) - 1) // steps * steps
            for start in range(0, whole, steps):
                yield joined[start : start + steps], joined[start + steps]
            held = [joined[whole:]]
    rest = np.concatenate(held) if held else np.zeros(0, np.int64)
    if not len(rest):
        raise MambaintError("the input has no steps", "give at least one")
    yield rest, None


def jobs_of(
    chain: ProvableChain, pieces: Iterable[IntArray], secret: ChainSecret, prompt: int = 0
) -> Iterator[Job]:
    """The stages of the segments of a sequence, one after the other, checked against the interpreter.

    Args:
        chain: the circuits.
        pieces: of the input, as in :func:`cut`.
        secret: of the chain.
        prompt: where generation or a score is proved, the steps that were given.

    Raises:
        MambaintError: if the length does not fit, a token is not the greedy one, or the circuits compute
            other integers than the specification: an internal fault.
    """
    states, graph = [first_state(stage.lowered) for stage in chain.stages], chain.graph
    check = _Check(graph, chain.head is not None, LogScore.of(graph) if chain.scored else None)
    start = 0
    for i, (inputs, after_it) in enumerate(cut(pieces, chain.steps)):
        last, following = after_it is None, int(after_it) if chain.scored and after_it is not None else 0
        place = secret.number, i, len(inputs) if last else 0
        if chain.head is not None and (i + 1 == graph.seq_len // chain.steps) != last:
            raise MambaintError(
                f"the input does not have the {graph.seq_len} steps that the model takes", "give that many"
            )
        padding = np.full(
            (chain.steps - len(inputs), *inputs.shape[1:]), graph.input.integer("low"), np.int64
        )
        padded = np.concatenate([inputs, padding])
        start += len(inputs)
        flags = token_flags(prompt, start + (not last), i, chain.steps, chain.scored)
        if last and prompt >= start:
            raise MambaintError(
                f"a prompt of {prompt} tokens leaves nothing after it of {start}", "give a shorter prompt"
            )
        received = np.zeros(0, np.int64)
        for d, circuit in enumerate(chain.stages):
            if last and d == len(chain.stages) - 1 and chain.head is not None:
                circuit = chain.head
            state, lowered = states[d], circuit.lowered
            witness = segment_witness(lowered, padded, state, received, place, flags, following)
            content = [list(place), d, flags, following, *(a.tolist() for a in (padded, state, received))]
            name = secret.tag("segment", *content).hex()[:32]
            assert lowered.carried is not None
            after, handed_on = leaves(lowered, witness, STATE_OUT), leaves(lowered, witness, ACTIVATIONS_OUT)
            if chain.hidden:
                salts = {
                    STATE_IN: secret.salts(STATE_IN, i, d, state),
                    STATE_OUT: secret.salts(STATE_IN, i + 1, d, after),
                    ACTIVATIONS_IN: secret.salts(ACTIVATIONS_IN, i, d, received),
                    ACTIVATIONS_OUT: secret.salts(ACTIVATIONS_IN, i, d + 1, handed_on),
                }
                witness = replace(witness, salts=salts)
            if d == len(chain.stages) - 1:
                check(padded, witness, flags, following, by_name(lowered.carried.shapes, after))
            yield Job(place, d, flags, circuit, witness, f"{name}.json")
            states[d], received = after, handed_on


class _Check:
    """Compares what the circuits show with the interpreter: step by step, or once the input is whole.

    Args:
        graph: the model. whole: it cannot run step by step.
        score: how tokens are scored, where a score is proved.
    """

    def __init__(self, graph: Graph, whole: bool, score: LogScore | None) -> None:
        self._graph = graph
        self._score = score
        self._inputs: list[IntArray] = []
        self._next, self._steps, self._total = -1, 0, 0
        # What follows a last step is no part of the state.
        ends = next((node for node in graph.nodes if node.op == "reduce"), None)
        self._state = None if whole or ends is not None else DecodingState.of(graph, 1)

    def __call__(
        self,
        inputs: IntArray,
        witness: Witness,
        flags: list[int],
        following: int,
        after: Mapping[str, IntArray],
    ) -> None:
        """On the witness of a last stage, whose segment has the steps ``inputs``; it leaves ``after``."""
        if self._state is not None:
            steps = []
            for step, flag in zip(inputs, flags, strict=True):
                if flag and self._score is None and int(step) != self._next:
                    raise MambaintError(
                        f"token {int(step)} at step {self._steps} is not the greedy one, {self._next}",
                        "give what 'mambaint generate --greedy' gives, or a longer prompt",
                    )
                steps.append(evaluate_step(self._graph, step[None], self._state))
                self._next, self._steps = int(steps[-1].argmax()), self._steps + 1
            wanted = np.concatenate(steps)
        else:
            self._inputs.append(inputs)
            if "logits" not in witness.public:
                return
            wanted = evaluate(self._graph, np.concatenate(self._inputs)[None])
        same = "logits" not in witness.public or witness.public["logits"] == wanted.ravel().tolist()
        if self._score is not None:
            scores = self._score(wanted, np.append(inputs[1:], following))
            self._total += sum(int(score) for score, flag in zip(scores, flags, strict=True) if flag)
            if abs(self._total) > LARGEST_TOTAL:
                raise MambaintError("the score of the text is beyond 61 bits", "prove it in parts")
            same = self._total == int(after[TOTAL][0])
        if not same:
            raise MambaintError(
                "the circuits and the interpreter disagree on this input",
                "report this with the model and the input",
            )


def leaves(lowered: LoweredCircuit, witness: Witness, link: str) -> IntArray:
    """What a stage hands on by this link, flat; empty if nothing."""
    assert lowered.carried is not None
    if link in witness.public:
        return np.array(witness.public[link], np.int64)
    carried = lowered.carried
    shapes = carried.shapes if link == STATE_OUT else carried.activations_out
    parts = [np.zeros(0, np.int64)]
    for name, shape in shapes.items():
        copy = witness.private.get(leaving(name), [])
        parts.append(np.array(copy[: math.prod(shape)], np.int64))
    return np.concatenate(parts)


TRIES = 3
"""How often a proof is begun whose prover is killed: nobody kills one thrice by chance."""
LOOK_SECONDS = 5.0
"""After which it is asked again how many provers there are."""
PROOFS_PER_CHECKER = 64
"""A process that verifies takes as long to start as to verify so many."""


def prove_chain(
    chain: ProvableChain,
    pieces: Iterable[IntArray],
    folder: Path,
    *,
    prompt: int = 0,
    provers: Provers | None = None,
    checkers: int = 1,
    tell: Callable[[int, int], None] = lambda proved, found: None,
    timeout: float | None = None,
) -> ChainResult:
    """Prove a sequence as a chain, or go on with one that was begun, and verify it.

    Witnesses are computed in order, no more than the provers have room for: the memory does not grow with the
    length, and segments of a stream are proved while it lasts.

    Args:
        chain: the circuits.
        pieces: of the input, int64 [any number of steps, ...]; private values go to the provers alone.
        folder: keeps finished segments, and the secret of the chain.
        prompt: where generation or a score is proved, the steps that were given: 1 or more, fewer than all.
        provers: who proves the segments, entered and left by the caller; default: one process at a time on
            this machine.
        checkers: most processes that verify the finished chain; with more than one, the main module has to be
            safe to import (``multiprocessing``).
        tell: told, whenever it changes, how many proofs were made and how many found.
        timeout: seconds before giving a segment up.

    Raises:
        MambaintError: if the folder is of another package, or a segment cannot be proved.
    """
    if provers is None:
        with LocalProvers() as own:
            return prove_chain(
                chain,
                pieces,
                folder,
                prompt=prompt,
                provers=own,
                checkers=checkers,
                tell=tell,
                timeout=timeout,
            )
    package = decode_chain_package(chain.package, "made here")
    digest = hashlib.sha256(chain.package).hexdigest()
    if (prompt > 0) != (chain.greedy or chain.scored):
        raise MambaintError(
            "a prompt and a chain that proves what was generated, or a score, belong together",
            "give both or neither",
        )
    secret = _secret(folder, digest)
    started = time.perf_counter()
    run = _Run(folder, provers, _needed(chain), tell, timeout)
    steps, jobs = 0, []
    try:
        for job in jobs_of(chain, pieces, secret, prompt):
            steps = job.place[1] * chain.steps + job.place[2]
            jobs.append(job.name)
            run.add(job)
        run.finish()
    except BaseException:
        provers.abandon()
        run.keep()
        raise
    wall = time.perf_counter() - started
    segments = len(jobs) // len(chain.stages)
    header = ChainHeader(package.model_id, digest, secret.number, steps, prompt)
    file = folder / PROOF
    with replacing(file) as temporary, temporary.open("wb") as stream:
        stream.writelines(encoded(header, _segments(folder, jobs, len(chain.stages))))
    with file.open("rb") as stream:
        workers = max(1, min(checkers, len(jobs) // PROOFS_PER_CHECKER))
        verdict = check_chain(stream, package, digest, workers=workers)
    if not verdict.valid:
        raise MambaintError(
            f"the finished chain is not valid and was discarded: {verdict.reason}",
            f"delete the folder {folder}, and prove again",
        )
    return ChainResult(
        file=file,
        steps=steps,
        segments=segments,
        stages=len(chain.stages),
        proved=len(run.answers),
        prove_seconds=sum(answer["prove_seconds"] for answer in run.answers),
        job_seconds=tuple(answer["job_seconds"] for answer in run.answers),
        wall_seconds=wall,
        peak_bytes=max((answer["peak_bytes"] for answer in run.answers), default=0),
        public=verdict.public,
    )


class _Run:
    """The segments of one run: those in flight, and those that are done.

    Args:
        folder, provers, tell, timeout: as of :func:`prove_chain`. needed: bytes of memory of one proof.
    """

    def __init__(
        self,
        folder: Path,
        provers: Provers,
        needed: int,
        tell: Callable[[int, int], None],
        timeout: float | None,
    ) -> None:
        self._folder, self._provers, self._needed = folder, provers, needed
        self._tell, self._timeout = tell, timeout
        self._flying: dict[Future[dict[str, Any]], tuple[Job, int]] = {}
        self._found = 0
        self.answers: list[dict[str, Any]] = []

    def add(self, job: Job) -> None:
        """Begin a segment as soon as there is room, or find that it is done."""
        if _finished(self._folder / job.name, job):
            self._found += 1
            self._tell(len(self.answers), self._found)
            return
        while len(self._flying) >= self._provers.room(self._needed):
            self._wait()
        self._begin(job, 1)

    def finish(self) -> None:
        """Wait for all that are in flight."""
        while self._flying:
            self._provers.room(self._needed)
            self._wait()

    def _begin(self, job: Job, tries: int) -> None:
        circuit = job.circuit
        future = self._provers.submit(circuit.lowered.circuit, job.witness, circuit.keys, self._timeout)
        self._flying[future] = job, tries

    def _wait(self) -> None:
        """Until one ends, or for a while; the fault of any is raised, but that a prover was killed."""
        ended, _ = wait(self._flying, timeout=LOOK_SECONDS, return_when=FIRST_COMPLETED)
        landed = [(future, *self._flying.pop(future)) for future in ended]
        for future, job, _ in landed:
            self._keep(future, job)
        for future, job, tries in landed:
            fault = future.exception()
            if isinstance(fault, JobKilled) and tries < TRIES:
                self._begin(job, tries + 1)
            elif fault is not None:
                raise fault
        if landed:
            self._tell(len(self.answers), self._found)

    def keep(self) -> None:
        """Write what was proved of those in flight, before they are given up."""
        for future, (job, _) in self._flying.items():
            if future.done():
                self._keep(future, job)

    def _keep(self, future: Future[dict[str, Any]], job: Job) -> None:
        """Write the proof of one that has ended, if it has made any."""
        if future.cancelled() or future.exception() is not None:
            return
        answer = future.result()
        proved = _stage_proof(job.witness, bytes.fromhex(answer.pop("proof")))
        write_bytes(self._folder / job.name, canonical_json(proved.document))
        self.answers.append(answer)


def _needed(chain: ProvableChain) -> int:
    """Bytes of memory that a proof of any stage takes."""
    return max(circuit.keys.peak_bytes for circuit in chain.circuits)


def _segments(folder: Path, names: list[str], stages: int) -> Iterator[Stages]:
    """The segments that a folder holds, from these files in order."""
    for first in range(0, len(names), stages):
        yield tuple(_read_stage(folder / name) for name in names[first : first + stages])


def _read_stage(path: Path) -> StageProof:
    return decode_stage(parse_json(read_bytes(path, "prove again"), str(path)))


def _stage_proof(witness: Witness, proof: bytes) -> StageProof:
    shown: dict[str, list[int]] = {
        name: witness.public[name] for name in ("input", "logits", TOKENS, SCORE) if name in witness.public
    }
    state, activations = (tuple(witness.public.get(name, [])) for name in (STATE_OUT, ACTIVATIONS_OUT))
    return StageProof(shown, state, activations, proof)


def _finished(path: Path, job: Job) -> bool:
    """Whether an earlier run has proved a stage, and the file is still what it has to be."""
    if not path.exists():
        return False
    witness, trusted = job.witness, job.circuit.package
    try:
        found = _read_stage(path)
        if found != _stage_proof(witness, found.proof):
            return False
        # Whether a commitment is that of the circuit before is seen when the chain is whole.
        before, received = (
            point_of(found, trusted, name) or tuple(witness.public.get(name, []))
            for name in (STATE_IN, ACTIVATIONS_IN)
        )
        check_stage(found, job.place, before, received, trusted, job.flags)
    except (InvalidProof, MambaintError):
        return False
    return True


def _secret(folder: Path, digest: str) -> ChainSecret:
    """The secret of the chain that a folder holds, drawn now if it holds none."""
    path = folder / SECRET
    if not path.exists():
        fresh = {
            "format": FORMAT,
            "version": VERSION,
            "purpose": PURPOSE,
            "verifier_package": digest,
            "seed": secrets.token_hex(32),
        }
        write_json(path, fresh, mode=0o600)
    remedy = f"delete the folder {folder}, or choose another"
    content: Any = read_json(path, remedy)
    fields = {"format", "version", "purpose", "verifier_package", "seed"}
    if not isinstance(content, dict) or set(content) != fields or not is_sha256(content["seed"]):
        raise MambaintError(f"{path} is damaged", remedy)
    if content["verifier_package"] != digest:
        raise MambaintError(f"{folder} holds a chain of another model or length of segments", remedy)
    return ChainSecret(bytes.fromhex(content["seed"]))
