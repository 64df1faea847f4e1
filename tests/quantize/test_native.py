"""Native checkpoints: the graph is the frozen integers, and a checkpoint that does not fit is refused."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch

from mamba_int.datasets import ClassificationData, DataSource, load_data
from mamba_int.errors import MambaintError
from mamba_int.graph import Graph
from mamba_int.interpreter import evaluate
from quantize.native import quantize_native
from tests.quantize.checkpoints import write_checkpoint

DIGITS = DataSource("digits")


def test_graph_computes_the_logits_of_the_trained_model_bit_for_bit(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    model = write_checkpoint(path, DIGITS, gate="algebraic", rotation="shear")
    graph = quantize_native(path)
    data = load_data(DIGITS)
    assert isinstance(data, ClassificationData)
    with torch.inference_mode():
        real = model(data.test_inputs)
    integers = evaluate(graph, data.test_inputs.numpy())
    assert (real.double().numpy() * 2.0 ** graph.card["logits_frac"] == integers).all()
    assert graph.max_bits <= 24


def test_integers_are_those_of_the_checkpoint_not_computed_anew(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    bias = torch.arange(10)
    write_checkpoint(path, DIGITS, {"logits.bias": bias})
    assert (quantize_native(path).by_name["logits"].constants["bias"] == bias.numpy()).all()


def test_card_says_what_the_model_is_and_survives_the_file(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    write_checkpoint(path, DIGITS)
    graph = quantize_native(path)
    graph.save(tmp_path / "model.mint")
    loaded = Graph.load(tmp_path / "model.mint")
    assert loaded.card == graph.card and loaded.model_id == graph.model_id
    assert graph.card["classes"] == [str(i) for i in range(10)]
    assert graph.card["checkpoint_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert graph.card["dataset"]["fingerprint"] == load_data(DIGITS).fingerprint()
    assert graph.card["logits_frac"] == graph.by_name["logits"].frac


def test_card_does_not_reveal_where_the_data_lies(tmp_path: Path) -> None:
    file = tmp_path / "own.csv"
    file.write_text("".join(f"{i % 7 / 2},{i % 5},{'ab'[i % 2]}\n" for i in range(40)))
    source = DataSource("csv", str(file))
    write_checkpoint(tmp_path / "checkpoint.safetensors", source)
    card = quantize_native(tmp_path / "checkpoint.safetensors").card
    assert str(tmp_path) not in json.dumps(card)
    assert card["classes"] == ["a", "b"] and card["input"]["feature_scale"] != [1.0]


def test_float_twin_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "c", DIGITS, arithmetic="float")
    with pytest.raises(MambaintError, match="float twin"):
        quantize_native(tmp_path / "c")


def test_scales_that_still_move_are_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "c", DIGITS, freeze=False)
    with pytest.raises(MambaintError, match="not frozen"):
        quantize_native(tmp_path / "c")


@pytest.mark.parametrize(
    ("integers", "words"),
    [
        ({"layer0.ssd.D": None}, "lacks the integers 'layer0.ssd.D'"),
        ({"layer1.ssd.D": torch.ones(4, dtype=torch.int64)}, "has integers 'layer1.ssd.D'"),
        ({"logits.bias": torch.full((10,), 2**62)}, "'logits.bias' exceed 24 bits"),
        ({"logits.bias": torch.full((10,), -(2**63))}, "'logits.bias' exceed 24 bits"),
        ({"logits.bias": torch.zeros(9, dtype=torch.int64)}, "'logits' .*malformed"),
        ({"embed.weight": torch.zeros(8, dtype=torch.int64)}, "'embed' .*malformed"),
        (
            {"logits.weight": torch.ones(9, 8).long(), "logits.bias": torch.zeros(9).long()},
            "9 logits, not 10",
        ),
    ],
)
def test_integers_that_do_not_fit_are_refused(
    tmp_path: Path, integers: dict[str, torch.Tensor | None], words: str
) -> None:
    write_checkpoint(tmp_path / "c", DIGITS, integers)
    with pytest.raises(MambaintError, match=words):
        quantize_native(tmp_path / "c")


def test_model_beyond_24_bits_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "c", DIGITS, {"logits.bias": torch.full((10,), 1 << 24)})
    with pytest.raises(MambaintError, match="beyond 24 bits"):
        quantize_native(tmp_path / "c")
