"""``mambaint train`` as a user meets it: outputs, exit codes, one-line faults."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from cli.main import main
from mamba_int.float_models.config import MambaConfig
from mamba_int.training import load_checkpoint
from mamba_int.training.metrics import read_metrics
from mamba_int.training.model_config import arithmetic_of

TINY = "[model]\nd_model = 16\nheaddim = 8\nd_state = 4\n[training]\nbatch_size = 8\nwarmup_steps = 2\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.toml").write_text(TINY)
    return tmp_path


def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["mambaint", "train", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    out, err = capsys.readouterr()
    return int(stop.value.code or 0), out, err


Capture = pytest.CaptureFixture[str]


def test_json_is_all_that_stdout_holds_and_latest_points_to_the_checkpoint(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    code, out, err = run(
        monkeypatch, capsys, "--config", "tiny.toml", "--steps", "6", "--seed", "3", "--twin", "--json"
    )
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert set(report) == {
        "test_accuracy",
        "validation_accuracy",
        "float_twin_accuracy",
        "train_seconds",
        "checkpoint",
        "steps",
        "best_step",
        "seed",
        "resumed",
    }
    assert (report["steps"], report["seed"], report["resumed"]) == (6, 3, False)
    assert 0 <= report["float_twin_accuracy"] <= 1
    assert json.loads((folder / "runs" / "latest.json").read_text()) == {"checkpoint": report["checkpoint"]}
    kept = load_checkpoint(folder / report["checkpoint"])
    assert kept.results["test_accuracy"] == report["test_accuracy"]
    assert kept.model_config.d_model == 16 and kept.integers
    twin = load_checkpoint(folder / "runs/digits/float-twin/checkpoint.safetensors")
    assert arithmetic_of(twin.model_config) == "float" and twin.training_config.learning_rate == 5e-3


def test_second_call_resumes_and_another_recipe_needs_restart(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    tiny = ("--config", "tiny.toml", "--out", "here", "--steps")
    assert run(monkeypatch, capsys, *tiny, "4")[0] == 0
    assert not (folder / "runs").exists()
    code, out, _ = run(monkeypatch, capsys, *tiny, "4")
    assert code == 0 and "resumed" in out and "test accuracy" in out
    code, out, err = run(monkeypatch, capsys, *tiny, "5")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "training.steps" in err and "--restart" in err
    assert run(monkeypatch, capsys, *tiny, "5", "--restart")[0] == 0


def test_own_text_reports_bits_per_byte(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    (folder / "text.txt").write_bytes(b"the cat sat on the mat. " * 40)
    (folder / "lm.toml").write_text(TINY + "sequence_length = 16\nevaluation_length = 16\n")
    code, out, _ = run(
        monkeypatch, capsys, "--config", "lm.toml", "--data", "text.txt", "--steps", "3", "--json"
    )
    report = json.loads(out)
    assert code == 0
    assert 0 < report["test_bits_per_byte"] < 12
    assert report["float_twin_bits_per_byte"] is None
    assert report["checkpoint"] == "runs/text/checkpoint.safetensors"


def test_own_csv_is_found_again_from_another_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    (folder / "d.csv").write_text("".join(f"{i % 7 / 2},{i % 5},{'ab'[i % 2]}\n" for i in range(40)))
    code, _, _ = run(monkeypatch, capsys, "--config", "tiny.toml", "--data", "d.csv", "--steps", "3")
    assert code == 0
    source = load_checkpoint(folder / "runs/d/checkpoint.safetensors").data.source
    assert source.path == str((folder / "d.csv").resolve())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--preset", "digit"], "did you mean 'digits'"),
        (["--data", "missing.csv"], "cannot read"),
        (["--config", "missing.toml"], "cannot read"),
        (["--out", "tiny.toml"], "cannot"),
        (["--out", "tiny.toml/x"], "cannot"),
        (["--out", "/proc/nowhere"], "cannot"),
        (["--device", "abacus"], "device 'abacus'"),
    ],
)
def test_fault_is_one_line_with_exit_code_two_and_no_files(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture, arguments: list[str], words: str
) -> None:
    code, out, err = run(monkeypatch, capsys, *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert words in err and err.startswith("mambaint: ")
    assert [path.name for path in folder.iterdir()] == ["tiny.toml"]


@pytest.mark.parametrize(
    "arguments", [["--steps", "0"], ["--seed", "-1"], ["--steps", "many"], ["--unknown"]]
)
def test_bad_usage_exits_with_two(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture, arguments: list[str]
) -> None:
    assert run(monkeypatch, capsys, *arguments)[0] == 2


def test_ctrl_c_leaves_a_run_that_resumes(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    (folder / "long.toml").write_text(TINY + "validate_every = 1000\nthreads = 1\n")
    arguments = ["--config", "long.toml", "--steps", "150", "--out", "run"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    child = subprocess.Popen(
        [sys.executable, "-m", "cli.main", "train", *arguments],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not read_metrics(folder / "run" / "metrics.jsonl") and time.monotonic() < deadline:
        time.sleep(0.02)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 2
    assert "interrupted after step" in err and err.count("\n") == 1
    code, out, _ = run(monkeypatch, capsys, *arguments, "--json")
    report: dict[str, Any] = json.loads(out)
    assert code == 0 and report["resumed"]


def test_help_needs_neither_torch_nor_matplotlib() -> None:
    program = (
        "import sys, cli.train; from click.testing import CliRunner; "
        "assert CliRunner().invoke(cli.train.command, ['--help']).exit_code == 0; "
        "heavy = {'torch', 'numpy', 'matplotlib', 'rich'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[2])


FLOAT = '[model]\nmixer = "mamba2"\nd_model = 8\nheaddim = 8\nd_state = 4\nn_layer = 1\n'


@pytest.mark.usefixtures("references")
@pytest.mark.parametrize("preset", ["char-mamba2", None])
def test_float_language_model_trains_by_preset_or_by_its_mixer(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture, preset: str | None
) -> None:
    (folder / "text.txt").write_bytes(b"the cat sat on the mat. " * 40)
    recipe = "[training]\nbatch_size = 4\nsequence_length = 16\nevaluation_length = 16\n"
    (folder / "float.toml").write_text(FLOAT + recipe)
    chosen = ("--preset", preset) if preset else ()
    arguments = (*chosen, "--config", "float.toml", "--data", "text.txt", "--steps", "3", "--device", "cpu")
    code, out, err = run(monkeypatch, capsys, *arguments, "--json")
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert 0 < report["test_bits_per_byte"] < 12
    kept = load_checkpoint(folder / report["checkpoint"])
    assert isinstance(kept.model_config, MambaConfig) and kept.model_config.mixer == "mamba2"
    assert kept.training_config.autocast == "bfloat16"


@pytest.mark.parametrize(
    ("arguments", "table", "words"),
    [
        (["--preset", "digits-mamba2", "--twin"], "", "leave out --twin"),
        (["--preset", "digits"], FLOAT, "--preset digits-mamba2"),
        (["--preset", "char"], FLOAT, "--preset char-mamba2"),
        (["--preset", "digits-mamba"], "[model]\nnum_labels = 4\n", "num_labels is read from the data"),
        (["--preset", "digits-mamba"], '[model]\ngate = "algebraic"\n', "unknown key 'gate'"),
        ([], '[model]\nmixer = "rwkv"\n', "rwkv"),
        (["--preset", "digits"], '[training]\nautocast = "bfloat16"\n', "would round the integers"),
    ],
)
def test_fault_in_the_choice_of_a_float_model_is_one_line(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
    arguments: list[str],
    table: str,
    words: str,
) -> None:
    (folder / "tiny.toml").write_text(table)
    code, out, err = run(monkeypatch, capsys, *arguments, "--config", "tiny.toml")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert words in err and err.startswith("mambaint: ")
    assert [path.name for path in folder.iterdir()] == ["tiny.toml"]


@pytest.mark.usefixtures("references")
def test_training_needs_neither_rich_nor_ezkl(tmp_path: Path) -> None:
    """A machine with a GPU may have neither."""
    (tmp_path / "f.toml").write_text(FLOAT + "[training]\nbatch_size = 4\n")
    program = (
        "import sys; sys.modules['rich'] = sys.modules['ezkl'] = None; from cli.main import main; "
        f"sys.argv = ['mambaint', 'train', '--config', {str(tmp_path / 'f.toml')!r}, '--steps', '1', "
        f"'--out', {str(tmp_path / 'run')!r}]; main()"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[2])
