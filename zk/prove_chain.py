"""Proving a sequence as a chain of segments with one key pair, and at most one more for its end.

Segments are independent jobs once their states are known, and those cost no proof: the witnesses are computed
one after the other, ahead of the provers. A finished segment is written to the chain's folder at once, under
a name made of its content; a run that was killed goes on from what it finds there, after checking it.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from circuits.circuit import CHAIN_BITS, GENERATED, SALTS, STATE_IN, STATE_OUT, TOKENS, Witness
from circuits.lowering import LoweredCircuit, build_circuit
from circuits.segment import FLAGS, PLACE, Segment, initial_state, leaving, named_state, reduction
from mamba_int.decoding_state import DecodingState
from mamba_int.errors import MambaintError
from mamba_int.files import canonical_json, parse_json, read_bytes, read_json, write_bytes, write_json
from mamba_int.graph import Graph, IntArray
from mamba_int.interpreter import evaluate, evaluate_step
from zk import field
from zk.chain_package import ChainPackage, decode_chain_package
from zk.chain_proof import ChainProof, SegmentProof, decode_segment
from zk.identity import is_sha256
from zk.keys import Keys, make_keys
from zk.local_provers import LocalProvers
from zk.package import Package
from zk.process import JobKilled, run_job
from zk.proof import InvalidProof
from zk.provable import statement
from zk.provers import Provers
from zk.srs import check_choice, chosen_srs
from zk.verify_chain import check_chain, check_one, greedy_flags, state_before

FORMAT = "mambaint-chain-folder"
VERSION = 1
PURPOSE = "secret until the chain is proved: with this seed anyone can test guesses of a hidden input"


@dataclass(frozen=True)
class SegmentCircuit:
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
        segment: the circuit of every segment, or of every one but the last.
        head: the circuit of the last; None where it is like the others.
        package: bytes of the verifier package.
    """

    graph: Graph
    steps: int
    segment: SegmentCircuit
    head: SegmentCircuit | None
    package: bytes

    @property
    def hidden(self) -> bool:
        """Whether segments commit to their states instead of showing them."""
        return any(group.name == STATE_IN for group in self.segment.lowered.circuit.inputs)

    @property
    def greedy(self) -> bool:
        """Whether proofs show what was generated instead of logits."""
        return any(tensor.name == GENERATED for tensor in self.segment.lowered.circuit.public)

    @property
    def first_state(self) -> IntArray:
        """The state before the first step, flat."""
        return first_state(self.segment.lowered)


@dataclass(frozen=True)
class ChainResult:
    """A chain that passed its own check.

    Attributes:
        file: the bytes of ``proof.json``.
        steps: of the sequence. segments: how many there are.
        proved: how many of them were proved now, rather than found.
        prove_seconds: of the proofs made now, in sum. wall_seconds: until all were there.
        job_seconds: of each proof made now, as they ended: from the start of its process to its end.
        peak_bytes: largest memory of one proving process.
        public: as in the verdict.
    """

    file: bytes
    steps: int
    segments: int
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
    public_input: bool = False,
    public_states: bool = False,
    greedy: bool = False,
    logrows: int | None = None,
    srs_path: Path | None = None,
    srs_sha256: str | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> ProvableChain:
    """Build the circuits of a chain, and get their keys: from the cache, or made now.

    Args:
        graph: the model.
        steps: of a segment; for a model that ends in a sum or maximum over time, a part of ``graph.seq_len``.
        public_input: show the input in proofs.
        public_states: show the states between segments, which say much of the input, instead of committing.
        greedy: prove which tokens a language model generated instead of its logits.
        logrows: make circuits of 2^logrows rows; None for the fewest that hold each.
        srs_path, srs_sha256: SRS of a ceremony and its hash; None for one made here.
        say: told what is being done.

    Raises:
        MambaintError: for a length that cannot be, and any fault of lowering, the SRS and key generation.
    """
    check_choice(srs_path, srs_sha256)
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
        "logits_of_every_step": graph.types[graph.output].shape[:1] == (graph.seq_len,) and not ended,
    }

    def lowered_at(segment: Segment, rows: int | None) -> LoweredCircuit:
        say(f"building the circuit of {'the last segment' if segment.head else 'a segment'}")
        return build_circuit(graph, public_input, rows, segment=segment)

    def made(lowered: LoweredCircuit) -> SegmentCircuit:
        k = lowered.circuit.logrows
        srs = chosen_srs(srs_path, srs_sha256, k)
        say(f"keys for {lowered.circuit.rows:,} rows of 2^{k} (made once)")
        keys = make_keys(lowered.circuit, sample_witness(graph, lowered, steps), srs)
        return SegmentCircuit(lowered, keys, keys.package(stated))

    forms = [
        Segment(steps, head, not public_states, greedy) for head in ((False, True) if ended else (False,))
    ]
    circuits = [lowered_at(form, logrows) for form in forms]
    if not public_states and len({lowered.circuit.logrows for lowered in circuits}) > 1:
        # Commitments of circuits with other numbers of rows cannot be compared.
        most = max(lowered.circuit.logrows for lowered in circuits)
        circuits = [lowered_at(form, most) for form in forms]
    body, *ends = (made(lowered) for lowered in circuits)
    head = ends[0] if ends else None
    package = ChainPackage(
        segment=body.package,
        head=None if head is None else head.package,
        segment_steps=steps,
        total_steps=graph.seq_len if ended else 0,
        first_state=tuple(first_state(body.lowered).tolist())
        if public_states
        else first_commitment(body.lowered, body.package, body.keys.srs.path),
    )
    return ProvableChain(graph, steps, body, head, package.encode())


