"""The integer log-score: within its bound of the float one, exact at its edges, the same everywhere."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mamba_int.errors import MambaintError
from mamba_int.executor import GraphPredictor
from mamba_int.graph import IntArray
from mamba_int.interpreter import evaluate
from mamba_int.log_score import ERROR, GRID_FRAC, LogScore, bits
from tests.circuits_runtime.models import random_graph


def log_softmax(logits: IntArray, frac: int) -> np.ndarray:
    real = torch.from_numpy(logits).double() * 2.0**-frac
    found: np.ndarray = torch.log_softmax(real, -1).numpy()
    return found


def furthest(score: LogScore, logits: IntArray) -> float:
    """Nats by which the scores of all tokens differ from the softmax's at most."""
    n, choices = logits.shape
    tokens = np.tile(np.arange(choices), n)
    found = score(np.repeat(logits, choices, 0), tokens).reshape(n, choices)
    return float(np.abs(found / 2.0**score.score_frac - log_softmax(logits, score.frac)).max())


@pytest.mark.parametrize("choices", [2, 3, 4, 5, 11, 96, 256, 257, 4096, 50257])
def test_derived_error_is_below_the_stated_one(choices: int) -> None:
    for frac in (0, 5, 12, 16):
        assert LogScore(choices, frac).error < ERROR


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from([2, 3, 11, 96, 300]),
    st.integers(-2, 16),
    st.sampled_from([0.01, 0.3, 2.0, 20.0, 1000.0]),
    st.integers(0, 2**32 - 1),
)
def test_scores_are_within_the_bound_of_the_softmax(
    choices: int, frac: int, spread: float, seed: int
) -> None:
    random = np.random.default_rng(seed)
    logits = np.rint(random.normal(0, spread * 2.0**frac, (8, choices))).astype(np.int64)
    assert furthest(LogScore(choices, frac), logits) <= ERROR


@pytest.mark.parametrize("frac", [0, 3, 5, 6, 12])
@pytest.mark.parametrize("choices", [2, 3, 96])
def test_edges_of_the_grid_are_within_the_bound(choices: int, frac: int) -> None:
    """Remainders at both ends of their window, all equal logits, one far above or far below all others."""
    score = LogScore(choices, frac)
    step = 1 << max(frac - GRID_FRAC, 0)
    base = np.zeros((1, choices), np.int64)
    rows = [base + offset for offset in range(-step, step + 1)]
    for gap in (1, step // 2, step, 2 << max(frac, 0), 40 << max(frac, 0), 1 << (frac + 12)):
        rows += [base + np.eye(1, choices, dtype=np.int64) * sign * gap for sign in (1, -1)]
        rows.append(base + gap * (np.arange(choices) % 2))
    assert furthest(score, np.concatenate(rows)) <= ERROR


def test_normaliser_is_the_smallest_that_fits() -> None:
    score = LogScore(7, 9)
    logits = np.random.default_rng(0).integers(-5000, 5000, (200, 7))
    r, total = score.normaliser(logits)
    q, rest = score.split(logits)
    assert (total == score.sums(q, rest, r)).all() and (total <= score.threshold).all()
    assert (score.sums(q, rest, r - 1) > score.threshold).all()
    assert (r >= q.max(-1) - 1).all() and (r <= q.max(-1) - 2 + score.reach).all()


def test_largest_logit_is_at_most_one_step_above_the_normaliser() -> None:
    """It is where it was rounded up by half a step, and nothing stands beside it."""
    score, logits = LogScore(2, 9), np.array([[8, -9000], [7, -9000], [-8, -9000], [-9, -9000]])
    r, _ = score.normaliser(logits)
    assert (score.split(logits)[0].max(-1) - r).tolist() == [1, 0, 1, 0]


def test_errors_all_but_cancel_over_a_text() -> None:
    score, random = LogScore(96, 12), np.random.default_rng(0)
    logits = np.rint(random.normal(0, 2 * 4096, (20_000, 96))).astype(np.int64)
    tokens = random.integers(0, 96, len(logits))
    wanted = np.take_along_axis(log_softmax(logits, 12), tokens[:, None], 1)[:, 0]
    found = score(logits, tokens) / 2.0**score.score_frac
    assert abs((found - wanted).mean()) < ERROR / 20


def test_weights_are_those_of_the_exponential() -> None:
    score = LogScore(96, 12)
    exact = [2.0**score.weight_frac * math.exp(-d / 32) for d in range(score.last, -3, -1)]
    assert np.abs(score.weights - np.array(exact)).max() <= 0.5
    assert score.weights[:2].tolist() == [0, 0] and score.weights[2] == 1


def test_score_of_a_text_is_its_loss_in_eval() -> None:
    graph, inputs = random_graph(0, task="language_model", vocab_size=11, seq_len=16, chunk_size=4)
    score, text = LogScore.of(graph), inputs[2]
    logits = evaluate(graph, text[None])[0]
    total = int(score(logits[:-1], text[1:]).sum())
    real = GraphPredictor(graph, torch.device("cpu"))(torch.from_numpy(text[None, :-1]))
    loss = torch.nn.functional.cross_entropy(real[0], torch.from_numpy(text[1:]), reduction="sum")
    assert bits(total, score.score_frac) == pytest.approx(
        -float(loss) / math.log(2), abs=15 * ERROR / math.log(2)
    )


def test_logits_too_fine_for_int64_are_refused() -> None:
    graph, _ = random_graph(0, task="language_model", vocab_size=11, seq_len=16, chunk_size=4)
    nodes = [replace(node, frac=50) if node.name == graph.output else node for node in graph.nodes]
    with pytest.raises(MambaintError, match="coarser"):
        LogScore.of(graph.with_nodes(nodes))
