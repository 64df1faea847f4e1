"""Models cut by layers: stages compute the integers of the whole, and only those of one chain fit."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from circuits.cells import Values
from circuits.circuit import ACTIVATIONS_IN, ACTIVATIONS_OUT, STATE_IN, STATE_OUT, Witness
from circuits.lowering import build_circuit
from circuits.segment import PLACE, Segment, by_name, leaving, reduction
from circuits.stages import all_cuts, cut_points, cut_stages
from mamba_int.errors import MambaintError
from mamba_int.graph import Graph, IntArray
from mamba_int.interpreter import evaluate
from tests.circuits_runtime.models import random_graph
from tests.zk.chain_files import ChainProof
from tests.zk.test_chain import LENGTH, TEXT, Chains, altered, prove_one, two_chains, with_segments
from zk.chain_cut import pick_cut
from zk.chain_package import decode_chain_package
from zk.chain_proof import Stages
from zk.prove import mock
from zk.prove_chain import PROOF, SECRET, first_state, leaves, prepare_chain, prove_chain, segment_witness
from zk.rederive import chain_fault
from zk.verify import Verdict
from zk.verify_chain import check_chain

TWO_LAYERS: dict[str, Any] = TEXT | {"n_layer": 2}


def stage_witnesses(graph: Graph, inputs: IntArray, parts: tuple[range, ...], form: Segment) -> list[Witness]:
    """Witnesses of all stages of all segments, in order; the last has the head where there is one."""
    count, found = len(inputs) // form.steps, []
    body = [build_circuit(graph, segment=replace(form, nodes=nodes)) for nodes in parts]
    states = [first_state(lowered) for lowered in body]
    for i in range(count):
        own, received = inputs[i * form.steps : (i + 1) * form.steps], np.zeros(0, np.int64)
        for d, lowered in enumerate(body):
            if d == len(parts) - 1 and i == count - 1 and reduction(graph) is not None:
                lowered = build_circuit(graph, segment=replace(form, nodes=parts[d], head=True))
            witness = segment_witness(lowered, own, states[d], received, (0, i, 0))
            states[d], received = (
                leaves(lowered, witness, STATE_OUT),
                leaves(lowered, witness, ACTIVATIONS_OUT),
            )
            found.append(witness)
    return found


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize(
    "forms",
    [
        {"task": "language_model", "vocab_size": 7, "n_layer": 3},
        {"pooling": "mean", "n_layer": 2},
        {"pooling": "max", "rotation": "shear", "n_layer": 2},
        {"pooling": "last", "rotation": "none", "d_conv": 2, "n_layer": 2},
    ],
)
def test_stages_compute_the_integers_of_the_whole(forms: dict[str, Any], hidden: bool) -> None:
    small = {"seq_len": 8, "chunk_size": 4, "d_model": 4, "d_state": 2}
    graph, inputs = random_graph(0, **(small | forms))
    cuts = all_cuts(graph)
    assert len(cuts) >= forms["n_layer"]
    for parts in cuts.values():
        assert [node for nodes in parts for node in nodes] == list(range(len(graph.nodes)))
        for sequence in inputs[1:3]:
            found = stage_witnesses(graph, sequence, parts, Segment(4, hidden=hidden))
            wanted = evaluate(graph, sequence[None])[0].ravel().tolist()
            shown = [v for witness in found for v in witness.public.get("logits", [])]
            assert shown[-len(wanted) :] == wanted


def test_stages_are_about_as_dear_as_each_other() -> None:
    graph, _ = random_graph(0, **(TEXT | {"n_layer": 4}))
    rows = [
        build_circuit(graph, segment=Segment(4, hidden=True, nodes=nodes)).circuit.rows
        for nodes in cut_stages(graph, 4)
    ]
    whole = build_circuit(graph, segment=Segment(4, hidden=True)).circuit.rows
    assert max(rows) < whole / 3 and sum(rows) < 1.15 * whole


def test_more_stages_than_blocks_are_refused() -> None:
    graph, _ = random_graph(0, **TWO_LAYERS)
    most = max(all_cuts(graph))
    assert most == 2
    with pytest.raises(MambaintError, match="cannot be cut into 3 stages; choose at most 2"):
        cut_stages(graph, 3)
    # Greedy decoding remembers the next token: the head can stand alone.
    assert max(all_cuts(graph, reads_tokens=True)) == 3


def test_tokens_of_a_model_that_has_none_are_one_line() -> None:
    graph, _ = random_graph(0, n_layer=2, pooling="last", chunk_size=4)
    for call in (
        lambda: cut_stages(graph, 2, True),
        lambda: pick_cut(graph, 8, Segment(0, greedy=True), stages=1),
    ):
        with pytest.raises(MambaintError, match="no language model"):
            call()


def test_every_activation_that_is_handed_on_is_the_one_computed() -> None:
    """The commitment is to private copies: a liar's copy must not differ from what the circuit computes."""
    graph, inputs = random_graph(0, **TWO_LAYERS)
    lowered = build_circuit(graph, segment=Segment(4, hidden=True, nodes=cut_stages(graph, 2)[0]))
    carried = lowered.carried
    assert carried is not None
    (name,) = carried.activations_out
    given = by_name(carried.shapes, first_state(lowered)) | {PLACE: np.array([1, 0, 4])}

    def moved(values: Values) -> Values:
        flat = values.ravel()
        flat[-1] += 1
        return flat.reshape(values.shape)

    witnesses = [
        lowered.witness(inputs[2, :4], lies=lies, given=given) for lies in ({}, {leaving(name): moved})
    ]
    assert mock(lowered.circuit, witnesses) == [True, False]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module", params=["shown", "hidden"])
