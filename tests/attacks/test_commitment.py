"""Attacks on committed inputs: two proofs said to share an input, and openings that do not open."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from circuits.lowering import COMMITTED_INPUT, MODEL_INPUT, build_circuit
from mamba_int.graph import Graph
from tests.attacks.command import accepted, run_command
from tests.attacks.test_siblings import prove_under_foreign_keys
from tests.circuits.conftest import chain, node
from zk.challenge import POINT_BYTES
from zk.field import PRIME
from zk.jobs import stated_values
from zk.keys import make_keys
from zk.opening import Opening
from zk.package import read_package
from zk.proof import Proof, decode_proof
from zk.provable import statement
from zk.prove import prove
from zk.srs import development_srs

LOGROWS = 10
X = list(range(-6, 6))
Y = [*X[:-1], 7]
SALTS = tuple(1000003**i % PRIME for i in range(20, 28))
OTHER_SALTS = (*SALTS[:-1], SALTS[-1] + 1)


def model(seed: int = 0, steps: int = 3, features: int = 4, **card: Any) -> Graph:
    """A ternary projection; models of other seeds have other weights."""
    weight = np.random.default_rng(seed).integers(-1, 2, (3, features))
    graph = chain(node("y", "linear", "input", constants={"weight": weight}), T=steps, C=features)
    return dataclasses.replace(graph, card=card)


@dataclass(frozen=True)
class Made:
    """A proof with its package and its opening, in a folder of its own."""

    folder: Path

    @property
    def proof(self) -> str:
        return str(self.folder / "proof.json")

    @property
    def opening(self) -> str:
        return str(self.folder / "proof.opening.json")

    @property
    def verifier(self) -> str:
        return str(self.folder / "verifier.zip")

    @property
    def point(self) -> bytes:
        return decode_proof(Path(self.proof).read_bytes()).segments[0][:POINT_BYTES]


Maker = Callable[..., Made]


@pytest.fixture(scope="module")
def make(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Maker]:
    """Makes proofs as anyone can who leaves out the command's own checks."""
    folders: list[Path] = []

    def made(
        graph: Graph,
        x: list[int],
        salts: tuple[int, ...] = SALTS,
        *,
        logrows: int = LOGROWS,
        challenged: bool = False,
        commit_input: bool = True,
        srs_cache: Path = cache,
        spare: int | None = None,
        stated: dict[str, Any] | None = None,
    ) -> Made:
        lowered = build_circuit(graph, False, logrows, challenged, commit_input)
        witness = lowered.witness(np.array(x).reshape(graph.types[graph.input.name].shape))
        if spare is not None:
            values = [*witness.private[MODEL_INPUT][:-1], spare]
            witness = dataclasses.replace(witness, private={**witness.private, MODEL_INPUT: values})
        witness = dataclasses.replace(witness, salts={COMMITTED_INPUT: list(salts)})
        srs = development_srs(logrows, srs_cache)
        keys = make_keys(lowered.circuit, witness, srs, cache)
        folders.append(keys.folder)
        described = statement(graph, False, commit_input, "table") if stated is None else stated
        package = keys.package(described).encode()
        folder = tmp_path_factory.mktemp("made")
        (folder / "proof.json").write_bytes(prove(lowered.circuit, witness, keys, package).file)
        (folder / "verifier.zip").write_bytes(package)
        opening = Opening(
            salts=salts,
            commitment=Made(folder).point.hex(),
            logrows=logrows,
            size=len(witness.private[MODEL_INPUT]) + len(salts),
            srs_sha256=srs.sha256,
            proofs=1,
        )
        opening.write(folder / "proof.opening.json")
        return Made(folder)

    yield made
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def first(make: Maker) -> Made:
    return make(model(0), X)


@pytest.fixture(scope="module")
def second(make: Maker) -> Made:
    """The same hidden input under another model."""
    return make(model(1), X)


