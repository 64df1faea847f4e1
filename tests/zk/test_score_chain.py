"""Chains that prove the log-score of a text, and scores, texts and cuts that are not the ones proved."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from circuits.circuit import ACTIVATIONS_OUT, STATE_IN, STATE_OUT, Witness
from circuits.lowering import LoweredCircuit, build_circuit
from circuits.segment import FOLLOWING, TOTAL, Segment, by_name, leaving
from circuits.stages import chain_forms, cut_stages
from mamba_int.errors import MambaintError
from mamba_int.graph import Graph
from mamba_int.interpreter import evaluate
from mamba_int.log_score import LogScore
from tests.circuits.conftest import GRAPHS
from tests.circuits.lying import add_at, satisfied
from tests.circuits_runtime.models import random_graph
from tests.zk.chain_files import ChainProof, decode_chain_proof
from tests.zk.test_chain import TEXT, also_public, altered, prove_one
from zk.chain_package import ChainPackage, decode_chain_package
from zk.chain_proof import Stages
from zk.prove import mock
from zk.prove_chain import ProvableChain, first_state, leaves, prepare_chain, prove_chain, segment_witness
from zk.rederive import chain_fault
from zk.verify import Verdict
from zk.verify_chain import check_chain, check_stage, point_of, token_flags

PROMPT, TOKENS = 2, [3, 1, 4, 1, 2, 0, 2, 4, 3, 3]
OTHER = [*TOKENS[:-1], 1]
VOCABULARY, STEPS = 5, 4
# Narrow enough for 2^12 rows.
NARROW = TEXT | {"vocab_size": VOCABULARY}


def score_of(graph: Graph, tokens: list[int], prompt: int) -> int:
    """The specification on the whole text."""
    text = np.array(tokens)
    logits = evaluate(graph, text[None])[0]
    return int(LogScore.of(graph)(logits[:-1], text[1:])[prompt - 1 :].sum())


@dataclass(frozen=True)
class Scored:
    """A chain that proves a score, one of another text, and what a liar has of both."""

    chain: ProvableChain
    package: ChainPackage
    digest: str
    proof: ChainProof
    other: ChainProof

    @property
    def lowered(self) -> LoweredCircuit:
        return self.chain.stages[0].lowered

    def verdict(self, proof: ChainProof) -> Verdict:
        """On a file that may be a liar's."""
        return check_chain(io.BytesIO(proof.encode()), self.package, self.digest)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Scored:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MAMBAINT_CACHE", str(cache))
        graph, _ = random_graph(0, **NARROW)
        chain = prepare_chain(graph, STEPS, scored=True)
        folder = tmp_path_factory.mktemp("chains")
        results = [
            prove_chain(chain, [np.array(text)], folder / str(i), prompt=PROMPT)
            for i, text in enumerate((TOKENS, OTHER))
        ]
        proofs = [decode_chain_proof(result.file.read_bytes()) for result in results]
    digest = hashlib.sha256(chain.package).hexdigest()
    return Scored(chain, decode_chain_package(chain.package, "test"), digest, *proofs)


def test_score_is_shown_and_neither_text_nor_logits_nor_parts_of_the_sum(scored: Scored) -> None:
    verdict = scored.verdict(scored.proof)
    assert (verdict.valid, verdict.reason) == (True, "")
    graph = scored.chain.graph
    assert verdict.public == {"score": [score_of(graph, TOKENS, PROMPT)]}
    assert verdict.statement["prompt_steps"] == PROMPT and verdict.statement["seq_len"] == len(TOKENS)
    assert verdict.statement["score_frac"] == LogScore.of(graph).score_frac
    shown = [stage.public for (stage,) in scored.proof.segments]
    assert shown == [{"score": [0]}, {"score": [0]}, {"score": verdict.public["score"]}]
    assert verdict.public != scored.verdict(scored.other).public


def with_score(segment: Stages, score: int) -> Stages:
    return altered(segment, public={"score": [score]})


def in_place(proof: ChainProof, i: int, segment: Stages) -> ChainProof:
    segments = list(proof.segments)
    segments[i] = segment
    return replace(proof, segments=tuple(segments))


