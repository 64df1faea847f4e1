"""Chains that prove what a language model generated, and texts that it did not."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from circuits.cells import Cells
from circuits.circuit import STATE_OUT
from circuits.gadgets.argmax import argmax
from circuits.lowering import build_circuit
from circuits.segment import FLAGS, PLACE, Segment, by_name, initial_state
from mamba_int.errors import MambaintError
from mamba_int.graph import Graph
from mamba_int.interpreter import evaluate
from tests.circuits.conftest import GRAPHS
from tests.circuits.test_soundness import accepts
from tests.circuits_runtime.models import random_graph
from tests.zk.chain_files import ChainProof, decode_chain_proof
from tests.zk.test_chain import TEXT, also_public, altered
from zk import prove_chain as proving
from zk.chain_package import ChainPackage, decode_chain_package
from zk.prove import mock
from zk.prove_chain import ProvableChain, prepare_chain, prove_chain
from zk.verify import Verdict
from zk.verify_chain import check_chain

PROMPT, LENGTH = 3, 10


def continued(graph: Graph, prompt: list[int], length: int) -> list[int]:
    """What greedy decoding makes of a prompt."""
    tokens = list(prompt)
    while len(tokens) < length:
        tokens.append(int(evaluate(graph, np.array([tokens]))[0, -1].argmax()))
    return tokens


@dataclass(frozen=True)
class Generated:
    """A chain that proves a text, and what a liar has of it."""

    chain: ProvableChain
    package: ChainPackage
    digest: str
    tokens: list[int]
    proof: ChainProof

    def verdict(self, proof: ChainProof) -> Verdict:
        """On a file that may be a liar's."""
        return check_chain(io.BytesIO(proof.encode()), self.package, self.digest)


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Generated:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MAMBAINT_CACHE", str(tmp_path_factory.mktemp("cache")))
        graph, _ = random_graph(0, **TEXT)
        chain = prepare_chain(graph, 4, greedy=True)
        tokens = continued(graph, [3, 1, 4], LENGTH)
        result = prove_chain(chain, [np.array(tokens)], tmp_path_factory.mktemp("c"), prompt=PROMPT)
    package = decode_chain_package(chain.package, "test")
    digest = hashlib.sha256(chain.package).hexdigest()
    return Generated(chain, package, digest, tokens, decode_chain_proof(result.file.read_bytes()))


def test_text_is_shown_and_neither_prompt_nor_logits(generated: Generated) -> None:
    verdict = generated.verdict(generated.proof)
    assert (verdict.valid, verdict.reason) == (True, "")
    assert verdict.public == {"tokens": generated.tokens[PROMPT:]}
    assert verdict.statement["prompt_steps"] == PROMPT
    shown = [token for (stage,) in generated.proof.segments for token in stage.public["tokens"]]
    assert shown[:PROMPT] == [0] * PROMPT and shown[LENGTH:] == [0] * (len(shown) - LENGTH)


def other_token(proof: ChainProof, step: int) -> ChainProof:
    """One token of the text is another."""
    i, place = divmod(step, 4)
    tokens = list(proof.segments[i][0].public["tokens"])
    tokens[place] = (tokens[place] + 1) % 11
    segments = list(proof.segments)
    segments[i] = altered(segments[i], public={"tokens": tokens})
    return replace(proof, segments=tuple(segments))


