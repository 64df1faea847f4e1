"""``mambaint eval``: one measure for graphs and checkpoints, on data that means what it meant in training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mamba_int.datasets import DataSource, load_data
from mamba_int.interpreter import evaluate as interpret
from mamba_int.training import load_checkpoint
from quantize.latest import CHECKPOINT_FILE, MODEL_FILE
from quantize.native import native_graph
from tests.cli.conftest import Cli
from tests.quantize.checkpoints import write_checkpoint

DIGITS = DataSource("digits")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A folder with a checkpoint of the digits and its graph."""
    write_checkpoint(tmp_path / CHECKPOINT_FILE, DIGITS)
    native_graph(load_checkpoint(tmp_path / CHECKPOINT_FILE)).save(tmp_path / MODEL_FILE)
    return tmp_path


def test_a_graph_and_its_checkpoint_score_what_the_interpreter_does(run: Path, cli: Cli) -> None:
    data = load_data(DIGITS)
    graph = native_graph(load_checkpoint(run / CHECKPOINT_FILE))
    predicted = interpret(graph, data.test_inputs.numpy()).argmax(-1)
    expected = float(np.mean(predicted == data.test_labels.numpy()))
    results = [cli.json("eval", str(run / name)) for name in (CHECKPOINT_FILE, MODEL_FILE, "")]
    assert [result["accuracy"] for result in results] == [expected] * 3
    assert results[1]["model"] == results[2]["model"] == graph.model_id
    assert results[0]["loss"] == results[1]["loss"]


def test_text_is_measured_in_bits_per_byte(tmp_path: Path, cli: Cli) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(
        bytes(torch.randint(97, 123, (3000,), generator=torch.Generator().manual_seed(0)).tolist())
    )
    write_checkpoint(tmp_path / CHECKPOINT_FILE, DataSource("text", str(text)))
    native_graph(load_checkpoint(tmp_path / CHECKPOINT_FILE)).save(tmp_path / MODEL_FILE)
    arguments = ("--window", "50", "--split", "validation")
    checkpoint = cli.json("eval", str(tmp_path / CHECKPOINT_FILE), *arguments)
    graph = cli.json("eval", str(tmp_path / MODEL_FILE), *arguments, "--data", str(text))
    assert checkpoint["bits_per_byte"] == graph["bits_per_byte"] > 4
    code, _, fault = cli("eval", str(tmp_path / MODEL_FILE))
    assert code == 2 and "give it with --data" in fault


def test_data_on_another_scale_is_not_scored(run: Path, cli: Cli) -> None:
    """The same integers would stand for other features, and the accuracy for nothing."""
    rows = np.random.default_rng(0).normal(size=(60, 64)) * 100
    lines = [",".join([*(f"{v:.3f}" for v in row), str(i % 10)]) for i, row in enumerate(rows)]
    other = run / "other.csv"
    other.write_text("\n".join(lines))
    for model in (CHECKPOINT_FILE, MODEL_FILE):
        code, out, fault = cli("eval", str(run / model), "--data", str(other))
        assert code == 2 and not out and "not on the scale" in fault


def test_text_is_no_data_for_a_classifier(run: Path, cli: Cli) -> None:
    (run / "text.txt").write_text("some text, long enough to be split in three parts" * 20)
    code, _, fault = cli("eval", str(run), "--data", str(run / "text.txt"))
    assert code == 2 and "in the tokens" in fault