def chains(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Chains:
    """Two chains of three segments in two stages each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MAMBAINT_CACHE", str(cache))
        graph, _ = random_graph(0, **TWO_LAYERS)
        chain = prepare_chain(graph, 4, stages=2, public_states=request.param == "shown")
        found = two_chains(chain, tmp_path_factory.mktemp("chains"))
        assert chain_fault(found.package, graph) == ""
    return found


def test_honest_stages_are_one_statement(chains: Chains) -> None:
    verdict = chains.verdict(chains.first)
    assert (verdict.valid, verdict.reason) == (True, "")
    assert verdict.public == {"logits": evaluate(chains.chain.graph, chains.inputs[None])[0].ravel().tolist()}
    assert verdict.statement["seq_len"] == LENGTH and verdict.statement["segments"] == 3


def moved_activations(segment: Stages) -> Stages:
    """The first stage hands other activations on: of hidden ones, the commitment to its state."""
    first, *rest = segment
    if first.activations:
        return (replace(first, activations=(first.activations[0] + 1, *first.activations[1:])), *rest)
    proof = bytearray(first.proof)
    proof[128:192] = proof[64:128]
    return (replace(first, proof=bytes(proof)), *rest)


def mixed(proof: ChainProof, i: int, *stages: Any) -> ChainProof:
    """With these stages as its segment i."""
    return replace(proof, segments=(*proof.segments[:i], stages, *proof.segments[i + 1 :]))


ATTACKS: dict[str, Callable[[ChainProof, ChainProof], ChainProof]] = {
    "activations tampered": lambda a, b: mixed(a, 1, *moved_activations(a.segments[1])),
    "stages swapped": lambda a, b: mixed(a, 1, *reversed(a.segments[1])),
    "first stage twice": lambda a, b: mixed(a, 1, a.segments[1][0], a.segments[1][0]),
    "first stage of another segment": lambda a, b: mixed(a, 1, a.segments[0][0], a.segments[1][1]),
    "last stage of another segment": lambda a, b: mixed(a, 1, a.segments[1][0], a.segments[0][1]),
    "first stage of another chain": lambda a, b: mixed(a, 1, b.segments[1][0], a.segments[1][1]),
    "last stage of another chain": lambda a, b: mixed(a, 1, a.segments[1][0], b.segments[1][1]),
    "first stage left out": lambda a, b: mixed(a, 1, a.segments[1][1]),
    "last stage left out": lambda a, b: mixed(a, 1, a.segments[1][0]),
    "activations after the last stage": lambda a, b: mixed(a, 1, *altered(a.segments[1], activations=(1,))),
    "segments swapped": lambda a, b: with_segments(a, a.segments[1], a.segments[0], a.segments[2]),
    "spliced": lambda a, b: with_segments(a, a.segments[0], *b.segments[1:]),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_stages_that_do_not_belong_together_are_refused(chains: Chains, name: str) -> None:
    forged = ATTACKS[name](chains.first, chains.second)
    assert forged != chains.first
    verdict = chains.verdict(forged)
    assert not verdict.valid and verdict.reason and verdict.public == {}


def test_stage_that_computed_on_other_activations_is_refused(chains: Chains, tmp_path: Path) -> None:
    """A liar proves the last stage honestly, on activations that the first has not handed on."""
    chain, (lower, upper) = chains.chain, chains.chain.stages
    place, empty = (chains.first.chain, 0, 4), np.zeros(0, np.int64)
    states = [first_state(stage.lowered) for stage in chain.stages]
    honest = segment_witness(lower.lowered, chains.inputs[:4], states[0], empty, place)
    activations = leaves(lower.lowered, honest, ACTIVATIONS_OUT)
    verdicts: list[Verdict] = []
    for lie in (0, 1):
        received = activations.copy()
        received[0] += lie
        witness = segment_witness(upper.lowered, chains.inputs[:4], states[1], received, place)
        if chain.hidden:
            salts = {name: [7 + d] * 8 for d, name in enumerate((ACTIVATIONS_OUT, STATE_OUT))}
            first = {STATE_IN: list(range(1, 9))}
            honest = replace(honest, salts=salts | first)
            witness = replace(witness, salts={ACTIVATIONS_IN: salts[ACTIVATIONS_OUT]} | first)
        segment = (prove_one(lower, honest), prove_one(upper, witness))
        proof = ChainProof(chains.package.model_id, chains.digest, place[0], 4, 0, (segment,))
        verdicts.append(chains.verdict(proof))
    assert verdicts[0].valid and not verdicts[1].valid
    assert "stage 1" in verdicts[1].reason


def test_package_that_skips_nodes_is_refused(
    chains: Chains, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    """Who publishes keys of the stages before and after a layer would prove a model without it."""
    monkeypatch.setenv("MAMBAINT_CACHE", str(cache))
    package, graph = chains.package, chains.chain.graph
    for starts in ((0, 0), (1, package.stage_starts[1]), (0,), (0, -1)):
        with pytest.raises(MambaintError, match="one after the other"):
            decode_chain_package(replace(package, stage_starts=starts).encode(), "test")
    swapped = replace(package, stages=package.stages[::-1], first_states=package.first_states[::-1])
    with pytest.raises(MambaintError, match="not that of a stage"):
        decode_chain_package(swapped.encode(), "test")
    alone = replace(
        package, stages=package.stages[1:], first_states=package.first_states[1:], stage_starts=(0,)
    )
    with pytest.raises(MambaintError, match="not that of a stage"):
        decode_chain_package(alone.encode(), "test")
    moved = replace(package, stage_starts=(0, cut_points(graph)[0]))
    assert moved.stage_starts != package.stage_starts
    assert chain_fault(moved, graph) != ""
    assert "stages" in chain_fault(replace(package, stage_starts=(0, 5)), graph)


def test_killed_run_proves_no_stage_twice(chains: Chains, tmp_path: Path) -> None:
    result = prove_chain(chains.chain, [chains.inputs], tmp_path / "c")
    assert (result.segments, result.stages, result.proved) == (3, 2, 6)
    files = sorted(path for path in (tmp_path / "c").iterdir() if path.name not in (SECRET, PROOF))
    assert len(files) == 6
    files[0].unlink()
    files[1].write_bytes(files[2].read_bytes())
    again = prove_chain(chains.chain, [chains.inputs], tmp_path / "c")
    assert again.proved == 2
    assert check_chain(io.BytesIO(again.file.read_bytes()), chains.package, chains.digest).valid