ATTACKS: dict[str, Callable[[ChainProof], ChainProof]] = {
    "another first token": lambda p: other_token(p, PROMPT),
    "another token at a cut": lambda p: other_token(p, 4),
    "another last token": lambda p: other_token(p, LENGTH - 1),
    "shorter prompt": lambda p: replace(p, prompt=PROMPT - 1),
    "longer prompt": lambda p: replace(p, prompt=PROMPT + 1),
    "no prompt": lambda p: replace(p, prompt=0),
    "nothing but prompt": lambda p: replace(p, prompt=LENGTH),
    "shorter text": lambda p: replace(p, steps=LENGTH - 1),
    "longer text": lambda p: replace(p, steps=LENGTH + 1),
    "flags of one's own": lambda p: replace(
        p,
        segments=(
            also_public(p.segments[0], "generated", [0, 0, 0, 1]),
            *p.segments[1:],
        ),
    ),
    "last dropped": lambda p: replace(p, segments=p.segments[:2], steps=8),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_text_that_was_not_generated_so_is_refused(generated: Generated, name: str) -> None:
    forged = ATTACKS[name](generated.proof)
    assert forged != generated.proof
    verdict = generated.verdict(forged)
    assert not verdict.valid and verdict.public == {}


@pytest.mark.parametrize("step", range(PROMPT, 8))
def test_token_that_is_not_the_greedy_one_has_no_witness(generated: Generated, step: int) -> None:
    """Also at a cut, where the token before is another segment's: the state says which comes next."""
    lowered = generated.chain.stages[0].lowered
    assert lowered.carried is not None
    tokens = list(generated.tokens[:8])
    for lie in (0, 1):
        chosen = list(tokens)
        if lie:
            chosen[step] = (chosen[step] + 1) % 11
        state, accepted = initial_state(lowered.carried.shapes, lowered.carried.first), []
        for i in range(2):
            flags = [int(PROMPT <= place < 8) for place in range(4 * i, 4 * i + 4)]
            given = by_name(lowered.carried.shapes, state) | {
                PLACE: np.array([1, i, 0]),
                FLAGS: np.array(flags),
            }
            witness = lowered.witness(np.array(chosen[4 * i : 4 * i + 4]), given=given)
            accepted += mock(lowered.circuit, [witness])
            state = proving.leaves(lowered, witness, STATE_OUT)
        assert all(accepted) is not bool(lie)


def test_prover_says_which_token_is_not_the_greedy_one(generated: Generated, tmp_path: Path) -> None:
    tokens = np.array(generated.tokens)
    tokens[6] = (tokens[6] + 1) % 11
    with pytest.raises(MambaintError, match=f"token {tokens[6]} at step 6 is not the greedy one"):
        prove_chain(generated.chain, [tokens], tmp_path / "c", prompt=PROMPT)
    with pytest.raises(MambaintError, match="belong together"):
        prove_chain(generated.chain, [tokens], tmp_path / "c")


def test_proof_of_logits_is_none_of_generation(
    generated: Generated, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MAMBAINT_CACHE", str(tmp_path / "cache"))
    plain = prepare_chain(generated.chain.graph, 4)
    result = prove_chain(plain, [np.array(generated.tokens)], tmp_path / "c")
    proof = decode_chain_proof(result.file.read_bytes())
    for prompt in (0, PROMPT):
        forged = replace(proof, prompt=prompt, verifier_package=generated.digest)
        assert not generated.verdict(forged).valid
    package = decode_chain_package(plain.package, "test")
    digest = hashlib.sha256(plain.package).hexdigest()
    assert not check_chain(io.BytesIO(replace(proof, prompt=PROMPT).encode()), package, digest).valid


def test_classifiers_generate_nothing() -> None:
    graph = replace(GRAPHS["scan_quaternion"](), seq_len=6)
    with pytest.raises(MambaintError, match="no language model"):
        build_circuit(graph, segment=Segment(3, greedy=True))


@pytest.mark.parametrize(
    "row", [[3, 1, 2], [1, 3, 3], [3, 3, 3], [-5, -9, -5], [0, 0, 1], [-8, 7, 7], [7, -8, -8], [-8, -8, -8]]
)
def test_only_the_first_of_the_largest_is_the_argmax(row: list[int]) -> None:
    """Ties are decided, and an entry one below the largest is not it."""
    cells = Cells(8)
    x = cells.check(cells.private("x", (1, 3), -8, 7, lambda get: np.array([row])))
    argmax(cells, "a", x)
    cells.close()
    for claimed in range(3):
        hot = [int(v == claimed) for v in range(4)]
        found = accepts(cells, {"x": [*row, 0], "a.one_hot": hot})
        assert found is (claimed == int(np.argmax(row)))
