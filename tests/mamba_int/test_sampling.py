"""Sampling in integers: the distribution, what is cut off, and who draws from which generator."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mamba_int.errors import MambaintError
from mamba_int.graph import Graph
from mamba_int.sampling import Sampler, SamplingConfig
from tests.mamba_int.graphs import chain, node

FRAC = 4


def logits_graph(reach: int = 400) -> Graph:
    """A graph whose output has four binary places and any integer up to ``reach``."""
    return chain(node("logits", "shift", "input", places=0, frac=FRAC), width=6, low=-reach, high=reach)


def draw(logits: Any, config: SamplingConfig, draws: int) -> np.ndarray[Any, Any]:
    """Tokens [draws, batch]."""
    tensor = torch.tensor(logits)
    sampler = Sampler(logits_graph(), config, len(tensor))
    return np.stack([sampler(tensor).numpy() for _ in range(draws)])


def test_greedy_takes_the_first_of_equals() -> None:
    logits = [[1, 7, 7, 2, 7, 0], [-5, -5, -5, -5, -5, -5]]
    assert draw(logits, SamplingConfig(temperature=0), 2).tolist() == [[1, 0], [1, 0]]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_frequencies_are_those_of_the_softmax(temperature: float) -> None:
    logits = np.array([0, 16, 24, -8, 30, -300])
    wanted = np.exp(logits / 2**FRAC / temperature)
    wanted /= wanted.sum()
    count = 4000
    tokens = draw([logits.tolist()], SamplingConfig(temperature, seed=5), count)
    found = np.bincount(tokens[:, 0], minlength=6) / count
    # five standard deviations
    assert (np.abs(found - wanted) < 5 * np.sqrt(wanted * (1 - wanted) / count) + 1e-9).all()


@given(
    st.lists(st.integers(-400, 400), min_size=6, max_size=6),
    st.integers(0, 7),
    st.floats(0.01, 1),
    st.floats(0.05, 20),
)
@settings(max_examples=40, deadline=None)
def test_nothing_outside_top_k_and_top_p_is_chosen_and_all_inside_weighs(
    logits: list[int], top_k: int, top_p: float, temperature: float
) -> None:
    order = sorted(range(6), key=lambda token: (-logits[token], token))[: top_k or 6]
    top = max(logits)
    weights = [math.floor(math.exp((logits[t] - top) / 2**FRAC / temperature) * 2**32 + 0.5) for t in order]
    kept, before = [], 0
    for token, weight in zip(order, weights, strict=True):
        # Beside the edge the float of the reference may fall on either side.
        if before < top_p * sum(weights) * (1 + 1e-6):
            kept.append(token)
        before += weight
    tokens = draw([logits], SamplingConfig(temperature, top_k, top_p), 20)
    assert set(tokens[:, 0].tolist()) <= set(kept)


def test_top_p_keeps_the_token_that_crosses_it() -> None:
    # Probabilities 0.5, 0.25, 0.125, ...: steps of ln 2 are 16 ln 2 = 11.09 at four places.
    logits = [[44, 33, 22, 11, 0, -11]]
    seen = {p: set(draw(logits, SamplingConfig(top_p=p), 200)[:, 0].tolist()) for p in (0.4, 0.6, 0.8, 1.0)}
    assert seen == {0.4: {0}, 0.6: {0, 1}, 0.8: {0, 1, 2}, 1.0: {0, 1, 2, 3, 4, 5}}


def test_top_k_keeps_k_and_of_equals_the_first() -> None:
    for k in (1, 2, 5):
        assert set(draw([[0, 3, 3, 0, 3, 0]], SamplingConfig(100.0, top_k=k), 200)[:, 0].tolist()) == set(
            [1, 2, 4, 0, 3][:k]
        )


@pytest.mark.parametrize(("uniform", "token"), [(0.0, 0), (0.5 - 2**-53, 0), (0.5, 1), (1 - 2**-53, 1)])
def test_a_number_on_the_edge_of_two_tokens_chooses_the_second(uniform: float, token: int) -> None:
    class Fixed:
        def random(self) -> float:
            return uniform

    sampler = Sampler(logits_graph(), SamplingConfig(top_k=2), 1)
    sampler._generators = [Fixed()]  # type: ignore[list-item]
    assert sampler(torch.zeros(1, 6, dtype=torch.int64)).tolist() == [token]


def test_a_row_depends_on_its_seed_and_place_alone() -> None:
    logits = torch.randint(-40, 40, (30, 5, 6), generator=torch.Generator().manual_seed(0))
    graph, config = logits_graph(), SamplingConfig(seed=3)

    def run(batch: int, settings: SamplingConfig = config) -> np.ndarray[Any, Any]:
        sampler = Sampler(graph, settings, batch)
        return np.stack([sampler(step[:batch]).numpy() for step in logits])

    whole = run(5)
    for batch in (1, 2, 4):
        np.testing.assert_array_equal(run(batch), whole[:, :batch])
    assert (run(5, replace(config, seed=4)) != whole).any()


@pytest.mark.gpu
@pytest.mark.parametrize(
    "config", [SamplingConfig(0), SamplingConfig(0.8, 4, 0.9), SamplingConfig(2.0, seed=1)]
)
def test_a_device_chooses_the_same_tokens(config: SamplingConfig) -> None:
    logits = torch.randint(-40, 40, (30, 5, 6), generator=torch.Generator().manual_seed(0))
    host, device = Sampler(logits_graph(), config, 5), Sampler(logits_graph(), config, 5, "cuda")
    for step in logits:
        assert device(step.cuda()).tolist() == host(step).tolist()


def test_equal_rows_draw_different_tokens() -> None:
    tokens = draw([[0] * 6, [0] * 6], SamplingConfig(), 50)
    assert (tokens[:, 0] != tokens[:, 1]).any()


def test_a_narrow_range_of_logits_needs_no_longer_table() -> None:
    sampler = Sampler(logits_graph(reach=3), SamplingConfig(100.0), 1)
    assert set(sampler(torch.tensor([[-3, 3, -3, 3, -3, 3]])).tolist()) <= set(range(6))


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": 1e9},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_p": float("nan")},
        {"seed": -1},
    ],
)
def test_impossible_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(MambaintError, match=next(iter(wrong))):
        SamplingConfig(**wrong)


def test_a_table_beyond_memory_is_refused() -> None:
    wide = chain(node("y", "shift", "input", places=0, frac=24), width=2, low=-(1 << 30), high=1 << 30)
    with pytest.raises(MambaintError, match="choose a lower one"):
        Sampler(wide, SamplingConfig(2.0), 1)