@pytest.fixture(autouse=True)
def cache_of_the_command(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAMBAINT_CACHE", str(cache))


def assert_same(one: Made, other: Made) -> None:
    outcome = run_command("verify", one.proof, "--same-input", other.proof)
    assert (outcome.code, outcome.err) == (0, ""), outcome
    assert outcome.out.splitlines()[0].endswith(f"and the input is that of {other.proof}")
    assert f"commitment   {one.point.hex()}\n" in outcome.out


def assert_not_same(one: Made, other: Made, because: str) -> None:
    """Exit code 1, the reason first and in JSON, whichever of the proofs is named first."""
    for a, b in ((one, other), (other, one)):
        outcome = run_command("verify", a.proof, "--same-input", b.proof)
        assert (outcome.code, outcome.err) == (1, ""), outcome
        assert outcome.out.startswith("INVALID: ") and because in outcome.out.splitlines()[0]
        answer = json.loads(run_command("verify", a.proof, "--same-input", b.proof, "--json").out)
        assert because in answer["reason"]
        assert (answer["valid"], answer["public"], answer["commitments"]) == (False, {}, {})


def run_open(proof: Made, x: Sequence[float], opening: str, *options: str) -> tuple[int, str]:
    """Exit code, and the one line that says why not."""
    path = proof.folder / "guess.json"
    path.write_text(json.dumps({"input_data": [list(x)]}))
    outcome = run_command("open", proof.proof, "--input", str(path), "--opening", opening, *options)
    assert outcome.err.count("\n") == (outcome.code == 2)
    return outcome.code, outcome.err or outcome.out.splitlines()[0]


def test_two_models_over_the_same_hidden_input(first: Made, second: Made) -> None:
    assert first.point == second.point
    assert_same(first, second)


def test_claimed_products_do_not_change_the_commitment(make: Maker, first: Made) -> None:
    assert_same(first, make(model(2), X, challenged=True))


def test_other_shape_of_the_same_numbers_is_the_same_input(make: Maker, first: Made) -> None:
    assert_same(first, make(model(0, steps=6, features=2), X))


def test_same_input_with_another_salt_is_not_shown_to_be_the_same(make: Maker, first: Made) -> None:
    assert_not_same(first, make(model(1), X, OTHER_SALTS), "not commit to the same input with the same salts")


def test_other_input_with_the_same_salts(make: Maker, first: Made) -> None:
    assert_not_same(first, make(model(1), Y), "do not commit to the same input")


def test_commitment_of_one_proof_put_at_the_head_of_another(make: Maker, first: Made) -> None:
    made = make(model(1), Y)
    proof = decode_proof(Path(made.proof).read_bytes())
    spliced = (first.point + proof.segments[0][POINT_BYTES:],)
    Path(made.proof).write_bytes(dataclasses.replace(proof, segments=spliced).encode())
    assert_not_same(first, made, "does not verify")


@pytest.mark.parametrize("byte", [0, 31, 32, 63])
def test_one_bit_of_the_commitment(first: Made, second: Made, byte: int, tmp_path: Path) -> None:
    shutil.copytree(second.folder, tmp_path / "copy")
    changed = Made(tmp_path / "copy")
    proof = decode_proof(Path(second.proof).read_bytes())
    segment = bytearray(proof.segments[0])
    segment[byte] ^= 1
    Path(changed.proof).write_bytes(dataclasses.replace(proof, segments=(bytes(segment),)).encode())
    assert_not_same(first, changed, "does not verify")


@pytest.mark.parametrize("challenged", [False, True])
@pytest.mark.parametrize("places", [list(range(12))[::-1], [1, 0, *range(2, 12)], [12, *range(1, 12)]])
def test_circuit_that_reads_the_committed_values_elsewhere(
    places: list[int], challenged: bool, cache: Path, tmp_path: Path
) -> None:
    # All cells are those of an honest proof about X; only the commitment is to other values.
    graph = model(0)
    lowered = build_circuit(graph, logrows=LOGROWS, challenged=challenged, commit_input=True)
    honest = lowered.witness(np.array(X).reshape(3, 4))
    honest = dataclasses.replace(honest, salts={COMMITTED_INPUT: [X[0], *SALTS[1:]]})
    onnx_model = onnx.ModelProto.FromString(lowered.circuit.onnx)
    (read,) = (n for n in onnx_model.graph.node if n.op_type == "Gather" and n.input[0] == COMMITTED_INPUT)
    (order,) = (i for i in onnx_model.graph.initializer if i.name == read.input[1])
    order.CopyFrom(numpy_helper.from_array(np.array(places), order.name))
    sibling = dataclasses.replace(lowered.circuit, onnx=onnx_model.SerializeToString())
    committed = [X[0] + 1, *X[1:]]
    for value, place in zip(X, places, strict=True):
        if place < len(X):
            committed[place] = value
    lied = dataclasses.replace(honest, private={**honest.private, MODEL_INPUT: committed})
    keys = make_keys(lowered.circuit, honest, development_srs(LOGROWS, cache), cache)
    package = keys.package({}).encode()
    try:
        forged = prove_under_foreign_keys(sibling, lied, keys, tmp_path / "sibling")
        own = prove_under_foreign_keys(lowered.circuit, honest, keys, tmp_path / "own")
    finally:
        shutil.rmtree(keys.folder)
    verdicts = [
        accepted(
            Proof(
                model_id=graph.model_id,
                circuit_id=keys.circuit_id,
                verifier_package=hashlib.sha256(package).hexdigest(),
                public=stated_values(lowered.circuit, honest),
                segments=(segment,),
            ).encode(),
            package,
        )
        for segment in (own, forged)
    ]
    assert verdicts == [True, False]


def test_proof_without_commitment(make: Maker, first: Made) -> None:
    assert_not_same(first, make(model(1), X, commit_input=False), "does not commit to its input")


def test_commitment_to_all_private_values_is_not_one_to_the_input(make: Maker, first: Made) -> None:
    other = make(model(1), X, commit_input=False, challenged=True)
    assert_not_same(first, other, "does not commit to its input")


def test_commitments_of_other_sizes_of_the_circuit(make: Maker, first: Made) -> None:
    larger = make(model(1), X, logrows=LOGROWS + 1)
    assert larger.point != first.point
    assert_not_same(first, larger, "cannot be compared: one circuit has 2^1")


def test_commitments_under_another_srs(make: Maker, first: Made, tmp_path: Path) -> None:
    other = make(model(1), X, srs_cache=tmp_path)
    assert other.point != first.point
    assert_not_same(first, other, "made with different SRS")


def test_spare_cell_of_an_odd_input_in_place_of_one_more_value(make: Maker, first: Made) -> None:
    # Nothing reads the spare cell, so it can hold the last value of a longer input: the same point.
    shorter = make(model(3, steps=11, features=1), X[:-1], spare=X[-1])
    assert shorter.point == first.point
    assert_not_same(first, shorter, "one has 1")


@pytest.mark.parametrize(
    "stated", [{}, {"seq_len": 3}, {"seq_len": 3, "input": {"features": 3}}, {"seq_len": True, "input": []}]
)
def test_package_that_does_not_say_how_long_its_input_is(
    make: Maker, first: Made, stated: dict[str, Any]
) -> None:
    assert_not_same(first, make(model(1), X, stated=stated), "does not say how long")


def test_other_proof_under_a_package_that_is_not_its_own(first: Made, second: Made) -> None:
    outcome = run_command(
        "verify", first.proof, "--same-input", second.proof, "--other-verifier", first.verifier
    )
    assert outcome.code == 1 and "INVALID: the other proof is invalid: " in outcome.out
    alone = run_command("verify", first.proof, "--other-verifier", first.verifier)
    assert alone.code == 2 and alone.err.count("\n") == 1


def test_opening_opens_every_proof_that_shares_it(first: Made, second: Made) -> None:
    for proof in (first, second):
        assert run_open(proof, X, first.opening)[0] == 0


def test_opening_of_an_odd_input(make: Maker) -> None:
    made = make(model(3, steps=11, features=1), X[:-1])
    assert run_open(made, X[:-1], made.opening)[0] == 0


def test_opening_of_an_input_given_in_units_of_the_data(make: Maker) -> None:
    made = make(model(0, input={"feature_offset": [10.0] * 4, "feature_scale": [2.0] * 4}), X)
    later = [10 + value / 2 for value in X[1:]]
    assert run_open(made, [7, *later], made.opening)[0] == 0
    assert run_open(made, [8, *later], made.opening)[0] == 1


def test_opening_with_a_wrong_input(first: Made) -> None:
    code, reason = run_open(first, Y, first.opening)
    assert code == 1 and reason.startswith("INVALID: the proof commits to another input")


def test_opening_with_an_input_outside_the_domain(first: Made) -> None:
    code, reason = run_open(first, [*X[:-1], 41], first.opening)
    assert code == 2 and "not an integer in -40..40" in reason


@pytest.mark.parametrize("place", [0, 7])
def test_opening_with_one_wrong_salt(first: Made, place: int, tmp_path: Path) -> None:
    document = json.loads(Path(first.opening).read_text())
    document["salts"][place] = "00" * 32
    (tmp_path / "o.json").write_text(json.dumps(document))
    assert run_open(first, X, str(tmp_path / "o.json"))[0] == 1


def test_opening_of_another_proof(make: Maker, first: Made) -> None:
    other = make(model(0), X, OTHER_SALTS)
    assert run_open(first, X, other.opening)[0] == 1
    assert run_open(other, X, other.opening)[0] == 0


def test_opening_an_invalid_proof(first: Made, second: Made) -> None:
    code, reason = run_open(first, X, first.opening, "--verifier", second.verifier)
    assert code == 1 and "it is about model" in reason


def test_opening_a_proof_without_commitment(make: Maker, first: Made) -> None:
    code, reason = run_open(make(model(1), X, commit_input=False), X, first.opening)
    assert code == 1 and "does not commit to its input" in reason


def test_opening_with_another_srs(first: Made, tmp_path: Path) -> None:
    srs = development_srs(LOGROWS, tmp_path)
    code, reason = run_open(first, X, first.opening, "--srs", str(srs.path))
    assert code == 2 and srs.sha256 in reason


def test_opening_without_the_srs_makes_none(
    first: Made, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MAMBAINT_CACHE", str(tmp_path / "empty"))
    code, reason = run_open(first, X, first.opening)
    assert code == 2 and "--srs" in reason and not os.path.exists(tmp_path / "empty")
    srs = cache / "srs" / f"development-{LOGROWS}" / "srs"
    assert run_open(first, X, first.opening, "--srs", str(srs))[0] == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("format", "mambaint-proof"),
        ("version", 2),
        ("salts", []),
        ("salts", ["00" * 32] * 9),
        ("salts", ["ff" * 32] * 8),
        ("salts", [0] * 8),
        ("commitment", "00"),
        ("commitment", 0),
        ("proofs", 0),
        ("proofs", True),
        ("extra", 1),
    ],
)
def test_damaged_opening(first: Made, name: str, value: Any, tmp_path: Path) -> None:
    document = {**json.loads(Path(first.opening).read_text()), name: value}
    (tmp_path / "o.json").write_text(json.dumps(document))
    code, reason = run_open(first, X, str(tmp_path / "o.json"))
    assert code == 2 and "opening" in reason


@pytest.mark.parametrize(
    ("steps", "domain"),
    [
        (3, {"low": 0, "high": "9", "features": 4}),
        (3, {"low": 9, "high": 0, "features": 4}),
        (3, {"low": 0, "high": 9, "features": -4}),
        (0, {"low": 0, "high": 9, "features": 4}),
        (3, {"low": 0, "high": 9, "features": 4, "feature_scale": "much"}),
        (3, None),
    ],
)
def test_package_with_a_statement_that_describes_no_input(
    make: Maker, first: Made, steps: int, domain: Any
) -> None:
    made = make(model(1), X, stated={"seq_len": steps, "input": domain})
    assert read_package(Path(made.verifier))[0].commits_to_input
    assert run_open(made, X, first.opening)[0] == 2