def total(proof: ChainProof) -> int:
    return proof.segments[-1][0].public["score"][0]


ATTACKS: dict[str, Callable[[ChainProof, ChainProof], ChainProof]] = {
    "better total": lambda a, b: in_place(a, 2, with_score(a.segments[2], total(a) + 1)),
    "no total": lambda a, b: in_place(a, 2, with_score(a.segments[2], 0)),
    "total of another text": lambda a, b: in_place(a, 2, with_score(a.segments[2], total(b))),
    "sum of a part": lambda a, b: in_place(a, 0, with_score(a.segments[0], total(a) // 3)),
    "total at a cut": lambda a, b: in_place(a, 1, with_score(a.segments[1], total(a))),
    "end of another text": lambda a, b: in_place(a, 2, b.segments[2]),
    "end of another text under its number": lambda a, b: replace(
        in_place(a, 2, b.segments[2]), chain=b.chain
    ),
    "shorter prompt": lambda a, b: replace(a, prompt=PROMPT - 1),
    "longer prompt": lambda a, b: replace(a, prompt=PROMPT + 1),
    "prompt beyond a cut": lambda a, b: replace(a, prompt=STEPS + 1),
    "no prompt": lambda a, b: replace(a, prompt=0),
    "nothing but prompt": lambda a, b: replace(a, prompt=len(TOKENS)),
    "padding counted": lambda a, b: replace(a, steps=len(TOKENS) + 1),
    "last token not counted": lambda a, b: replace(a, steps=len(TOKENS) - 1),
    "last dropped": lambda a, b: replace(a, segments=a.segments[:2], steps=2 * STEPS),
    "last dropped, its total kept": lambda a, b: replace(
        a, segments=(a.segments[0], with_score(a.segments[1], total(a))), steps=2 * STEPS
    ),
    "flags of one's own": lambda a, b: in_place(a, 0, also_public(a.segments[0], "scored", [0, 0, 0, 1])),
    "an end of one's own": lambda a, b: in_place(a, 0, also_public(a.segments[0], "last", [1])),
    "score left out": lambda a, b: in_place(a, 0, altered(a.segments[0], public={})),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_score_that_is_not_the_one_of_the_text_is_refused(scored: Scored, name: str) -> None:
    forged = ATTACKS[name](scored.proof, scored.other)
    assert forged not in (scored.proof, scored.other)
    verdict = scored.verdict(forged)
    assert not verdict.valid and verdict.reason and verdict.public == {}


def test_sum_that_does_not_begin_at_zero_verifies_alone_and_not_as_a_chain(scored: Scored) -> None:
    (circuit,) = scored.chain.stages
    carried = circuit.lowered.carried
    assert carried is not None
    begun = by_name(carried.shapes, first_state(circuit.lowered))
    begun[TOTAL] = begun[TOTAL] + (1 << 40)
    state = np.concatenate([part.ravel() for part in begun.values()])
    place, flags = (5, 0, 4), token_flags(1, 4, 0, STEPS, True)
    witness = segment_witness(circuit.lowered, np.array(TOKENS[:4]), state, state[:0], place, flags)
    assert witness.public["score"] == [(1 << 40) + score_of(scored.chain.graph, TOKENS[:4], 1)]
    segment = prove_one(circuit, witness)
    check_stage(segment, place, point_of(segment, circuit.package, STATE_IN), (), circuit.package, flags)
    forged = ChainProof(scored.package.model_id, scored.digest, 5, 4, 1, ((segment,),))
    assert "segment 0" in scored.verdict(forged).reason


def two_witnesses(scored: Scored, told: int) -> list[Witness]:
    """Of the first two segments, the first of which says that ``told`` comes next."""
    lowered, state, found = scored.lowered, first_state(scored.lowered), []
    for i, following in enumerate((told, TOKENS[8])):
        inputs = np.array(TOKENS[4 * i : 4 * i + 4])
        flags = token_flags(PROMPT, len(TOKENS), i, STEPS, True)
        found.append(segment_witness(lowered, inputs, state, state[:0], (1, i, 0), flags, following))
        state = leaves(lowered, found[-1], STATE_OUT)
    return found


def test_token_after_a_cut_is_the_one_that_was_scored_before_it(scored: Scored) -> None:
    """The likeliest token could be scored in place of the one that follows."""
    truth, lie = (two_witnesses(scored, told) for told in (TOKENS[4], TOKENS[4] + 1))
    assert lie[0].private[leaving(TOTAL)] != truth[0].private[leaving(TOTAL)]
    assert [satisfied(scored.lowered, witness) for witness in truth] == [True, True]
    assert [satisfied(scored.lowered, witness) for witness in lie] == [True, False]
    assert mock(scored.lowered.circuit, [*truth, *lie]) == [True, True, True, False]


def test_padding_has_no_score_whatever_it_is(scored: Scored) -> None:
    """Only the tokens that the verifier counts are in the sum."""
    lowered, state = scored.lowered, first_state(scored.lowered)
    flags = token_flags(1, 2, 0, STEPS, True)
    assert flags == [1, 0, 0, 0]
    found = [
        segment_witness(lowered, np.array([3, 1, *padding]), state, state[:0], (1, 0, 2), flags)
        for padding in ((0, 0), (2, 4))
    ]
    wanted = [score_of(scored.chain.graph, TOKENS[:2], 1)]
    assert [witness.public["score"] for witness in found] == [wanted, wanted]


def test_no_private_tensor_of_a_score_can_be_another(scored: Scored) -> None:
    honest = two_witnesses(scored, TOKENS[4])[1]
    lowered, state = scored.lowered, leaves(scored.lowered, two_witnesses(scored, TOKENS[4])[0], STATE_OUT)
    carried = lowered.carried
    assert carried is not None
    flags = token_flags(PROMPT, len(TOKENS), 1, STEPS, True)
    given = by_name(carried.shapes, state) | {
        "place": np.array([1, 1, 0]),
        "flags": np.array(flags),
        "following": np.array([TOKENS[8]]),
        "ends": np.array([0]),
    }
    own = ("score", "following", "flags", "ends", leaving("token:next"), leaving(TOTAL))
    names = [name for name, _ in lowered.circuit.private if name.startswith(own)]
    # What follows is free to say, but for the link; what is entered is bound by it.
    names = [name for name in names if name not in (FOLLOWING, TOTAL)]
    assert {"score.normaliser", "score.q", "score.weights.looked_up", "score.t0", "score.p0"} <= set(names)

    def forged(name: str, delta: int) -> Witness:
        witness = lowered.witness(np.array(TOKENS[4:8]), lies={name: add_at((0, delta))}, given=given)
        # The verifier makes up the flags, and whether it is the last.
        fixed = {shown: honest.public[shown] for shown in ("scored", "last")}
        return replace(witness, public=witness.public | fixed)

    # What is 0 and read through a relu may be negative as well.
    through_relu = ("score.t", "score.p", "following.one_hot")
    lies = {
        f"{name} {delta:+}": forged(name, delta)
        for name in names
        for delta in (1, -1)
        if delta > 0 or honest.private[name][0] or not name.startswith(through_relu)
    }
    assert satisfied(lowered, honest)
    assert [what for what, lie in lies.items() if satisfied(lowered, lie)] == []
    # EZKL's own verdict on some of them.
    some = list(lies.values())[:: len(lies) // 4]
    assert mock(lowered.circuit, [honest, *some]) == [True, *[False] * len(some)]


def proved_score(circuits: list[LoweredCircuit], text: list[int], prompt: int, steps: int) -> int:
    """What the last segment of a text shows, once all witnesses hold; the others show 0."""
    states, count = [first_state(circuit) for circuit in circuits], -(-len(text) // steps)
    for i in range(count):
        part, last = text[i * steps : (i + 1) * steps], i == count - 1
        following = 0 if last else text[(i + 1) * steps]
        flags = token_flags(prompt, len(text), i, steps, True)
        padded, place = np.array(part + [0] * (steps - len(part))), (9, i, len(part) if last else 0)
        received = np.zeros(0, np.int64)
        for d, circuit in enumerate(circuits):
            witness = segment_witness(circuit, padded, states[d], received, place, flags, following)
            assert prompt != 1 or satisfied(circuit, witness)
            states[d] = leaves(circuit, witness, STATE_OUT)
            received = leaves(circuit, witness, ACTIVATIONS_OUT)
        assert last or witness.public["score"] == [0]
    (shown,) = witness.public["score"]
    return shown


@pytest.mark.parametrize(
    ("steps", "stages", "hidden"), [(4, 1, True), (8, 1, False), (12, 1, True), (4, 2, True), (4, 2, False)]
)
def test_score_is_the_same_however_the_text_is_cut(steps: int, stages: int, hidden: bool) -> None:
    """By time and by layers, with hidden and with shown states; no proof is needed to see it."""
    graph, inputs = random_graph(0, **(NARROW | {"n_layer": 2}))
    text = inputs[3][:11].tolist()
    forms = chain_forms(graph, cut_stages(graph, stages, True), Segment(steps, hidden=hidden, scored=True))
    circuits = [build_circuit(graph, segment=form) for form in forms]
    for prompt in (1, 5, 10):
        assert proved_score(circuits, text, prompt, steps) == score_of(graph, text, prompt)


def test_text_that_is_shown_is_the_one_that_was_scored(
    scored: Scored, monkeypatch: pytest.MonkeyPatch, cache: Path, tmp_path: Path
) -> None:
    monkeypatch.setenv("MAMBAINT_CACHE", str(cache))
    chain = prepare_chain(scored.chain.graph, STEPS, scored=True, public_input=True)
    package, digest = decode_chain_package(chain.package, "test"), hashlib.sha256(chain.package).hexdigest()
    # As a stream gives it.
    result = prove_chain(chain, [np.array([token]) for token in TOKENS[:6]], tmp_path / "c", prompt=1)
    proof = decode_chain_proof(result.file.read_bytes())
    verdict = check_chain(io.BytesIO(proof.encode()), package, digest)
    assert verdict.valid and verdict.public["input"] == TOKENS[:6]
    assert verdict.public["score"] == [score_of(chain.graph, TOKENS[:6], 1)]
    for i in range(2):
        shown = dict(proof.segments[i][0].public)
        for place in range(4):
            text = list(shown["input"])
            text[place] = (text[place] + 1) % VOCABULARY
            forged = in_place(proof, i, altered(proof.segments[i], public=shown | {"input": text}))
            assert not check_chain(io.BytesIO(forged.encode()), package, digest).valid
    # A proof that hides its text is none of one that shows it, and the reverse.
    assert not scored.verdict(replace(proof, verifier_package=scored.digest)).valid
    assert not check_chain(
        io.BytesIO(replace(scored.proof, verifier_package=digest).encode()), package, digest
    ).valid


def test_unit_is_that_of_the_model(scored: Scored, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """A package with another unit would say that a text is likelier than it is."""
    monkeypatch.setenv("MAMBAINT_CACHE", str(cache))
    package, graph = scored.package, scored.chain.graph
    assert chain_fault(package, graph) == ""
    assert "unit" in chain_fault(replace(package, score_frac=package.score_frac + 1), graph)
    for wrong in (0, 61, -1):
        with pytest.raises(MambaintError, match="unit"):
            decode_chain_package(replace(package, score_frac=wrong).encode(), "test")


def test_prover_refuses_what_it_cannot_prove(scored: Scored, tmp_path: Path) -> None:
    for prompt, words in ((0, "belong together"), (len(TOKENS), "leaves nothing after it")):
        with pytest.raises(MambaintError, match=words):
            prove_chain(scored.chain, [np.array(TOKENS)], tmp_path / str(prompt), prompt=prompt)
    with pytest.raises(MambaintError, match="not both"):
        prepare_chain(scored.chain.graph, STEPS, scored=True, greedy=True)
    classifier = replace(GRAPHS["scan_quaternion"](), seq_len=6)
    with pytest.raises(MambaintError, match="no language model"):
        prepare_chain(classifier, 3, scored=True)
