"""Chains of segments: what a user sees, and every way to link what does not belong together."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import signal
import stat
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from subprocess import Popen
from typing import Any

import numpy as np
import pytest

from circuits.cells import Values
from circuits.circuit import STATE_IN, STATE_OUT, Circuit, Witness
from circuits.lowering import MARGIN_ROWS, build_circuit, lower
from circuits.segment import PLACE, Segment, by_name, initial_state, leaving, reduction, step_unit
from mamba_int.errors import MambaintError
from mamba_int.graph import Graph, IntArray
from mamba_int.interpreter import evaluate
from tests.circuits.conftest import GRAPHS
from tests.circuits_runtime.models import NARROW, random_graph
from tests.zk.chain_files import ChainProof, decode_chain_proof
from zk import local_provers
from zk import prove_chain as proving
from zk.chain_cut import BYTES_PER_ROW, Cut, pick_cut
from zk.chain_package import ChainPackage, decode_chain_package
from zk.chain_proof import (
    ChainHeader,
    StageProof,
    Stages,
    encoded,
    read_chain,
)
from zk.keys import Keys
from zk.local_provers import LocalProvers
from zk.proof import InvalidProof
from zk.prove import mock, prove_witness
from zk.prove_chain import (
    PROOF,
    SECRET,
    ChainSecret,
    ProvableChain,
    StageCircuit,
    first_state,
    leaves,
    prepare_chain,
    prove_chain,
    segment_witness,
)
from zk.rederive import OTHER_KEY, chain_fault
from zk.verify import Verdict
from zk.verify_chain import check_chain, check_stage, point_of

TEXT: dict[str, Any] = NARROW | {
    "task": "language_model",
    "vocab_size": 11,
    "seq_len": 16,
    "chunk_size": 4,
    "d_model": 4,
    "d_state": 2,
}
LENGTH = 11
"""Steps of the sequence of the tests: two segments of four, and three steps of a third."""


@dataclass(frozen=True)
class Chains:
    """Two chains of the same model, and the circuits."""

    chain: ProvableChain
    package: ChainPackage
    digest: str
    first: ChainProof
    second: ChainProof
    inputs: IntArray

    def verdict(self, proof: ChainProof) -> Verdict:
        """On a file that may have been put together by a liar."""
        return check_chain(io.BytesIO(proof.encode()), self.package, self.digest)


def tokens(seed: int) -> IntArray:
    return np.random.default_rng(seed).integers(0, 11, LENGTH)


def two_chains(chain: ProvableChain, folder: Path) -> Chains:
    """Proved in two folders below this one."""
    files = [prove_chain(chain, [tokens(seed)], folder / str(seed)).file for seed in (0, 1)]
    first, second = (decode_chain_proof(file.read_bytes()) for file in files)
    package = decode_chain_package(chain.package, "test")
    return Chains(chain, package, hashlib.sha256(chain.package).hexdigest(), first, second, tokens(0))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module", params=["shown", "hidden"])
def chains(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Chains:
    """With the states among the public values, and with commitments to them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MAMBAINT_CACHE", str(cache))
        graph, _ = random_graph(0, **TEXT)
        chain = prepare_chain(graph, 4, public_states=request.param == "shown")
        return two_chains(chain, tmp_path_factory.mktemp("chains"))


def with_segments(proof: ChainProof, *segments: Stages, steps: int = 0) -> ChainProof:
    return replace(proof, segments=segments, steps=steps or proof.steps)


def altered(segment: Stages, **changes: Any) -> Stages:
    """With other content of its last stage."""
    return (*segment[:-1], replace(segment[-1], **changes))


def moved_state(segment: Stages) -> Stages:
    """Another state after it: of a hidden one another commitment, the second point of the proof."""
    state, proof = segment[-1].state, bytearray(segment[-1].proof)
    if state:
        return altered(segment, state=(state[0] + 1, *state[1:]))
    proof[64:128] = proof[:64]
    return altered(segment, proof=bytes(proof))


