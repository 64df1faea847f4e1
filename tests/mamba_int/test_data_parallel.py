"""Two processes on the CPU train what one does, stop together, and hold the same bits."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from cli.train import command
from mamba_int.datasets.text_file import split_text
from mamba_int.training.metrics import read_metrics
from mamba_int.training.run import METRICS_FILE
from tests.mamba_int.data_parallel_worker import Still
from tests.mamba_int.stand_in import RECIPE, TEXT_RECIPE, fit, tensors_of

ROOT = Path(__file__).parents[2]
Report = dict[str, Any]


def torchrun(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
        "OMP_NUM_THREADS": "1",
    }
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        *arguments,
    ]
    return subprocess.run(launch, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "file").write_text("in the way of a folder")
    done = torchrun("-m", "tests.mamba_int.data_parallel_worker", str(folder), cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def reports(folder: Path) -> list[Report]:
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("kind", ["classes", "uneven", "text", "broken", "resumed"])
def test_both_processes_end_with_the_same_bits(reports: list[Report], kind: str) -> None:
    assert reports[0][kind] == reports[1][kind]
    assert "weights" in reports[0][kind]


@pytest.mark.parametrize("kind", ["classes", "uneven", "text"])
def test_two_processes_train_what_one_does(
    folder: Path, reports: list[Report], tmp_path: Path, kind: str
) -> None:
    """A share weighted by the wrong count, or estimates of one process alone, would show."""
    config = {"classes": RECIPE, "text": TEXT_RECIPE, "uneven": dataclasses.replace(RECIPE, batch_size=15)}[
        kind
    ]
    data = split_text(bytes(range(256)) * 8, "t") if kind == "text" else None
    alone = fit(tmp_path, config, data=data, build_model=Still)
    rows, shared = read_metrics(tmp_path / METRICS_FILE), read_metrics(folder / kind / METRICS_FILE)
    assert len(rows) == len(shared)
    for one, other in zip(rows, shared, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert one.keys() == other.keys()
        for name in one.keys() & {"train_accuracy", "validation_loss"}:
            assert other[name] == pytest.approx(one[name], rel=1e-3)
    assert reports[0][kind]["test"] == pytest.approx(alone.test_metric, rel=1e-3)
    for name, tensor in tensors_of(alone.last_checkpoint).items():
        if name.startswith("model."):
            last = tensors_of(folder / kind / alone.last_checkpoint.name)[name]
            assert last.double().flatten().tolist() == pytest.approx(
                tensor.double().flatten().tolist(), rel=1e-3, abs=1e-3
            )


def test_a_bad_share_of_one_process_is_left_out_by_both(reports: list[Report]) -> None:
    for report in reports:
        values = [value for tensor in report["broken"]["weights"].values() for value in tensor]
        assert all(abs(value) < 1e3 for value in values)
    assert reports[0]["broken"] != reports[0]["classes"]


def test_both_stop_when_one_is_asked_to_and_resume_to_the_same_bits(reports: list[Report]) -> None:
    for report in reports:
        assert "interrupted after step 21 of 37" in report["interrupted"]["error"]
        assert report["resumed"] == report["classes"]
        assert report["state"]["whole"] == report["state"]["resumed"]


def test_a_fault_of_one_process_is_told_by_both(reports: list[Report]) -> None:
    for report in reports:
        assert "another run (different: training.seed)" in report["another"]["error"]
        assert "cannot" in report["unwritable"]["error"]
        assert report["agreed"] == "only the second process fails; try again"


def test_weights_that_drift_apart_by_one_bit_are_noticed(reports: list[Report]) -> None:
    assert all("no longer hold the same weights" in report["drift"] for report in reports)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_train_what_one_does(tmp_path: Path) -> None:
    """Gradients left unreduced, or a captured step that reads the other's batch, would show."""
    arguments = ["-m", "cli.main", "train", "--preset", "char", "--steps", "40", "--device", "cuda", "--json"]
    done = torchrun(*arguments, "--out", "two", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    alone = subprocess.run(
        [sys.executable, *arguments, "--out", "one"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert alone.returncode == 0, alone.stderr
    assert json.loads(done.stdout)["steps"] == 40
    two, one = (read_metrics(tmp_path / name / METRICS_FILE) for name in ("two", "one"))
    for row, other in zip(two, one, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=3e-2)


def test_the_command_prints_once_and_writes_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiny.toml").write_text(
        "[model]\nd_model = 16\nheaddim = 8\nd_state = 4\n[training]\nbatch_size = 16\nwarmup_steps = 2\n"
    )
    arguments = ["-m", "cli.main", "train", "--config", "tiny.toml", "--steps", "6", "--device", "cpu"]
    done = torchrun(*arguments, "--out", "two", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["steps"], report["resumed"]) == (6, False)
    names = {
        "checkpoint.safetensors",
        "last.safetensors",
        "metrics.jsonl",
        "metrics.png",
        "state.safetensors",
    }
    assert {path.name for path in (tmp_path / "two").iterdir()} == names
    monkeypatch.chdir(tmp_path)
    assert CliRunner().invoke(command, [*arguments[3:], "--out", "one"]).exit_code == 0
    first, second = (tensors_of(tmp_path / name / "last.safetensors") for name in ("one", "two"))
    assert first["model.statistics"].tolist() == pytest.approx(second["model.statistics"].tolist(), rel=1e-2)
    rows = [read_metrics(tmp_path / name / METRICS_FILE) for name in ("one", "two")]
    assert rows[1][0]["loss"] == pytest.approx(rows[0][0]["loss"], rel=1e-2)
