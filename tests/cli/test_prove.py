"""``mambaint setup``, ``prove`` and ``verify`` as a user meets them, on a tiny model."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from circuits.circuit import Circuit
from mamba_int.errors import MambaintError
from mamba_int.graph import Graph
from mamba_int.interpreter import evaluate
from quantize import IntegerModel
from tests.circuits_runtime.models import NARROW, random_graph
from tests.cli.conftest import Cli
from tests.zk.test_chain import TEXT
from zk.provable import prepare

Capture = pytest.CaptureFixture[str]
CLASSES = ["a", "b", "c", "d", "e"]
STEPS = [[3, 4, 5]] * 4
FORMS = NARROW | {"input_weights": "ternary", "seq_len": 4, "pool_bits": 6}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("cache")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def folder(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MAMBAINT_CACHE", str(cache))
    graph, _ = random_graph(**FORMS)
    replace(graph, card={"task": "classification", "classes": CLASSES}).save(tmp_path / "model.mint")
    (tmp_path / "x.json").write_text(json.dumps({"input_data": [STEPS]}))
    return tmp_path


def test_proof_states_the_interpreters_logits_and_hides_the_input(folder: Path, cli: Cli) -> None:
    proved = cli.json("prove", "--input", "x.json", "--model", "model.mint")
    graph = Graph.load(folder / "model.mint")
    expected = evaluate(graph, np.array([STEPS]))[0].tolist()
    assert proved["outputs"] == expected and proved["model_id"] == graph.model_id
    assert proved["predicted"] == CLASSES[int(np.argmax(expected))]
    assert set(json.loads((folder / "proof.json").read_text())["public"]) == {"logits"}
    verified = cli.json("verify", "proof.json")
    assert verified["valid"] and verified["outputs"] == expected
    assert verified["model_id"] == graph.model_id and verified["srs"] == "development"


def test_python_proves_what_the_command_proves(folder: Path, cli: Cli) -> None:
    model = IntegerModel.load("model.mint")
    found = model.prove(STEPS, "api")
    verdict = found.verify()
    assert verdict.valid and verdict.model_id == model.model_id
    assert (found.logits == model.run([STEPS])[0]).all()
    assert cli.verify("api/proof.json")["valid"]
    with pytest.raises(MambaintError, match="not an integer in"):
        model.prove([[3, 4, 99]] * 4, "other")
    assert not (folder / "other").exists()


def test_public_input_is_part_of_the_statement(folder: Path, cli: Cli) -> None:
    cli.json("prove", "--input", "x.json", "--model", "model.mint", "--public-input", "--out", "p/proof.json")
    verified = cli.json("verify", "p/proof.json")
    assert verified["valid"]
    assert verified["public"]["input"] == [value for step in STEPS for value in step]
    document = json.loads((folder / "p/proof.json").read_text())
    document["public"]["input"][0] += 1
    forged = json.dumps(document, sort_keys=True, separators=(",", ":")) + "\n"
    (folder / "p/forged.json").write_text(forged)
    assert not cli.json("verify", "p/forged.json")["valid"]


@pytest.mark.parametrize(("lookups", "reads_table"), [("none", False), ("table", True)])
def test_the_package_says_whether_its_circuit_has_lookups(
    lookups: str, reads_table: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MAMBAINT_CACHE", str(tmp_path))

    # Only the circuit and the statement: keys of so many rows take half a minute.
    class Made:
        def __init__(self, circuit: Circuit, *_: Any) -> None:
            assert circuit.lookups is reads_table

        def package(self, statement: dict[str, Any]) -> Made:
            assert statement["lookups"] == lookups
            return self

        def encode(self) -> bytes:
            return b""

    monkeypatch.setattr("zk.provable.make_keys", Made)
    monkeypatch.setattr("zk.provable.chosen_srs", lambda path, sha256, logrows: None)
    graph, _ = random_graph(**FORMS)
    ready = prepare(graph, False, False, None, lookups, None, None, lambda _: None)
    assert ready.lowered.circuit.lookups is reads_table


def test_keys_are_made_once_and_setup_writes_the_package_prove_writes(folder: Path, cli: Cli) -> None:
    made = cli.json("setup", "--model", "model.mint", "--out", "s/verifier.zip")
    proved = cli.json("prove", "--input", "x.json", "--model", "model.mint")
    assert proved["keygen_seconds"] == 0 and proved["circuit_id"] == made["circuit_id"]
    assert (folder / "s/verifier.zip").read_bytes() == (folder / "verifier.zip").read_bytes()
    assert cli.json("verify", "proof.json", "--verifier", "s/verifier.zip")["valid"]


def test_one_changed_weight_is_another_model_whose_proofs_do_not_pass_for_the_first(
    folder: Path, cli: Cli
) -> None:
    cli.json("prove", "--input", "x.json", "--model", "model.mint", "--out", "honest/proof.json")
    graph = Graph.load(folder / "model.mint")
    nodes = list(graph.nodes)
    where = next(i for i, node in enumerate(nodes) if node.name == "layer0.in_proj")
    weight = nodes[where].constants["weight"].copy()
    weight[0, 0] = 0 if weight[0, 0] else 1
    nodes[where] = replace(nodes[where], constants={**nodes[where].constants, "weight": weight})
    other = graph.with_nodes(nodes)
    assert other.model_id != graph.model_id
    other.save(folder / "other.mint")
    cli.json("prove", "--input", "x.json", "--model", "other.mint", "--out", "other/proof.json")
    verdict = cli.json("verify", "other/proof.json", "--verifier", "honest/verifier.zip")
    assert not verdict["valid"] and verdict["reason"]
    verdict = cli.json("verify", "other/proof.json", "--model-id", graph.model_id)
    assert not verdict["valid"] and verdict["reason"]


COMMIT = ("prove", "--input", "x.json", "--commit-input", "--model")


def test_two_proofs_of_the_same_input_share_nothing_unless_asked_to(folder: Path, cli: Cli) -> None:
    first = cli.json(*COMMIT, "model.mint", "--out", "a/proof.json")
    second = cli.json(*COMMIT, "model.mint", "--out", "b/proof.json")
    assert first["commitments"] != second["commitments"]
    salts = [json.loads((folder / f"{name}/proof.opening.json").read_text())["salts"] for name in "ab"]
    assert not set(salts[0]) & set(salts[1]) and len(set(salts[0])) == 8
    verified = cli.json("verify", "a/proof.json")
    assert verified["valid"] and verified["commitments"] == first["commitments"]
    assert set(verified["public"]) == {"logits"}
    verdict = cli.json("verify", "a/proof.json", "--same-input", "b/proof.json")
    assert not verdict["valid"] and verdict["other"]["valid"]


def test_second_model_proved_over_the_same_hidden_input(folder: Path, cli: Cli) -> None:
    random_graph(1, **FORMS)[0].save(folder / "other.mint")
    first = cli.json(*COMMIT, "model.mint", "--logrows", "12", "--out", "a/proof.json", "--opening", "secret")
    reused = ("--logrows", "12", "--out", "b/proof.json", "--reuse-opening", "secret")
    second = cli.json(*COMMIT, "other.mint", *reused)
    assert first["model_id"] != second["model_id"] and first["commitments"] == second["commitments"]
    assert cli.json("verify", "a/proof.json", "--same-input", "b/proof.json")["valid"]
    assert cli.json("open", "b/proof.json", "--input", "x.json", "--opening", "secret")["valid"]
    assert json.loads((folder / "secret").read_text())["proofs"] == 2
    assert not list(folder.glob("?/*.opening.json"))
    assert (folder / "secret").stat().st_mode & 0o777 == 0o600


def test_opening_is_for_its_owner_alone_and_is_never_overwritten(folder: Path, cli: Cli) -> None:
    proved = cli.json(*COMMIT, "model.mint")
    opening = folder / proved["opening"]
    assert opening.stat().st_mode & 0o777 == 0o600
    before = opening.read_bytes()
    code, _, err = cli(*COMMIT, "model.mint")
    assert code == 2 and err.count("\n") == 1 and "exists already" in err
    assert opening.read_bytes() == before


def test_opening_is_not_reused_where_it_would_reveal_something_or_show_nothing(
    folder: Path, cli: Cli
) -> None:
    cli.json(*COMMIT, "model.mint", "--logrows", "12", "--opening", "secret")
    (folder / "y.json").write_text(json.dumps({"input_data": [[[3, 4, 6], *STEPS[1:]]]}))
    opening = json.loads((folder / "secret").read_text())
    for changes, source, message in (
        ({}, "y.json", "the input is not the one"),
        ({"proofs": 7}, "x.json", "7 proofs were made"),
        ({"logrows": 13}, "x.json", "--logrows"),
        ({"srs_sha256": "0" * 64}, "x.json", "another SRS"),
        ({"size": 22}, "x.json", "another size"),
    ):
        (folder / "secret").write_text(json.dumps(opening | changes))
        before = (folder / "secret").read_bytes()
        arguments = ("--input", source, "--commit-input", "--model", "model.mint", "--logrows", "12")
        code, out, err = cli("prove", *arguments, "--out", "n/proof.json", "--reuse-opening", "secret")
        assert code == 2 and out == "" and err.count("\n") == 1 and message in err
        assert not (folder / "n").exists() and (folder / "secret").read_bytes() == before


def test_setup_writes_the_package_of_a_committed_circuit_of_the_chosen_size(folder: Path, cli: Cli) -> None:
    options = ("--model", "model.mint", "--commit-input", "--logrows", "12")
    made = cli.json("setup", *options, "--out", "s/verifier.zip")
    proved = cli.json("prove", "--input", "x.json", *options)
    assert made["logrows"] == proved["logrows"] == 12 and made["circuit_id"] == proved["circuit_id"]
    assert (folder / "s/verifier.zip").read_bytes() == (folder / "verifier.zip").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--input", "none.json", "--model", "model.mint"), "none.json"),
        (("--input", "x.json"), "mambaint quantize"),
        (("--input", "x.json", "--model", "x.json"), "not a mambaint graph"),
        (("--input", "high.json", "--model", "model.mint"), "high.json"),
        (("--input", "x.json", "--model", "model.mint", "--srs", "k.srs"), "--srs-sha256"),
        (
            ("--input", "x.json", "--model", "model.mint", "--srs", "k.srs", "--srs-sha256", "0" * 64),
            "k.srs",
        ),
        (
            ("--input", "x.json", "--model", "model.mint", "--commit-input", "--public-input"),
            "give one of the two",
        ),
        (("--input", "x.json", "--model", "model.mint", "--opening", "o.json"), "--commit-input"),
        (("--input", "x.json", "--model", "model.mint", "--reuse-opening", "o.json"), "--commit-input"),
        (
            ("--input", "x.json", "--model", "model.mint", "--commit-input", "--reuse-opening", "o.json"),
            "o.json",
        ),
        (("--input", "x.json", "--model", "model.mint", "--logrows", "8"), "use more rows"),
    ],
)
def test_fault_is_one_line_and_leaves_nothing(
    folder: Path, cli: Cli, arguments: tuple[str, ...], message: str
) -> None:
    (folder / "high.json").write_text(json.dumps({"input_data": [[[99, 4, 5], *STEPS[1:]]]}))
    before = sorted(os.listdir(folder))
    code, out, err = cli("prove", *arguments)
    assert code == 2 and out == "" and err.count("\n") == 1 and message in err
    assert sorted(os.listdir(folder)) == before


def test_unwritable_place_for_the_proof_is_one_line(folder: Path, cli: Cli) -> None:
    (folder / "file").write_text("")
    code, _, err = cli("prove", "--input", "x.json", "--model", "model.mint", "--out", "file/proof.json")
    assert code == 2 and err.count("\n") == 1 and "cannot write" in err
    code, _, err = cli(*COMMIT, "model.mint", "--out", "file/proof.json", "--opening", "secret")
    assert code == 2 and err.count("\n") == 1 and "cannot write" in err
    assert not (folder / "secret").exists()


def test_help_loads_no_heavy_library() -> None:
    import subprocess

    code = "import sys; from cli.main import mambaint\n"
    code += "mambaint(['--help'], standalone_mode=False)\n"
    code += "assert not {'torch', 'ezkl', 'onnx', 'numpy', 'rich'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_core_needs_neither_prover_nor_terminal() -> None:
    import subprocess

    code = "import sys, mamba_int.model, mamba_int.training, triton_kernels.ssd\n"
    code += "assert not {'ezkl', 'rich', 'onnx', 'onnxruntime'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_model_is_cut_by_layers_and_published_so(folder: Path, cli: Cli) -> None:
    graph, _ = random_graph(0, **(TEXT | {"n_layer": 2}))
    replace(graph, card={"task": "language_model"}).save(folder / "text.mint")
    tokens = [3, 1, 4, 1, 5, 9]
    (folder / "t.json").write_text(json.dumps({"input_data": [tokens]}))
    cuts = ("--model", "text.mint", "--segment-steps", "4", "--stages", "2")
    result = cli.json("prove", "--input", "t.json", *cuts)
    logits = evaluate(graph, np.array([tokens]))[0].ravel().tolist()
    assert (result["segments"], result["stages"], result["proved_now"]) == (2, 2, 4)
    verdict = cli.json("verify", "proof.json", "--rederive", "text.mint")
    assert verdict["valid"] and verdict["outputs"] == logits
    published = cli.json("setup", *cuts, "--out", "published.zip")
    assert (folder / "published.zip").read_bytes() == (folder / "verifier.zip").read_bytes()
    assert [circuit["keygen_seconds"] for circuit in published["circuits"]] == [0, 0]
    code, out, _ = cli("setup", *cuts, "--out", "published.zip")
    assert code == 0 and out.count("rows of 2^12") == 2
    code, _, fault = cli("prove", "--input", "t.json", *cuts[:-1], "3")
    assert code == 2 and "at most 2" in fault
    code, _, fault = cli("prove", "--input", "t.json", "--model", "text.mint", "--stages", "2")
    assert code == 2 and "--segment-steps" in fault


def test_long_sequence_is_proved_in_segments_and_verified_as_one(
    folder: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph, _ = random_graph(0, **TEXT)
    replace(graph, card={"task": "language_model"}).save(folder / "text.mint")
    tokens = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]
    (folder / "t.json").write_text(json.dumps({"input_data": [tokens]}))
    arguments = ("prove", "--input", "t.json", "--model", "text.mint", "--segment-steps")
    result = cli.json(*arguments, "4")
    logits = evaluate(graph, np.array([tokens]))[0].ravel().tolist()
    assert (result["segments"], result["steps"], result["outputs"]) == (3, 10, logits)
    assert not result["states_are_public"] and not (folder / "proof.segments").exists()
    verdict = cli.json("verify", "proof.json", "--workers", "2")
    assert verdict["valid"] and (verdict["steps"], verdict["segments"]) == (10, 3)
    assert verdict["outputs"] == logits
    code, out, _ = cli("verify", "proof.json")
    assert code == 0 and "10 steps in 3 linked segments" in out
    # The publisher's package is the prover's, to the byte, and that of no other model.
    cli.json("setup", "--model", "text.mint", "--segment-steps", "4", "--out", "published.zip")
    assert (folder / "published.zip").read_bytes() == (folder / "verifier.zip").read_bytes()
    assert cli.json("verify", "proof.json", "--rederive", "text.mint")["rederived"]
    code, out, _ = cli("verify", "proof.json", "--rederive", "model.mint")
    assert code == 1 and "is for model" in out
    code, out, _ = cli("verify", "proof.json", "--only", "1..2")
    assert code == 1 and out.startswith("PARTIAL: segments 1 to 2 of 3")
    for only in ("2", "2..1", "a..b"):
        code, _, fault = cli("verify", "proof.json", "--only", only)
        assert code == 2 and "I..J" in fault
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(map(str, tokens))))
    streamed = cli.json(
        "prove", "--stream", "--model", "text.mint", "--segment-steps", "4", "--out", "s/proof.json"
    )
    assert (streamed["steps"], streamed["outputs"]) == (10, logits)
    assert cli.json("verify", "s/proof.json")["valid"]
    picked = cli.json(*arguments, "auto", "--ram", "0.06", "--out", "p/proof.json")
    assert picked["outputs"] == logits and picked["segment_steps"] % 4 == 0
    text = [3, 1]
    while len(text) < 6:
        text.append(int(evaluate(graph, np.array([text]))[0, -1].argmax()))
    (folder / "g.json").write_text(json.dumps({"input_data": [text]}))
    greedy = ("prove", "--input", "g.json", "--model", "text.mint", "--segment-steps", "4", "--greedy-after")
    assert cli.json(*greedy, "2", "--out", "g/proof.json")["generated"] == text[2:]
    verdict = cli.json("verify", "g/proof.json")
    assert verdict["valid"] and verdict["public"] == {"tokens": text[2:]} and verdict["prompt_steps"] == 2
    code, _, fault = cli(*greedy, "6", "--out", "h/proof.json")
    assert code == 2 and "prompt" in fault and not (folder / "h/proof.json").exists()
    forged = (folder / "proof.json").read_text().replace('"steps":10', '"steps":9')
    (folder / "proof.json").write_text(forged)
    code, out, _ = cli("verify", "proof.json")
    assert code == 1 and "INVALID: segment 2" in out
    for options, words in (
        (["6"], "multiple of 4"),
        (["4", "--commit-input"], "without --commit-input"),
    ):
        code, out, fault = cli(*arguments, *options, "--out", "q.json")
        assert (code, out, fault.count("\n")) == (2, "", 1) and words in fault
    for option, value in (("--workers", "2"), ("--ray", "local")):
        code, _, fault = cli("prove", "--input", "x.json", "--model", "model.mint", option, value)
        assert code == 2 and "--segment-steps" in fault
    code, _, fault = cli("verify", "proof.json", "--same-input", "q.json")
    assert code == 2 and "in one piece" in fault
