"""``--score-after``: what a user sees of the proof of a text's log-score."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mamba_int.graph import Graph
from mamba_int.interpreter import evaluate
from mamba_int.log_score import ERROR, LogScore
from tests.circuits_runtime.models import random_graph
from tests.cli.conftest import Cli
from tests.zk.test_score_chain import NARROW, TOKENS, score_of

TEXT = TOKENS[:6]
PROVE = ("prove", "--input", "t.json", "--model", "text.mint")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def graph(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Graph:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MAMBAINT_CACHE", str(cache))
    graph, _ = random_graph(0, **NARROW)
    replace(graph, card={"task": "language_model"}).save(tmp_path / "text.mint")
    (tmp_path / "t.json").write_text(json.dumps({"input_data": [TEXT]}))
    return graph


def test_score_is_proved_and_shown_in_bits(graph: Graph, tmp_path: Path, cli: Cli) -> None:
    proved = cli.json(*PROVE, "--segment-steps", "4", "--score-after", "2")
    score = proved["score"]
    frac = LogScore.of(graph).score_frac
    assert (score["integer"], score["unit"]) == (score_of(graph, TEXT, 2), f"2^-{frac} nats")
    assert (score["tokens"], score["prompt_steps"], proved["outputs"]) == (4, 2, [])
    real = torch.from_numpy(evaluate(graph, np.array([TEXT]))[0]).double()
    real *= 2.0 ** -graph.by_name[graph.output].frac
    loss = torch.nn.functional.cross_entropy(real[1:-1], torch.tensor(TEXT[2:])).item() / math.log(2)
    assert abs(score["bits_per_token"] - loss) <= score["error_bits_per_token"] == ERROR / math.log(2)

    verdict = cli.verify("proof.json")
    assert (
        verdict["valid"] and verdict["score"] == score and verdict["public"] == {"score": [score["integer"]]}
    )
    code, out, _ = cli("verify", "proof.json", "--rederive", "text.mint")
    assert code == 0 and "rederived" in out and "greedily" not in out
    assert f"{score['bits']:.4f} bits for 4 tokens after a prompt of 2" in out
    assert f"exactly {score['integer']} x 2^-{frac} nats" in out
    cli.json("setup", "--model", "text.mint", "--segment-steps", "4", "--score", "--out", "published.zip")
    assert (tmp_path / "published.zip").read_bytes() == (tmp_path / "verifier.zip").read_bytes()

    total = str(score["integer"])
    forged = (tmp_path / "proof.json").read_text().replace(f"[{total}]", f"[{int(total) + 1}]")
    (tmp_path / "proof.json").write_text(forged)
    verdict = cli.verify("proof.json")
    assert not verdict["valid"] and "score" not in verdict and verdict["reason"].startswith("segment 1")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--score-after", "2"), "--segment-steps"),
        (("--segment-steps", "4", "--score-after", "2", "--greedy-after", "2"), "not both"),
        (("--segment-steps", "4", "--score-after", "6"), "leaves nothing after it"),
        (("--segment-steps", "4", "--score-after", "0"), "0 is not in the range"),
    ],
)
def test_what_is_no_statement_is_one_line(
    graph: Graph, cli: Cli, arguments: tuple[str, ...], words: str
) -> None:
    code, out, fault = cli(*PROVE, *arguments, "--out", "x/proof.json")
    assert (code, out) == (2, "") and words in fault and "Traceback" not in fault
    assert not Path("x/proof.json").exists()


def test_classifier_has_no_score(graph: Graph, cli: Cli, tmp_path: Path) -> None:
    classifier, _ = random_graph(0, seq_len=8, chunk_size=4, pooling="last")
    classifier.save(tmp_path / "c.mint")
    code, _, fault = cli("setup", "--model", "c.mint", "--segment-steps", "4", "--score")
    assert code == 2 and fault.count("\n") == 1 and "no language model" in fault
    code, _, fault = cli("setup", "--model", "text.mint", "--score")
    assert code == 2 and "--segment-steps" in fault
