"""``mambaint generate``: from prompts to text, and one line for every fault."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from cli.main import main
from mamba_int.datasets import DataSource
from mamba_int.graph import Graph
from mamba_int.interpreter import evaluate
from quantize.native import quantize_native
from tests.circuits_runtime.models import random_graph
from tests.quantize.checkpoints import write_checkpoint

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    text_model().save(tmp_path / "model.mint")
    return tmp_path


def text_model() -> Graph:
    return random_graph(1, task="language_model", vocab_size=256, seq_len=8, chunk_size=4)[0]


def run(monkeypatch: pytest.MonkeyPatch, capsys: Capture, *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["mambaint", "generate", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    out, err = capsys.readouterr()
    return int(stop.value.code or 0), out, err


def test_greedy_continues_with_the_argmax_of_the_whole_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    (folder / "p.txt").write_bytes(b"\xffno text\n")
    arguments = (
        "model.mint",
        "--prompt",
        "Call me",
        "--prompt-file",
        "p.txt",
        "--greedy",
        "--max-tokens",
        "6",
    )
    code, out, err = run(monkeypatch, capsys, *arguments, "--device", "cpu", "--json")
    assert (code, err) == (0, "")
    report = json.loads(out)
    graph = text_model()
    for prompt, result in zip((b"Call me", b"\xffno text\n"), report["results"], strict=True):
        tokens = [*prompt, *result["tokens"]]
        logits = evaluate(graph, np.array([tokens[:-1]]))[0]
        assert logits.argmax(-1)[len(prompt) - 1 :].tolist() == result["tokens"]
        assert (len(result["tokens"]), result["finish"], result["prompt_tokens"]) == (
            6,
            "length",
            len(prompt),
        )
        assert result["text"] == bytes(result["tokens"]).decode(errors="replace")
    assert report["model_id"] == graph.model_id and report["device"] == "cpu"
    assert report["state_bytes"] == 2 * report["state_bytes_per_sequence"] > 0
    assert report["tokens_per_second"] > 0


def test_the_same_seed_streams_the_text_that_json_reports(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    arguments = ("model.mint", "--prompt", "a", "--prompt", "b", "--max-tokens", "20", "--seed", "7")
    _, out, _ = run(monkeypatch, capsys, *arguments, "--json")
    texts = [result["text"] for result in json.loads(out)["results"]]
    code, shown, _ = run(monkeypatch, capsys, *arguments)
    assert code == 0 and shown == f'[1] "a"\n{texts[0]}\n[2] "b"\n{texts[1]}\n'
    _, alone, _ = run(monkeypatch, capsys, "model.mint", "--prompt", "a", "--max-tokens", "20", "--seed", "7")
    assert alone == f"{texts[0]}\n"
    _, other, _ = run(monkeypatch, capsys, "model.mint", "--prompt", "a", "--max-tokens", "20", "--seed", "8")
    assert other != alone


def test_stop_ends_before_its_text(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    arguments = ("model.mint", "--prompt", "a", "--max-tokens", "20", "--seed", "7", "--json")
    _, out, _ = run(monkeypatch, capsys, *arguments)
    text = json.loads(out)["results"][0]["text"]
    stop = text[4:6]
    _, out, _ = run(monkeypatch, capsys, *arguments, "--stop", stop)
    result = json.loads(out)["results"][0]
    assert result["text"] == text[: text.find(stop)] and result["finish"] == "stop"


def test_a_checkpoint_and_its_folder_give_what_their_graph_gives(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    path = folder / "run" / "checkpoint.safetensors"
    write_checkpoint(path, DataSource("moby-dick"))
    quantize_native(path).save(folder / "own.mint")
    shown = []
    for model in (str(path), "run", "own.mint"):
        code, out, err = run(monkeypatch, capsys, model, "--prompt", "Call", "--max-tokens", "9", "--json")
        assert (code, err) == (0, "")
        report = json.loads(out)
        shown.append((report["model_id"], report["results"]))
    assert shown[0] == shown[1] == shown[2]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["model.mint"], "--prompt"),
        (["model.mint", "--prompt", ""], "prompt 0 is empty"),
        (["model.mint", "--prompt", "a", "--prompt-file", "none"], "cannot read none"),
        (["none.mint", "--prompt", "a"], "cannot read none.mint"),
        (["empty", "--prompt", "a"], "neither model.mint nor checkpoint.safetensors"),
        (["digits.mint", "--prompt", "a"], "reads features"),
        (["eleven.mint", "--prompt", "a"], "--tokenizer-file FILE"),
        (["--prompt", "a"], "mambaint quantize"),
        (["model.mint", "--prompt", "a", "--temperature", "-1"], "temperature"),
        (["model.mint", "--prompt", "a", "--top-p", "0"], "top_p"),
        (["model.mint", "--prompt", "a", "--max-tokens", "0"], "max-tokens"),
        (["model.mint", "--prompt", "a", "--device", "abacus"], "abacus"),
        (["model.mint", "--prompt", "a", "--tokenizer-file", "none.json"], "cannot read none.json"),
    ],
)
def test_fault_has_exit_code_two_and_no_traceback(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture, arguments: list[str], words: str
) -> None:
    (folder / "empty").mkdir()
    random_graph()[0].save(folder / "digits.mint")
    random_graph(task="language_model", vocab_size=11, seq_len=5)[0].save(folder / "eleven.mint")
    code, out, err = run(monkeypatch, capsys, *arguments)
    assert (code, out) == (2, "") and words in err and "Traceback" not in err
