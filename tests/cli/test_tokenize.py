"""``mambaint tokenize`` as a user meets it, up to training and quantizing on the result."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from cli.main import main
from mamba_int.datasets.tokenizer import load_bpe
from mamba_int.training import load_checkpoint

TINY = (
    "[model]\nd_model = 32\nheaddim = 16\nn_layer = 1\n"
    "[training]\nbatch_size = 4\nwarmup_steps = 2\nsequence_length = 16\nevaluation_length = 16\n"
)
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.toml").write_text(TINY)
    (tmp_path / "a.txt").write_text("the cat sat on the mat, and the rat on the cat. " * 80)
    return tmp_path


def run(monkeypatch: pytest.MonkeyPatch, capsys: Capture, *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["mambaint", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    out, err = capsys.readouterr()
    return int(stop.value.code or 0), out, err


def test_text_is_tokenized_trained_on_quantized_and_continued_with_one_tokenizer(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    arguments = ["tokenize", "a.txt", "--output", "a.tokens", "--vocab-size", "280", "--json"]
    code, out, err = run(monkeypatch, capsys, *arguments)
    written = json.loads(out)
    assert (code, err) == (0, "")
    assert 256 < written["vocab_size"] <= 280 and written["bytes_per_token"] > 1.5
    assert sum(written["bytes"].values()) == (folder / "a.txt").stat().st_size
    arguments = ["train", "--config", "tiny.toml", "--data", "a.tokens", "--steps", "2", "--json"]
    code, out, _ = run(monkeypatch, capsys, *arguments)
    trained = json.loads(out)
    assert code == 0
    kept = load_checkpoint(Path(trained["checkpoint"]))
    assert kept.data.tokenizer is not None and kept.data.tokenizer.digest == written["tokenizer_sha256"]
    assert kept.model_config.vocab_size == written["vocab_size"]
    code, out, _ = run(monkeypatch, capsys, "quantize", trained["checkpoint"], "--json")
    quantized = json.loads(out)
    assert code == 0
    assert quantized["test_bits_per_byte"] == pytest.approx(trained["test_bits_per_byte"], rel=1e-6)
    run_folder = Path(trained["checkpoint"]).parent
    assert load_bpe(run_folder / "tokenizer.json") == load_bpe(Path(quantized["tokenizer"]))
    assert load_bpe(Path(quantized["tokenizer"])) == kept.data.tokenizer
    moved = folder / "elsewhere" / "model"
    shutil.copytree(run_folder / "quantized", moved)
    alone = shutil.copy(trained["checkpoint"], folder / "alone.safetensors")
    shown = []
    for model in (moved, moved / "model.mint", alone, run_folder, quantized["model"]):
        arguments = ["generate", str(model), "--prompt", "the rat", "--max-tokens", "12", "--json"]
        code, out, _ = run(monkeypatch, capsys, *arguments)
        assert code == 0
        shown.append(json.loads(out)["results"])
    assert all(results == shown[0] for results in shown)
    (result,) = shown[0]
    assert result["prompt_tokens"] == len(kept.data.tokenizer.encode(b"the rat")) < len("the rat")
    assert result["text"] == kept.data.tokenizer.decode(result["tokens"]).decode(errors="replace")
    (moved / "tokenizer.json").unlink()
    code, out, err = run(monkeypatch, capsys, "generate", str(moved), "--prompt", "a")
    assert (code, out, err.count("\n")) == (2, "", 1) and "--tokenizer-file" in err
    arguments = ["--tokenizer-file", quantized["tokenizer"], "--prompt", "the rat", "--max-tokens", "12"]
    code, out, _ = run(monkeypatch, capsys, "generate", str(moved), *arguments, "--json")
    assert code == 0 and json.loads(out)["results"] == shown[0]


def test_a_run_on_bytes_leaves_no_tokenizer_of_an_earlier_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    stale = folder / "run" / "tokenizer.json"
    stale.parent.mkdir()
    stale.write_text("{}")
    arguments = ["--config", "tiny.toml", "--data", "a.txt", "--steps", "1", "--out", "run"]
    assert run(monkeypatch, capsys, "train", *arguments)[0] == 0
    assert not stale.exists()


def test_summary_names_tokens_bytes_and_file(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    code, out, _ = run(
        monkeypatch, capsys, "tokenize", "a.txt", "a.txt", "--output", "b.tokens", "--tokenizer", "bytes"
    )
    assert code == 0 and "7,680 bytes, 1.00 a token" in out and "b.tokens" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["missing.txt", "--output", "x.tokens"], "cannot read missing.txt"),
        (["a.txt", "--output", "x.bin"], "does not end in .tokens"),
        (["a.txt", "--output", "x.tokens", "--vocab-size", "12"], "vocabulary of 12"),
        (["a.txt", "--output", "x.tokens", "--vocab-size", "0"], "vocabulary of 0"),
        (["a.txt", "--output", "x.tokens", "--tokenizer", "bytes", "--vocab-size", "300"], "--vocab-size"),
        (["a.txt", "--output", "x.tokens", "--tokenizer-file", "tiny.toml"], "not valid JSON"),
        (["a.txt", "--output", "x.tokens", "--tokenizer-file", "no.tokens"], "cannot read no.tokens"),
        (["a.txt", "--output", "tiny.toml/x.tokens"], "cannot write"),
    ],
)
def test_fault_is_one_line_with_exit_code_two_and_no_file(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture, arguments: list[str], words: str
) -> None:
    code, out, err = run(monkeypatch, capsys, "tokenize", *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert words in err
    assert {path.name for path in folder.iterdir()} == {"tiny.toml", "a.txt"}
