"""``mambaint verify --rederive``: a verifier package nobody vouches for is compared with the model itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mamba_int.files import canonical_json
from mamba_int.graph import Graph
from tests.circuits.conftest import GRAPHS
from tests.cli.conftest import Cli
from zk.package import read_package
from zk.proof import decode_proof
from zk.rederive import OTHER_KEY, package_fault

ROOT = str(Path(__file__).resolve().parents[2])
Capture = pytest.CaptureFixture[str]


def sibling(graph: Graph) -> Graph:
    """The same graph with one weight changed."""
    nodes = list(graph.nodes)
    where = next(i for i, node in enumerate(nodes) if node.op == "linear")
    weight = nodes[where].constants["weight"].copy()
    weight[0, 0] = 1 if weight[0, 0] != 1 else 0
    nodes[where] = replace(nodes[where], constants={**nodes[where].constants, "weight": weight})
    return graph.with_nodes(nodes)


@pytest.fixture(scope="module")
def proved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sibling models and their honest proofs, one with a public input."""
    folder = tmp_path_factory.mktemp("proved")
    graph = GRAPHS["linear_ternary"]()
    graph.save(folder / "model.mint")
    sibling(graph).save(folder / "sibling.mint")
    steps = [[1] * 6] * 5
    (folder / "x.json").write_text(json.dumps({"input_data": [steps]}))
    for model, out, more in (
        ("model.mint", "honest", ()),
        ("sibling.mint", "sibling", ()),
        ("model.mint", "public", ("--public-input",)),
    ):
        arguments = ("--input", "x.json", "--model", model, "--out", f"{out}/proof.json", *more)
        subprocess.run(
            [sys.executable, "-m", "cli.main", "prove", *arguments],
            cwd=folder,
            env={**os.environ, "MAMBAINT_CACHE": str(folder / "cache"), "PYTHONPATH": ROOT},
            check=True,
            capture_output=True,
        )
    return folder


@pytest.fixture
def folder(proved: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(proved)
    monkeypatch.setenv("MAMBAINT_CACHE", str(proved / "cache"))
    return proved


def with_swapped_key(folder: Path, out: Path) -> None:
    """A forger's files: the honest package with the sibling's key, and the sibling's proof made to fit it."""
    honest, _ = read_package(folder / "honest/verifier.zip")
    other, _ = read_package(folder / "sibling/verifier.zip")
    forged = replace(honest, vk=other.vk).encode()
    out.mkdir()
    (out / "verifier.zip").write_bytes(forged)
    _, digest = read_package(out / "verifier.zip")
    proof = decode_proof((folder / "sibling/proof.json").read_bytes())
    disguised = replace(
        proof, model_id=honest.model_id, circuit_id=honest.circuit_id, verifier_package=digest
    )
    (out / "proof.json").write_bytes(disguised.encode())


@pytest.mark.parametrize("which", ["honest", "public"])
def test_honest_package_is_that_of_its_model_and_no_key_is_left(
    folder: Path, cli: Cli, which: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = sorted((folder / "cache").rglob("*"))
    verdict = cli.verify(f"{which}/proof.json", "--rederive", "model.mint")
    assert verdict["valid"] and verdict["rederived"]
    assert sorted((folder / "cache").rglob("*")) == before
    assert list(tmp_path.iterdir()) == []


def test_key_of_a_sibling_model_under_the_honest_name_is_found_out(
    folder: Path, cli: Cli, tmp_path: Path
) -> None:
    with_swapped_key(folder, tmp_path / "forged")
    proof = str(tmp_path / "forged/proof.json")
    # Without the model the package has to be trusted, and this one passes: the reason for --rederive.
    assert cli.verify(proof)["valid"]
    verdict = cli.verify(proof, "--rederive", "model.mint")
    assert verdict["reason"] == OTHER_KEY and verdict["public"] == {}


def test_other_model_is_refused(folder: Path, cli: Cli) -> None:
    verdict = cli.verify("honest/proof.json", "--rederive", "sibling.mint")
    assert not verdict["valid"] and "not " + Graph.load(folder / "sibling.mint").model_id in verdict["reason"]


def test_any_other_part_of_the_package_is_compared_too(folder: Path) -> None:
    package, _ = read_package(folder / "honest/verifier.zip")
    graph = Graph.load(folder / "model.mint")
    srs = folder / f"cache/srs/development-{package.logrows}/srs"
    settings = json.loads(package.settings) | {"num_rows": 3}
    changes: tuple[dict[str, Any], ...] = (
        {"verifying_srs": package.verifying_srs[:-1] + bytes([package.verifying_srs[-1] ^ 1])},
        {"settings": canonical_json(settings)},
        {"circuit_id": "0" * 64},
        {"proof_bytes": package.proof_bytes + 1},
    )
    for change in changes:
        forged = replace(package, **change)
        fault = package_fault(forged, graph, srs)
        assert next(iter(change)) in fault, change


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--rederive", "none.mint"), "none.mint"),
        (("--srs", "k.srs"), "--rederive"),
        (("--rederive", "model.mint", "--srs", "x.json"), "x.json"),
    ],
)
def test_fault_is_one_line(folder: Path, cli: Cli, arguments: tuple[str, ...], message: str) -> None:
    code, out, err = cli("verify", "honest/proof.json", *arguments)
    assert code == 2 and out == "" and err.count("\n") == 1 and message in err


def test_srs_of_another_machine_is_asked_for_and_not_made(
    folder: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    srs = next((folder / "cache/srs").glob("development-*/srs"))
    monkeypatch.setenv("MAMBAINT_CACHE", str(tmp_path / "elsewhere"))
    code, _, err = cli("verify", "honest/proof.json", "--rederive", "model.mint")
    assert code == 2 and err.count("\n") == 1 and "is not in the cache" in err and "--srs" in err
    assert not (tmp_path / "elsewhere").exists()
    assert cli.verify("honest/proof.json", "--rederive", "model.mint", "--srs", str(srs))["valid"]


def test_plain_verification_loads_nothing_that_lowers_or_trains(folder: Path) -> None:
    code = (
        "import sys\nfrom cli.main import main\n"
        "sys.argv = ['mambaint', 'verify', 'honest/proof.json']\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "assert not {'torch', 'onnx', 'circuits.lowering', 'zk.rederive'} & set(sys.modules)\n"
    )
    environment = {**os.environ, "PYTHONPATH": ROOT}
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, env=environment)
