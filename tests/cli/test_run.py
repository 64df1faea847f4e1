"""``mambaint run``: the same integers from every backend, and one line for every fault."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from cli.main import main
from mamba_int.interpreter import evaluate
from tests.circuits_runtime.models import random_graph

Capture = pytest.CaptureFixture[str]
CLASSES = ["a", "b", "c", "d", "e"]
STEPS = [[3, 4, 5]] * 8


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    graph, _ = random_graph()
    replace(graph, card={"task": "classification", "classes": CLASSES}).save(tmp_path / "model.mint")
    (tmp_path / "x.json").write_text(json.dumps({"input_data": [STEPS]}))
    return tmp_path


def run(monkeypatch: pytest.MonkeyPatch, capsys: Capture, *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["mambaint", "run", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    out, err = capsys.readouterr()
    return int(stop.value.code or 0), out, err


@pytest.mark.parametrize("backend", ["numpy", "torch", "onnx"])
def test_every_backend_gives_the_integers_of_the_specification(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture, backend: str
) -> None:
    import numpy as np

    graph, _ = random_graph()
    expected = evaluate(graph, np.array([STEPS]))[0]
    code, out, err = run(
        monkeypatch, capsys, "--input", "x.json", "--model", "model.mint", "--backend", backend, "--json"
    )
    assert (code, err) == (0, "")
    result = json.loads(out)
    assert set(result) == {"model_id", "outputs", "logits", "predicted", "backend", "seconds"}
    assert result["outputs"] == expected.tolist()
    frac = graph.by_name["logits"].frac
    assert [value * 2**frac for value in result["logits"]] == result["outputs"]
    assert result["predicted"] == CLASSES[int(expected.argmax())]


def test_text_output_names_the_class(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    code, out, _ = run(monkeypatch, capsys, "--input", "x.json", "--model", "model.mint")
    assert code == 0 and out.startswith("predicted  ") and "backend    numpy" in out


def test_tokens_have_logits_per_step_and_no_class(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    graph, _ = random_graph(task="language_model", vocab_size=11, seq_len=5)
    graph.save(folder / "lm.mint")
    (folder / "t.json").write_text('{"input_data": [[1, 2, 3, 4, 10]]}')
    code, out, _ = run(monkeypatch, capsys, "--input", "t.json", "--model", "lm.mint", "--json")
    result = json.loads(out)
    assert code == 0 and result["predicted"] is None
    assert (len(result["outputs"]), len(result["outputs"][0])) == (5, 11)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--input", "none.json", "--model", "model.mint"], "cannot read none.json"),
        (["--input", "model.mint", "--model", "model.mint"], "not valid JSON"),
        (["--input", "x.json", "--model", "x.json"], "not a mambaint graph"),
        (["--input", "x.json"], "mambaint quantize"),
        (["--input", "x.json", "--model", "model.mint", "--backend", "tpu"], "tpu"),
        (["--model", "model.mint"], "--input"),
    ],
)
def test_fault_has_exit_code_two_and_no_traceback(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture, arguments: list[str], words: str
) -> None:
    code, out, err = run(monkeypatch, capsys, *arguments)
    assert (code, out) == (2, "") and words in err and "Traceback" not in err


def test_numpy_backend_needs_no_torch(folder: Path) -> None:
    program = (
        "import sys; from click.testing import CliRunner; import cli.run\n"
        "done = CliRunner().invoke(cli.run.command, ['--input', 'x.json', '--model', 'model.mint'])\n"
        "assert done.exit_code == 0, done.output\n"
        "heavy = {'torch', 'onnx', 'onnxruntime', 'matplotlib'} & set(sys.modules); assert not heavy, heavy"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)
