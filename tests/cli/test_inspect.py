"""``mambaint inspect``: the table and the totals of a model."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from cli.main import main
from tests.circuits_runtime.models import random_graph

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    random_graph()[0].save(tmp_path / "model.mint")
    return tmp_path


def run(monkeypatch: pytest.MonkeyPatch, capsys: Capture, *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["mambaint", "inspect", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    out, err = capsys.readouterr()
    return int(stop.value.code or 0), out, err


def test_every_tensor_has_a_row_with_its_interval(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    graph, _ = random_graph()
    code, out, _ = run(monkeypatch, capsys, "model.mint")
    assert code == 0
    rows = {line.split()[0]: line for line in out.splitlines() if line}
    for name, tensor in graph.types.items():
        assert f"{tensor.low}..{tensor.high}" in rows[name]
    zeros = (graph.by_name["layer0.in_proj"].constants["weight"] == 0).mean()
    assert f"{100 * zeros:.1f}% ternary" in rows["layer0.in_proj"]
    assert graph.model_id in out


def test_json_holds_the_same_numbers(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    graph, _ = random_graph()
    code, out, err = run(monkeypatch, capsys, "model.mint", "--json")
    result = json.loads(out)
    assert (code, err) == (0, "") and result["model_id"] == graph.model_id
    assert [t["name"] for t in result["tensors"]] == [node.name for node in graph.nodes]
    assert result["max_bits"] == graph.max_bits
    assert set(result["operations_per_token"]) == {"shifts", "adds", "multiplies", "comparisons", "divisions"}


def test_default_is_the_model_quantized_last(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    code, _, err = run(monkeypatch, capsys)
    assert code == 2 and "mambaint quantize" in err
    (folder / "runs").mkdir()
    (folder / "runs/latest.json").write_text('{"checkpoint": "x"}')
    code, _, err = run(monkeypatch, capsys)
    assert code == 2 and "no model yet" in err and "mambaint quantize" in err
    (folder / "runs/latest.json").write_text('{"checkpoint": "x", "model": "model.mint"}')
    assert run(monkeypatch, capsys)[0] == 0
    assert run(monkeypatch, capsys, str(folder))[0] == 0


@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "flipped"])
def test_damaged_model_is_one_line_with_exit_code_two(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture, damage: str
) -> None:
    path = folder / "model.mint"
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        flipped = content[:-1] + bytes([content[-1] ^ 1])
        path.write_bytes({"empty": b"", "truncated": content[:-9], "flipped": flipped}[damage])
    code, out, err = run(monkeypatch, capsys, "model.mint")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "mambaint quantize" in err
