"""``mambaint estimate`` as a user meets it, and the refusal to begin without enough memory."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from circuits.lowering import build_circuit
from cli.main import main
from mamba_int.graph import Graph
from tests.circuits.conftest import native_graph
from zk import calibration, estimate

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def folder(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MAMBAINT_CACHE", str(cache))
    monkeypatch.setattr(calibration, "CIRCUITS", ((8, 2, 0.9, 1.0), (9, 3, 0.9, 4)))
    monkeypatch.setattr(calibration, "REPEATS", 1)
    native_graph(n_layer=2, seq_len=3, chunk_size=3).save(tmp_path / "model.mint")
    (tmp_path / "x.json").write_text(json.dumps({"input_data": [[[0, 1]] * 3]}))
    return tmp_path


def run(monkeypatch: pytest.MonkeyPatch, capsys: Capture, *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["mambaint", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    out, err = capsys.readouterr()
    return int(stop.value.code or 0), out, err


def test_json_has_exact_rows_and_their_parts(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    code, out, err = run(monkeypatch, capsys, "estimate", "model.mint", "--public-input", "--json")
    assert (code, err) == (0, "")
    result = json.loads(out)
    circuit = build_circuit(Graph.load(folder / "model.mint"), True).circuit
    assert (result["rows"], result["logrows"]) == (circuit.rows, circuit.logrows)
    for name in ("rows_by_layer", "rows_by_operation"):
        assert int(sum(result[name].values())) == circuit.rows
    assert int(sum(part["rows"] for part in result["parts"])) == circuit.rows
    assert result["proof_bytes"] == 2560 and result["enough_memory"]
    assert not (cache / "keys").exists()


def test_table_and_chart_show_every_layer(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    code, out, err = run(monkeypatch, capsys, "estimate", "model.mint", "--chart", "rows.png")
    assert (code, err) == (0, "")
    assert "layer0" in out and "layer1" in out and "ssd" in out and "█" in out and "rows by" in out.lower()
    assert (folder / "rows.png").read_bytes().startswith(b"\x89PNG")


def test_calibration_is_made_once_and_again_if_damaged_or_asked_for(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    path = calibration.calibration_path(cache)
    run(monkeypatch, capsys, "estimate", "model.mint")
    first = path.read_bytes()
    run(monkeypatch, capsys, "estimate", "model.mint")
    assert path.read_bytes() == first
    path.write_bytes(first[:-20])
    assert run(monkeypatch, capsys, "estimate", "model.mint")[0] == 0
    assert calibration.stored_calibration(cache) is not None
    second = path.read_bytes()
    run(monkeypatch, capsys, "estimate", "model.mint", "--recalibrate")
    assert path.read_bytes() != second


def test_missing_model_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    code, out, err = run(monkeypatch, capsys, "estimate", "none.mint")
    assert code == 2 and out == "" and err.count("\n") == 1 and "none.mint" in err


def test_nothing_is_begun_that_would_run_out_of_memory(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    run(monkeypatch, capsys, "estimate", "model.mint")
    before = sorted(cache.rglob("*"))
    monkeypatch.setattr(estimate, "available_memory", lambda: 1_000_000)
    code, _, err = run(monkeypatch, capsys, "estimate", "model.mint", "--json")
    assert code == 0 and err.startswith("warning: ") and "smaller model" in err
    for command in (("setup",), ("prove", "--input", "x.json")):
        code, out, err = run(monkeypatch, capsys, *command, "--model", "model.mint")
        assert code == 2 and out == "" and err.count("\n") == 1
        assert "1 MB of memory are free" in err and "smaller model" in err
    assert sorted(cache.rglob("*")) == before
    assert sorted(path.name for path in folder.iterdir()) == ["model.mint", "x.json"]


def test_prove_does_not_measure_the_machine(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def measured(*_: object) -> None:
        raise AssertionError("a measurement nobody asked for")

    monkeypatch.setenv("MAMBAINT_CACHE", str(tmp_path / "fresh"))
    monkeypatch.setattr(calibration, "calibrate", measured)
    code, _, err = run(monkeypatch, capsys, "prove", "--input", "none.json", "--model", "model.mint")
    assert code == 2 and "none.json" in err
    assert not calibration.calibration_path().exists()
