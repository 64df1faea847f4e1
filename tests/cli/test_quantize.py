"""``mambaint quantize`` as a user meets it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from circuits.runtime import OnnxRunner
from cli.main import main
from mamba_int.datasets import DataSource
from mamba_int.graph import Graph, IntArray
from mamba_int.interpreter import evaluate
from mamba_int.operations.base import Trace
from tests.quantize.checkpoints import write_checkpoint

Capture = pytest.CaptureFixture[str]
DIGITS = DataSource("digits")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a run in it, as 'mambaint train' leaves one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "digits").mkdir(parents=True)
    write_checkpoint(tmp_path / "runs/digits/checkpoint.safetensors", DIGITS, results={"test_accuracy": 0.5})
    latest = {"checkpoint": "runs/digits/checkpoint.safetensors"}
    (tmp_path / "runs" / "latest.json").write_text(json.dumps(latest))
    return tmp_path


def run(monkeypatch: pytest.MonkeyPatch, capsys: Capture, *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["mambaint", "quantize", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    out, err = capsys.readouterr()
    return int(stop.value.code or 0), out, err


def test_newest_run_becomes_a_model_that_every_file_agrees_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    twin = folder / "runs/digits/float-twin"
    twin.mkdir()
    write_checkpoint(
        twin / "checkpoint.safetensors", DIGITS, results={"test_accuracy": 0.75}, arithmetic="float"
    )
    code, out, err = run(monkeypatch, capsys, "--json")
    assert (code, err) == (0, "")
    result = json.loads(out)
    assert set(result) == {
        "model_id",
        "max_bits",
        "equal_numpy_torch_onnx",
        "values_compared",
        "test_accuracy",
        "float_twin_accuracy",
        "model",
        "onnx",
        "tokenizer",
        "report",
        "seconds",
    }
    assert result["equal_numpy_torch_onnx"] is True and result["float_twin_accuracy"] == 0.75
    quantized = folder / "runs/digits/quantized"
    assert {path.name for path in quantized.iterdir()} == {
        "model.mint",
        "model.onnx",
        "report.json",
        "report.html",
    }
    graph = Graph.load(folder / result["model"])
    assert graph.model_id == result["model_id"]
    report = json.loads((quantized / "report.json").read_text())
    assert report["model_id"] == result["model_id"] in (quantized / "report.html").read_text()
    assert report["checkpoint_test_accuracy"] == 0.5
    assert report["equality"]["values_compared"] == result["values_compared"] > 360 * 2 * 1000
    inputs = np.random.default_rng(0).integers(0, 17, (5, 8, 8))
    onnx = OnnxRunner((folder / result["onnx"]).read_bytes())
    assert (onnx(inputs) == evaluate(graph, inputs)).all()
    assert json.loads((folder / "runs/latest.json").read_text()) == {
        "checkpoint": "runs/digits/checkpoint.safetensors",
        "model": result["model"],
    }


def test_own_folder_leaves_the_newest_run_alone_and_repeats(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    before = (folder / "runs/latest.json").read_bytes()
    for out in ("a", "b"):
        code, shown, _ = run(monkeypatch, capsys, "runs/digits/checkpoint.safetensors", "--out", out)
        assert code == 0 and "0 differ" in shown and f"{out}/model.mint" in shown
    assert (folder / "runs/latest.json").read_bytes() == before
    assert len({Graph.load(folder / out / "model.mint").model_id for out in ("a", "b")}) == 1
    for name in ("model.onnx", "report.json", "report.html"):
        assert (folder / "a" / name).read_bytes() == (folder / "b" / name).read_bytes()


@pytest.mark.parametrize("traced", [True, False])
def test_one_wrong_integer_of_onnx_runtime_writes_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture, traced: bool
) -> None:
    honest = OnnxRunner.__call__

    def lying(self: OnnxRunner, inputs: IntArray, trace: Trace | None = None) -> IntArray:
        tensors: dict[str, IntArray] | None = None if trace is None else {}
        logits = honest(self, inputs, tensors)
        if not traced and tensors is None:
            logits[-1, -1] -= 1
        if tensors is not None and trace is not None:
            tensors["layer0.ssd.A"][-1, 0, 0, 0, 0] += traced
            for name, tensor in tensors.items():
                trace[name] = tensor
        return logits

    monkeypatch.setattr(OnnxRunner, "__call__", lying)
    before = (folder / "runs/latest.json").read_bytes()
    code, out, err = run(monkeypatch, capsys)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert ("ONNX Runtime" if traced else "model.onnx") in err and "nothing was written" in err
    assert ("layer0.ssd.A" if traced else "logits") in err
    assert not (folder / "runs/digits/quantized").exists()
    assert (folder / "runs/latest.json").read_bytes() == before


def test_data_that_changed_since_the_training_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    file = folder / "own.csv"
    file.write_text("".join(f"{i % 7},{i % 5},{'ab'[i % 2]}\n" for i in range(40)))
    write_checkpoint(folder / "own", DataSource("csv", str(file)))
    file.write_text("".join(f"{i % 6},{i % 5},{'ab'[i % 2]}\n" for i in range(40)))
    code, _, err = run(monkeypatch, capsys, "own")
    assert code == 2 and "has changed since the training" in err
    file.unlink()
    code, _, err = run(monkeypatch, capsys, "own")
    assert code == 2 and "cannot read" in err and not (folder / "quantized").exists()


def test_language_model_reports_bits_per_byte(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    (folder / "t.txt").write_bytes(b"the cat sat on the mat. " * 40)
    write_checkpoint(folder / "lm", DataSource("text", str(folder / "t.txt")))
    code, out, _ = run(monkeypatch, capsys, "lm", "--out", "q", "--json")
    result = json.loads(out)
    assert code == 0 and 0 < result["test_bits_per_byte"] < 12
    assert result["float_twin_bits_per_byte"] is None and result["equal_numpy_torch_onnx"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["missing"], "cannot read missing"),
        (["runs/latest.json"], "not a safetensors file"),
        (["twin"], "float twin"),
        (["young"], "not frozen"),
        (["--out", "runs/latest.json/x"], "cannot write"),
        (["--out", "/proc/nowhere"], "cannot write"),
    ],
)
def test_fault_is_one_line_with_exit_code_two(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture, arguments: list[str], words: str
) -> None:
    if "twin" in arguments:
        write_checkpoint(folder / "twin", DIGITS, arithmetic="float")
    if "young" in arguments:
        write_checkpoint(folder / "young", DIGITS, freeze=False)
    code, out, err = run(monkeypatch, capsys, *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert words in err and err.startswith("mambaint: ")


@pytest.mark.parametrize("content", [None, "{", "[]", '{"checkpoint": 3}', "{}"])
def test_without_a_run_the_remedy_is_to_train(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture, content: str | None
) -> None:
    latest = folder / "runs/latest.json"
    latest.unlink()
    if content is not None:
        latest.write_text(content)
    code, _, err = run(monkeypatch, capsys)
    assert (code, err.count("\n")) == (2, 1)
    assert "latest.json" in err or "mambaint train" in err


def test_help_loads_nothing_heavy() -> None:
    program = (
        "import sys, cli.quantize, cli.inspect, cli.run; from click.testing import CliRunner\n"
        "for module in (cli.quantize, cli.inspect, cli.run):\n"
        "    assert CliRunner().invoke(module.command, ['--help']).exit_code == 0\n"
        "heavy = {'torch', 'numpy', 'matplotlib', 'onnx', 'onnxruntime'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", program], check=True, cwd=root, env={**os.environ})