FIRST_SALTS = tuple(range(1, SALTS + 1))
"""Of the first state, which is no secret; not zero, since EZKL has no name for the commitment to zeros."""


def first_state(lowered: LoweredCircuit) -> IntArray:
    """The state before the first step, flat, as the circuit of a segment has it."""
    assert lowered.carried is not None
    return initial_state(lowered.carried.shapes, lowered.carried.first)


def sample_witness(graph: Graph, lowered: LoweredCircuit, steps: int) -> Witness:
    """An honest witness of a segment: the lowest input, from the first state."""
    low, features = graph.input.integer("low"), graph.input.integer("features")
    inputs = np.full((steps, features) if features else (steps,), low, np.int64)
    return segment_witness(lowered, inputs, first_state(lowered), (0, 0, 0))


def first_commitment(lowered: LoweredCircuit, package: Package, srs: Path) -> str:
    """The commitment to the state before the first segment, as :attr:`ChainPackage.first_state` has it.

    Args:
        lowered: the circuit of a segment. package: its verifier package. srs: the full SRS file.
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
    for part in named_state(lowered.carried.shapes, state).values():
        values += [*part.ravel().tolist(), *[0] * (part.size % 2)]
    return values


def segment_witness(
    lowered: LoweredCircuit,
    inputs: IntArray,
    state: IntArray,
    place: tuple[int, int, int],
    flags: list[int] | None = None,
) -> Witness:
    """The witness of one segment.

    Args:
        lowered: its circuit.
        inputs: its steps.
        state: before it, flat.
        place: the number of the chain, the position, and of the last segment its steps, else 0.
        flags: which steps are greedy, where generation is proved; default: none.
    """
    assert lowered.carried is not None
    given = named_state(lowered.carried.shapes, state) | {PLACE: np.array(place, dtype=object)}
    given[FLAGS] = np.array(flags if flags is not None else [0] * len(inputs), np.int64)
    return lowered.witness(inputs, given=given)


@dataclass(frozen=True)
class ChainSecret:
    """What a chain's number and the salts of its states come from: drawn once, kept while it is proved."""

    seed: bytes

    @property
    def number(self) -> int:
        """Of the chain; public in the proof."""
        return int.from_bytes(self.tag("number")[: CHAIN_BITS // 8], "big")

    def salts(self, position: int, state: IntArray) -> list[int]:
        """Of the state before the segment at this position. The same salts never stand behind two states:
        their commitments would show the difference."""
        if position == 0:
            return list(FIRST_SALTS)
        own = self.tag("state", position, state.tolist())
        parts = (hmac.digest(own, str(i).encode(), "sha512") for i in range(SALTS))
        return [int.from_bytes(part, "big") % field.PRIME for part in parts]

    def tag(self, *content: Any) -> bytes:
        """A name for what the content is, which says nothing to who has no seed."""
        return hmac.digest(self.seed, canonical_json(list(content)), "sha512")


@dataclass(frozen=True)
class Job:
    """One segment to be proved: independent of all others, and named by its content.

    Attributes:
        place: the number of the chain, the position, and of the last segment its steps, else 0.
        flags: which of its steps are greedy. circuit: its circuit. witness: the values.
        name: of the file that holds its proof.
    """

    place: tuple[int, int, int]
    flags: list[int]
    circuit: SegmentCircuit
    witness: Witness
    name: str


def cut(pieces: Iterable[IntArray], steps: int) -> Iterator[tuple[IntArray, bool]]:
    """Inputs as they come, cut into segments: each but the last whole, and whether it is the last.

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
                yield joined[start : start + steps], False
            held = [joined[whole:]]
    rest = np.concatenate(held) if held else np.zeros(0, np.int64)
    if not len(rest):
        raise MambaintError("the input has no steps", "give at least one")
    yield rest, True


def jobs_of(
    chain: ProvableChain, pieces: Iterable[IntArray], secret: ChainSecret, prompt: int = 0
) -> Iterator[Job]:
    """The segments of a sequence, one after the other, checked against the interpreter.

    Args:
        chain: the circuits.
        pieces: of the input, as in :func:`cut`.
        secret: of the chain.
        prompt: where generation is proved, the steps that were given.

    Raises:
        MambaintError: if the length does not fit, a token is not the greedy one, or the circuits compute
            other integers than the specification: an internal fault.
    """
    state, graph = chain.first_state, chain.graph
    check = _Check(graph, whole=chain.head is not None)
    start = 0
    for i, (inputs, last) in enumerate(cut(pieces, chain.steps)):
        circuit = chain.head if last and chain.head is not None else chain.segment
        place = secret.number, i, len(inputs) if last else 0
        if chain.head is not None and (i + 1 == graph.seq_len // chain.steps) != last:
            raise MambaintError(
                f"the input does not have the {graph.seq_len} steps that the model takes", "give that many"
            )
        padding = np.full(
            (chain.steps - len(inputs), *inputs.shape[1:]), graph.input.integer("low"), np.int64
        )
        padded = np.concatenate([inputs, padding])
        flags = greedy_flags(prompt, start + len(inputs), i, chain.steps)
        start += len(inputs)
        if last and prompt >= start:
            raise MambaintError(
                f"a prompt of {prompt} tokens leaves nothing generated of {start}", "give a shorter prompt"
            )
        witness = segment_witness(circuit.lowered, padded, state, place, flags)
        name = secret.tag("segment", list(place), flags, padded.tolist(), state.tolist()).hex()[:32]
        after = state_after_witness(circuit.lowered, witness)
        if chain.hidden:
            salts = {STATE_IN: secret.salts(i, state), STATE_OUT: secret.salts(i + 1, after)}
            witness = replace(witness, salts=salts)
        check(padded, witness, flags)
        yield Job(place, flags, circuit, witness, f"{name}.json")
        state = after


class _Check:
    """Compares what the circuits show with the interpreter: step by step, or once the input is whole.

    Args:
        graph: the model. whole: it cannot run step by step.
    """

    def __init__(self, graph: Graph, whole: bool) -> None:
        self._graph = graph
        self._inputs: list[IntArray] = []
        self._next, self._steps = -1, 0
        # What follows a last step is no part of the state.
        ends = next((node for node in graph.nodes if node.op == "reduce"), None)
        self._state = None if whole or ends is not None else DecodingState.of(graph, 1)

    def __call__(self, inputs: IntArray, witness: Witness, flags: list[int]) -> None:
        if self._state is not None:
            steps = []
            for step, greedy in zip(inputs, flags, strict=True):
                if greedy and int(step) != self._next:
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
        if "logits" in witness.public and witness.public["logits"] != wanted.ravel().tolist():
            raise MambaintError(
                "the circuits and the interpreter disagree on this input",
                "report this with the model and the input",
            )


def state_after_witness(lowered: LoweredCircuit, witness: Witness) -> IntArray:
    """The state that a segment hands on, flat; empty after a head."""
    assert lowered.carried is not None
    if STATE_OUT in witness.public:
        return np.array(witness.public[STATE_OUT], np.int64)
    parts = []
    for name, shape in lowered.carried.shapes.items():
        copy = witness.private.get(leaving(name), [])
        parts.append(np.array(copy[: math.prod(shape)], np.int64))
    return np.concatenate(parts)


TRIES = 3
"""How often a segment is begun whose prover is killed: a third time it is no accident, and the run ends."""
LOOK_SECONDS = 5.0
"""After which it is asked again how many provers there are."""


def prove_chain(
    chain: ProvableChain,
    pieces: Iterable[IntArray],
    folder: Path,
    *,
    prompt: int = 0,
    provers: Provers | None = None,
    tell: Callable[[int, bool], None] = lambda done, more: None,
    timeout: float | None = None,
) -> ChainResult:
    """Prove a sequence as a chain, or go on with one that was begun, and verify it.

    Witnesses are computed in order, no more than the provers have room for: the memory does not grow with the
    length, and segments of a stream are proved while it lasts.

    Args:
        chain: the circuits.
        pieces: of the input, int64 [any number of steps, ...]; private values go to the provers alone.
        folder: keeps finished segments, and the secret of the chain.
        prompt: where generation is proved, the steps that were given: 1 or more, fewer than all.
        provers: who proves the segments, entered and left by the caller; default: one process at a time on
            this machine.
        tell: told how many segments are done, and whether more are to come.
        timeout: seconds before giving a segment up.

    Raises:
        MambaintError: if the folder is of another package, or a segment cannot be proved.
    """
    if provers is None:
        with LocalProvers() as own:
            return prove_chain(chain, pieces, folder, prompt=prompt, provers=own, tell=tell, timeout=timeout)
    package = decode_chain_package(chain.package, "made here")
    digest = hashlib.sha256(chain.package).hexdigest()
    if (prompt > 0) != chain.greedy:
        raise MambaintError(
            "a prompt and a chain that proves what was generated belong together", "give both or neither"
        )
    secret = _secret(folder, digest)
    started = time.perf_counter()
    run = _Run(folder, provers, _needed(chain), tell, timeout)
    steps = 0
    try:
        for job in jobs_of(chain, pieces, secret, prompt):
            steps = job.place[1] * chain.steps + job.place[2]
            run.add(job)
        run.finish()
    except BaseException:
        provers.abandon()
        run.keep()
        raise
    wall = time.perf_counter() - started
    segments = tuple(run.done[i] for i in range(len(run.done)))
    proof = ChainProof(package.model_id, digest, secret.number, steps, prompt, segments).encode()
    verdict = check_chain(proof, package, digest)
    if not verdict.valid:
        raise MambaintError(
            f"the finished chain is not valid and was discarded: {verdict.reason}",
            f"delete the folder {folder}, and prove again",
        )
    return ChainResult(
        file=proof,
        steps=steps,
        segments=len(segments),
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
        tell: Callable[[int, bool], None],
        timeout: float | None,
    ) -> None:
        self._folder, self._provers, self._needed = folder, provers, needed
        self._tell, self._timeout = tell, timeout
        self._flying: dict[Future[dict[str, Any]], tuple[Job, int]] = {}
        self.done: dict[int, SegmentProof] = {}
        self.answers: list[dict[str, Any]] = []

    def add(self, job: Job) -> None:
        """Begin a segment as soon as there is room, or find that it is done."""
        found = _finished(self._folder / job.name, job)
        if found is not None:
            self.done[job.place[1]] = found
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
        self.keep(ended)
        for future in ended:
            job, tries = self._flying.pop(future)
            fault = future.exception()
            if isinstance(fault, JobKilled) and tries < TRIES:
                self._begin(job, tries + 1)
            elif fault is not None:
                raise fault
        if ended and self.done:
            self._tell(len(self.done), bool(self._flying))

    def keep(self, ended: Iterable[Future[dict[str, Any]]] | None = None) -> None:
        """Write those of these that were proved; default: of all that are in flight."""
        for future in self._flying if ended is None else ended:
            job, _ = self._flying[future]
            if not future.done() or future.cancelled() or future.exception() is not None:
                continue
            answer = future.result()
            proved = _segment_proof(job.witness, bytes.fromhex(answer["proof"]))
            write_bytes(self._folder / job.name, canonical_json(proved.document))
            self.answers.append(answer)
            self.done[job.place[1]] = proved


def _needed(chain: ProvableChain) -> int:
    """Bytes of memory that a proof of any segment takes."""
    circuits = (chain.segment, *([] if chain.head is None else [chain.head]))
    return max(circuit.keys.peak_bytes for circuit in circuits)


def _segment_proof(witness: Witness, proof: bytes) -> SegmentProof:
    shown: dict[str, list[int]] = {
        name: witness.public[name] for name in ("input", "logits", TOKENS) if name in witness.public
    }
    return SegmentProof(shown, tuple(witness.public.get(STATE_OUT, [])), proof)


def _finished(path: Path, job: Job) -> SegmentProof | None:
    """A segment that an earlier run has proved; None if there is none, or it is not what it has to be."""
    witness = job.witness
    if not path.exists():
        return None
    try:
        found = decode_segment(parse_json(read_bytes(path, ""), str(path)))
        if found != _segment_proof(witness, found.proof):
            return None
        trusted = job.circuit.package
        # Whether a commitment is that of the segment before is seen when the chain is whole.
        before = state_before(found, trusted, tuple(witness.public.get(STATE_IN, [])))
        check_one(found, job.place, before, trusted, job.flags)
    except (InvalidProof, MambaintError):
        return None
    return found


def _secret(folder: Path, digest: str) -> ChainSecret:
    """The secret of the chain that a folder holds, drawn now if it holds none."""
    path = folder / "chain.json"
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