def other_state(segment: Stages) -> Stages:
    """Without the state that is shown, or with one where none is."""
    return altered(segment, state=() if segment[-1].state else (1, 2))


def other_logits(segment: Stages) -> Stages:
    first, *rest = segment[-1].public["logits"]
    return altered(segment, public={"logits": [first + 1, *rest]})


def also_public(segment: Stages, name: str, values: list[int]) -> Stages:
    """With one more public tensor."""
    return altered(segment, public=segment[-1].public | {name: values})


def test_honest_chain_is_one_statement_about_the_whole_sequence(chains: Chains) -> None:
    verdict = chains.verdict(chains.first)
    assert (verdict.valid, verdict.reason) == (True, "")
    assert verdict.public == {"logits": evaluate(chains.chain.graph, chains.inputs[None])[0].ravel().tolist()}
    assert verdict.statement["seq_len"] == LENGTH and verdict.statement["segments"] == 3


ATTACKS: dict[str, Callable[[ChainProof, ChainProof], ChainProof]] = {
    "first dropped": lambda a, b: with_segments(a, *a.segments[1:], steps=7),
    "middle dropped": lambda a, b: with_segments(a, a.segments[0], a.segments[2], steps=7),
    "last dropped": lambda a, b: with_segments(a, *a.segments[:2], steps=8),
    "last dropped, its padding kept": lambda a, b: with_segments(a, *a.segments[:2], steps=7),
    "duplicated": lambda a, b: with_segments(
        a, a.segments[0], a.segments[0], a.segments[1], a.segments[2], steps=15
    ),
    "last duplicated": lambda a, b: with_segments(a, *a.segments, a.segments[2], steps=15),
    "swapped": lambda a, b: with_segments(a, a.segments[1], a.segments[0], a.segments[2]),
    "replayed from another input": lambda a, b: with_segments(a, a.segments[0], b.segments[1], a.segments[2]),
    "spliced": lambda a, b: with_segments(a, a.segments[0], *b.segments[1:]),
    "spliced under the other's number": lambda a, b: with_segments(b, a.segments[0], *b.segments[1:]),
    "number of another chain": lambda a, b: replace(a, chain=b.chain),
    "state tampered": lambda a, b: with_segments(a, moved_state(a.segments[0]), *a.segments[1:]),
    "last state tampered": lambda a, b: with_segments(a, *a.segments[:2], moved_state(a.segments[2])),
    "logits tampered": lambda a, b: with_segments(a, other_logits(a.segments[0]), *a.segments[1:]),
    "padding shown as steps": lambda a, b: replace(a, steps=12),
    "steps hidden as padding": lambda a, b: replace(a, steps=10),
    "fewer steps than segments": lambda a, b: replace(a, steps=8),
    "more steps than segments": lambda a, b: replace(a, steps=13),
    "proof of another length": lambda a, b: with_segments(
        a, altered(a.segments[0], proof=a.segments[0][-1].proof + b"\0"), *a.segments[1:]
    ),
    "state left out or added": lambda a, b: with_segments(a, other_state(a.segments[0]), *a.segments[1:]),
    "activations added": lambda a, b: with_segments(
        a, altered(a.segments[0], activations=(1, 2)), *a.segments[1:]
    ),
    "state beside the links": lambda a, b: with_segments(
        a, also_public(a.segments[0], STATE_IN, list(a.segments[0][-1].state)), *a.segments[1:]
    ),
    "place beside the links": lambda a, b: with_segments(
        a, also_public(a.segments[0], "chain", [a.chain, 0, 0]), *a.segments[1:]
    ),
    "stage left out": lambda a, b: with_segments(a, a.segments[0][:-1], *a.segments[1:]),
    "stage doubled": lambda a, b: with_segments(a, a.segments[0] + a.segments[0][-1:], *a.segments[1:]),
    "another model": lambda a, b: replace(a, model_id="0" * 64),
    "another package": lambda a, b: replace(a, verifier_package="0" * 64),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_segments_that_are_not_the_chain_are_refused(chains: Chains, name: str) -> None:
    forged = ATTACKS[name](chains.first, chains.second)
    assert forged != chains.first and forged != chains.second
    verdict = chains.verdict(forged)
    assert not verdict.valid and verdict.reason and verdict.public == {}


def prove_one(circuit: StageCircuit, witness: Witness) -> StageProof:
    answer = prove_witness(circuit.lowered.circuit, witness, circuit.keys, None)
    return proving._stage_proof(witness, bytes.fromhex(answer["proof"]))


def test_chain_that_starts_from_another_state_verifies_alone_and_not_as_a_chain(chains: Chains) -> None:
    (circuit,) = chains.chain.stages
    begun = first_state(circuit.lowered)
    begun[0] += 1
    witness = segment_witness(circuit.lowered, chains.inputs[:4], begun, begun[:0], (5, 0, 4))
    segment = prove_one(circuit, witness)
    before = point_of(segment, circuit.package, STATE_IN) or tuple(begun.tolist())
    assert before != chains.package.first_states[0]
    check_stage(segment, (5, 0, 4), before, (), circuit.package, [0] * 4)
    proof = ChainProof(chains.package.model_id, chains.digest, 5, 4, 0, ((segment,),))
    verdict = chains.verdict(proof)
    assert not verdict.valid and "segment 0" in verdict.reason


def test_segment_of_another_length_is_of_another_package(
    chains: Chains, monkeypatch: pytest.MonkeyPatch, cache: Path, tmp_path: Path
) -> None:
    monkeypatch.setenv("MAMBAINT_CACHE", str(cache))
    other = prepare_chain(chains.chain.graph, 8, public_states=not chains.chain.hidden)
    proof = decode_chain_proof(prove_chain(other, [chains.inputs], tmp_path / "c").file.read_bytes())
    assert not chains.verdict(proof).valid
    for steps in (4, 8):
        forged = replace(proof, verifier_package=chains.digest, segments=proof.segments[:1], steps=steps)
        assert not chains.verdict(forged).valid


def test_chain_of_another_model_is_refused_under_a_forged_name(
    chains: Chains, monkeypatch: pytest.MonkeyPatch, cache: Path, tmp_path: Path
) -> None:
    monkeypatch.setenv("MAMBAINT_CACHE", str(cache))
    graph, _ = random_graph(1, **TEXT)
    chain = prepare_chain(graph, 4, public_states=not chains.chain.hidden)
    other = decode_chain_proof(prove_chain(chain, [tokens(0)[:4]], tmp_path / "c").file.read_bytes())
    assert other.model_id != chains.first.model_id
    forged = replace(other, model_id=chains.first.model_id, verifier_package=chains.digest)
    assert "segment 0" in chains.verdict(forged).reason


def test_killed_run_goes_on_and_proves_nothing_twice(
    chains: Chains, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    honest, calls = prove_witness, []

    def killed(
        circuit: Circuit, witness: Witness, keys: Keys, timeout: float | None, **how: Any
    ) -> dict[str, Any]:
        if len(calls) == 1:
            raise KeyboardInterrupt
        calls.append(witness)
        return honest(circuit, witness, keys, timeout, **how)

    monkeypatch.setattr(local_provers, "prove_witness", killed)
    with pytest.raises(KeyboardInterrupt):
        prove_chain(chains.chain, [chains.inputs], tmp_path / "c")
    monkeypatch.setattr(local_provers, "prove_witness", honest)
    result = prove_chain(chains.chain, [chains.inputs], tmp_path / "c")
    assert (result.segments, result.proved) == (3, 2)
    assert chains.verdict(decode_chain_proof(result.file.read_bytes())).valid
    assert stat.S_IMODE((tmp_path / "c/chain.json").stat().st_mode) == 0o600
    # What was damaged, or is of another place, is proved again.
    files = [path for path in (tmp_path / "c").iterdir() if path.name not in (SECRET, PROOF)]
    assert len(files) == 3
    files[0].write_bytes(files[0].read_bytes()[:-9])
    files[1].write_bytes(files[2].read_bytes())
    again = prove_chain(chains.chain, [chains.inputs], tmp_path / "c")
    assert again.proved == 2 and chains.verdict(decode_chain_proof(again.file.read_bytes())).valid


def assassin(monkeypatch: pytest.MonkeyPatch, kills: int) -> list[Witness]:
    """SIGKILL for the first provers to be started; the witnesses of all."""
    honest, calls = prove_witness, []

    def proved(
        circuit: Circuit,
        witness: Witness,
        keys: Keys,
        timeout: float | None,
        started: Callable[[Popen[bytes]], None],
    ) -> dict[str, Any]:
        calls.append(witness)
        kill = len(calls) <= kills

        def born(child: Popen[bytes]) -> None:
            started(child)
            if kill:
                child.kill()

        return honest(circuit, witness, keys, timeout, started=born)

    monkeypatch.setattr(local_provers, "prove_witness", proved)
    return calls


def test_segment_whose_prover_is_killed_is_proved_again_but_not_for_ever(
    chains: Chains, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls = assassin(monkeypatch, 2)
    result = prove_chain(chains.chain, [chains.inputs], tmp_path / "c")
    assert (result.segments, result.proved, len(calls)) == (3, 3, 5)
    assert chains.verdict(decode_chain_proof(result.file.read_bytes())).valid
    calls = assassin(monkeypatch, 99)
    with pytest.raises(MambaintError, match="lack of memory"):
        prove_chain(chains.chain, [chains.inputs[:4]], tmp_path / "d")
    assert len(calls) == proving.TRIES


def test_fault_or_interrupt_stops_the_provers_at_once(
    chains: Chains, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    children: list[Popen[bytes]] = []
    honest = prove_witness

    def slow(
        circuit: Circuit,
        witness: Witness,
        keys: Keys,
        timeout: float | None,
        started: Callable[[Popen[bytes]], None],
    ) -> dict[str, Any]:
        def stopped(child: Popen[bytes]) -> None:
            os.kill(child.pid, signal.SIGSTOP)
            children.append(child)
            started(child)

        return honest(circuit, witness, keys, timeout, started=stopped)

    def interrupted() -> Iterator[IntArray]:
        yield chains.inputs[:9]
        while len(children) < 2:
            time.sleep(0.01)
        raise KeyboardInterrupt

    monkeypatch.setattr(local_provers, "prove_witness", slow)
    with LocalProvers(2) as provers, pytest.raises(KeyboardInterrupt):
        prove_chain(chains.chain, interrupted(), tmp_path / "c", provers=provers)
    assert [child.returncode for child in children] == [-signal.SIGKILL] * 2


def test_full_disk_loses_no_finished_segment(
    chains: Chains, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    honest, written = os.fsync, []

    def full(handle: int) -> None:
        written.append(handle)
        # The chain's secret, a segment, and then no more.
        if len(written) > 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        honest(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(MambaintError, match="No space left"):
        prove_chain(chains.chain, [chains.inputs], tmp_path / "c")
    assert not list((tmp_path / "c").glob(".*"))
    monkeypatch.setattr(os, "fsync", honest)
    result = prove_chain(chains.chain, [chains.inputs], tmp_path / "c")
    assert (result.segments, result.proved) == (3, 2)


def test_input_begun_in_the_folder_of_another_shares_no_segment_and_no_salt(
    chains: Chains, tmp_path: Path
) -> None:
    """Under the same salts two states would show the commitment of their difference."""
    first = prove_chain(chains.chain, [chains.inputs], tmp_path / "c")
    second = prove_chain(chains.chain, [tokens(1)], tmp_path / "c")
    assert (first.proved, second.proved) == (3, 3)
    assert chains.verdict(decode_chain_proof(second.file.read_bytes())).valid
    secret = ChainSecret(b"s" * 32)
    one, other = np.array([1, 2]), np.array([1, 3])
    assert secret.salts(STATE_IN, 1, 0, one) != secret.salts(STATE_IN, 1, 0, other)
    assert secret.salts(STATE_IN, 1, 0, one) != secret.salts(STATE_IN, 1, 1, one)
    assert secret.salts(STATE_IN, 1, 0, one) == secret.salts(STATE_IN, 1, 0, one)


def test_stream_is_proved_while_it_lasts_and_closed_at_any_time(
    chains: Chains, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    honest, begun = prove_witness, threading.Event()

    def told(
        circuit: Circuit, witness: Witness, keys: Keys, timeout: float | None, **how: Any
    ) -> dict[str, Any]:
        begun.set()
        return honest(circuit, witness, keys, timeout, **how)

    monkeypatch.setattr(local_provers, "prove_witness", told)

    def arriving() -> Iterator[IntArray]:
        for t in range(LENGTH):
            # The second segment does not come before the first is being proved.
            assert t < 6 or begun.wait(60)
            yield chains.inputs[t : t + 1]

    result = prove_chain(chains.chain, arriving(), tmp_path / "c")
    assert (result.steps, result.segments) == (LENGTH, 3)
    verdict = chains.verdict(decode_chain_proof(result.file.read_bytes()))
    assert verdict.valid and verdict.public == chains.verdict(chains.first).public


def test_part_of_a_chain_is_never_valid_and_says_so(chains: Chains) -> None:
    """A part that verifies must not pass for the whole, and one that does not must not pass for a part."""

    def part(proof: ChainProof, only: range) -> Verdict:
        return check_chain(io.BytesIO(proof.encode()), chains.package, chains.digest, only=only)

    honest = part(chains.first, range(1, 3))
    assert not honest.valid and honest.reason.startswith("partial: segments 1 to 2 of 3")
    assert honest.public == {}
    assert part(chains.first, range(3)).reason.startswith("partial")
    forged = with_segments(chains.first, chains.first.segments[0], *chains.second.segments[1:])
    assert part(forged, range(1)).reason.startswith("partial")
    assert part(forged, range(1, 2)).reason.startswith("segment 1")
    for only in (range(2, 4), range(3, 3), range(-1, 1)):
        assert "0 to 2" in part(chains.first, only).reason


def dies(*_: Any) -> None:
    """In a process that checks segments."""
    os.kill(os.getpid(), signal.SIGKILL)


def test_killed_checker_is_one_line_and_no_verdict(chains: Chains, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_chain(io.BytesIO(chains.first.encode()), chains.package, chains.digest, workers=2).valid
    monkeypatch.setattr("zk.verify_chain._check_place", dies)
    with pytest.raises(MambaintError, match="was killed"):
        check_chain(io.BytesIO(chains.first.encode()), chains.package, chains.digest, workers=2)


def test_package_is_that_of_the_model_down_to_the_first_state(
    chains: Chains, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    """A package with a first state of its maker's choice would link proofs that begin in mid-sequence."""
    monkeypatch.setenv("MAMBAINT_CACHE", str(cache))
    package, graph = chains.package, chains.chain.graph
    assert chain_fault(package, graph) == ""
    (first,) = package.first_states
    other = first[:-1] + ("0" if first[-1] != "0" else "1") if isinstance(first, str) else (1, *first[1:])
    assert "first state" in chain_fault(replace(package, first_states=(other,)), graph)
    sibling, _ = random_graph(1, **TEXT)
    forged = replace(package.last, model_id=sibling.model_id)
    assert chain_fault(replace(package, stages=(forged,)), sibling) == OTHER_KEY


def test_no_more_workers_than_the_memory_holds(chains: Chains, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = chains.chain.stages[0].keys.peak_bytes
    for free, workers in ((3 * needed, 3), (3 * needed - 1, 2), (1, 1), (None, 8)):
        monkeypatch.setattr(local_provers, "available_memory", lambda free=free: free)
        with LocalProvers(8) as provers:
            assert provers.room(needed) == workers + 1


@pytest.mark.parametrize(
    ("form", "public_input"),
    [
        (Segment(0), False),
        (Segment(0, hidden=True), False),
        (Segment(0, hidden=True), True),
        (Segment(0, hidden=True, greedy=True), False),
    ],
)
def test_length_that_is_picked_is_the_cheapest_that_fits(
    form: Segment, public_input: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counting all that the proof is to show: a little more than 2^k rows cost as many as 2^(k+1)."""
    graph, _ = random_graph(0, **TEXT)
    monkeypatch.setattr("zk.chain_cut.stored_calibration", lambda: None)
    memory = BYTES_PER_ROW << 13

    def rows(steps: int, logrows: int) -> int:
        own = replace(form, steps=steps)
        return lower(graph, logrows, public_input, True, segment=own).circuit.rows + MARGIN_ROWS

    cut = pick_cut(graph, 24, form, public_input=public_input, memory=memory)
    sizes = {s: next((k for k in (12, 13) if rows(s, k) <= 1 << k), 0) for s in range(4, 25, 4)}
    costs = {s: -(-24 // s) << k for s, k in sizes.items() if k}
    assert cut.stages == 1 and -(-24 // cut.steps) << sizes[cut.steps] == min(costs.values())
    with pytest.raises(MambaintError, match="memory"):
        pick_cut(graph, 24, form, public_input=public_input, memory=BYTES_PER_ROW << 9)


def test_model_too_large_for_the_memory_is_cut_by_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, _ = random_graph(0, **(TEXT | {"n_layer": 2}))
    monkeypatch.setattr("zk.chain_cut.stored_calibration", lambda: None)
    form, memory = Segment(0, hidden=True), BYTES_PER_ROW << 12
    assert pick_cut(graph, 24, form, memory=memory) == Cut(4, 2)
    assert pick_cut(graph, 24, form, memory=2 * memory) == Cut(8, 1)
    assert pick_cut(graph, 24, form, memory=2 * memory, stages=2).stages == 2
    with pytest.raises(MambaintError, match="memory"):
        pick_cut(graph, 24, form, memory=memory, stages=1)


def test_head_counts_among_the_circuits_that_have_to_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = {name: value for name, value in TEXT.items() if name not in ("task", "vocab_size")}
    monkeypatch.setattr("zk.chain_cut.stored_calibration", lambda: None)
    form, memory = Segment(0, hidden=True), BYTES_PER_ROW << 12
    for classes, fits in ((5, True), (2000, False)):
        graph, _ = random_graph(0, **(narrow | {"pooling": "mean", "n_classes": classes}))
        assert build_circuit(graph, segment=replace(form, steps=4)).circuit.logrows == 12
        if fits:
            assert pick_cut(graph, 16, form, memory=memory) == Cut(4, 1)
        else:
            with pytest.raises(MambaintError, match="memory"):
                pick_cut(graph, 16, form, memory=memory)


def test_no_steps_are_no_statement(chains: Chains, tmp_path: Path) -> None:
    with pytest.raises(MambaintError, match="no steps"):
        prove_chain(chains.chain, [], tmp_path / "c")


def test_folder_of_another_package_is_refused(chains: Chains, tmp_path: Path) -> None:
    prove_chain(chains.chain, [chains.inputs[:4]], tmp_path / "c")
    other = replace(chains.chain, package=replace(chains.package, segment_steps=5).encode())
    with pytest.raises(MambaintError, match="another model"):
        prove_chain(other, [chains.inputs[:4]], tmp_path / "c")


def test_every_part_of_a_hidden_state_is_the_one_computed(cache: Path) -> None:
    """The commitment is to private copies: a liar's copy must not differ from what the circuit computes."""
    graph, inputs = random_graph(0, **TEXT)
    lowered = build_circuit(graph, segment=Segment(4, hidden=True))
    carried = lowered.carried
    assert carried is not None
    first = by_name(carried.shapes, initial_state(carried.shapes, carried.first))
    given = first | {PLACE: np.array([1, 0, 4])}

    def moved(values: Values) -> Values:
        flat = values.ravel()
        flat[-2] += 1
        return flat.reshape(values.shape)

    lies = [{}, *({leaving(name): moved} for name in carried.shapes)]
    witnesses = [lowered.witness(inputs[2, :4], lies=lie, given=given) for lie in lies]
    assert mock(lowered.circuit, witnesses) == [True, *[False] * len(carried.shapes)]


def traced_states(graph: Graph, inputs: IntArray, form: Segment, challenged: bool) -> list[Witness]:
    """Witnesses of all segments; the last has the head where there is one."""
    steps, body = form.steps, build_circuit(graph, challenged=challenged, segment=form)
    assert body.carried is not None
    state = initial_state(body.carried.shapes, body.carried.first)
    count, found = len(inputs) // steps, []
    for i in range(count):
        lowered = body
        if reduction(graph) is not None and i == count - 1:
            lowered = build_circuit(graph, challenged=challenged, segment=replace(form, head=True))
        own = inputs[i * steps : (i + 1) * steps]
        witness = segment_witness(lowered, own, state, state[:0], (0, i, 0))
        found.append(witness)
        state = leaves(lowered, witness, STATE_OUT)
    return found


@pytest.mark.parametrize(("challenged", "hidden"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize(
    "forms",
    [
        {"task": "language_model", "vocab_size": 7, "n_layer": 2},
        {"pooling": "mean", "rotation": "shear"},
        {"pooling": "last", "rotation": "none", "d_conv": 2},
    ],
)
def test_segments_compute_the_integers_of_the_whole(
    forms: dict[str, Any], challenged: bool, hidden: bool
) -> None:
    small = {"seq_len": 8, "chunk_size": 4, "d_model": 4, "d_state": 2}
    graph, inputs = random_graph(0, **(small | forms))
    for sequence in inputs[1:4]:
        found = traced_states(graph, sequence, Segment(4, hidden=hidden), challenged)
        wanted = evaluate(graph, sequence[None])[0].ravel().tolist()
        shown = [v for witness in found for v in witness.public.get("logits", [])]
        assert shown[-len(wanted) :] == wanted


@pytest.mark.parametrize(("challenged", "hidden"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("name", ["scan_real", "scan_complex", "scan_quaternion"])
def test_turned_states_are_carried_into_the_next_segment(name: str, challenged: bool, hidden: bool) -> None:
    graph = replace(GRAPHS[name](), seq_len=6)
    low, high = graph.input.integer("low"), graph.input.integer("high")
    inputs = np.random.default_rng(0).integers(low, high + 1, (6, graph.input.integer("features")))
    found = traced_states(graph, inputs, Segment(3, hidden=hidden), challenged)
    whole = evaluate(graph, inputs[None])[0]
    shown = [v for witness in found for v in witness.public["logits"]]
    assert shown == whole.ravel().tolist()
    assert evaluate(graph, inputs[None, 3:])[0].ravel().tolist() != whole[3:].ravel().tolist()
    circuit = build_circuit(graph, challenged=challenged, segment=Segment(3, hidden=hidden)).circuit
    assert mock(circuit, found) == [True, True]


@pytest.mark.parametrize("steps", [0, 3, 6])
def test_segment_that_does_not_end_with_a_chunk_is_refused(steps: int) -> None:
    graph, _ = random_graph(0, **TEXT)
    assert step_unit(graph) == 4
    with pytest.raises(MambaintError, match="multiple of 4"):
        build_circuit(graph, segment=Segment(steps))


def test_model_of_one_chunk_is_refused() -> None:
    graph, _ = random_graph(0, seq_len=8, chunk_size=8, pooling="last")
    with pytest.raises(MambaintError, match="one chunk"):
        build_circuit(graph, segment=Segment(8))


@pytest.mark.parametrize("change", ["version", "first_states", "starts", "steps", "member", "byte"])
def test_altered_package_is_not_used(chains: Chains, change: str) -> None:
    raw = chains.chain.package
    assert decode_chain_package(raw, "test").encode() == raw
    package = chains.package
    if change == "version":
        raw = raw.replace(b'"version":1', b'"version":2')
    elif change == "first_states":
        raw = replace(package, first_states=(package.first_states[0][2:],)).encode()
    elif change == "starts":
        raw = replace(package, stage_starts=(1,)).encode()
    elif change == "steps":
        raw = replace(package, total_steps=8).encode()
    elif change == "member":
        raw = replace(package, head=package.last).encode()
    else:
        raw = raw[:200] + bytes([raw[200] ^ 1]) + raw[201:]
    with pytest.raises(MambaintError, match="cannot be used"):
        decode_chain_package(raw, "test")


@pytest.mark.parametrize("change", ["not json", "field", "chain", "steps", "segments", "spaces"])
def test_malformed_file_is_refused(chains: Chains, change: str) -> None:
    content = json.loads(chains.first.encode())
    if change == "field":
        content["extra"] = 1
    elif change == "chain":
        content["chain"] = 1 << 128
    elif change == "steps":
        content["steps"] = True
    elif change == "segments":
        content["segments"] = []
    raw = json.dumps(content, indent=1 if change == "spaces" else None, separators=(",", ":")).encode()
    raw = raw[:-3] if change == "not json" else raw
    verdict = check_chain(io.BytesIO(raw), chains.package, chains.digest)
    assert not verdict.valid and verdict.reason


def test_every_byte_of_the_file_counts(chains: Chains) -> None:
    raw, random = chains.first.encode(), np.random.default_rng(0)
    edges = [*range(0, 260, 7), *range(len(raw) - 120, len(raw), 5)]
    places = sorted({*edges, *random.integers(0, len(raw), 40).tolist()})
    for place in places:
        altered_file = raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :]
        assert not check_chain(io.BytesIO(altered_file), chains.package, chains.digest).valid, place
    for other in (raw[:-1], raw + b"\n", raw[:400], raw + raw, b"", raw[:300] + raw[-300:]):
        assert not check_chain(io.BytesIO(other), chains.package, chains.digest).valid


def test_name_that_looks_like_the_end_of_a_segment_does_not_split_it(chains: Chains) -> None:
    forged = with_segments(
        chains.first, also_public(chains.first.segments[0], "}],[{", [1]), *chains.first.segments[1:]
    )
    with pytest.raises(InvalidProof):
        decode_chain_proof(forged.encode())


def test_file_longer_than_the_memory_is_read_segment_by_segment(tmp_path: Path) -> None:
    stage = StageProof({"logits": [1, -2]}, (3,), (), bytes(9000))
    header = ChainHeader("0" * 64, "1" * 64, 7, 4000, 0)
    path, count = tmp_path / "long", 4000
    with path.open("wb") as file:
        file.writelines(encoded(header, ((stage,) for _ in range(count))))
    assert path.stat().st_size > 64 << 20
    tracemalloc.start()
    with path.open("rb") as stream:
        found, segments = read_chain(stream)
        assert found == header
        assert sum(segment == (stage,) for segment in segments) == count
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 << 20
