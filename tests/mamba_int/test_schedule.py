"""Learning rates: within zero and the peak, down to the floor, and those of the papers."""

from __future__ import annotations

from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mamba_int.training.schedule import Schedule, learning_rate_factor

SCHEDULES = get_args(Schedule)


@given(st.integers(1, 500), st.integers(0, 600), st.sampled_from(SCHEDULES), st.floats(0, 0.99), st.data())
def test_learning_rate_never_leaves_zero_to_peak(
    steps: int, warmup: int, schedule: Schedule, final_rate: float, draw: st.DataObject
) -> None:
    step = draw.draw(st.integers(0, steps - 1))
    factor = learning_rate_factor(step, steps, warmup, schedule, final_rate)
    assert 0 < factor <= 1
    if schedule != "one_cycle" and not warmup:
        assert factor >= final_rate


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_floor_is_where_the_rate_ends_and_the_peak_where_it_was(schedule: Schedule) -> None:
    rates = [learning_rate_factor(step, 10_000, 0, schedule, 0.1) for step in range(10_000)]
    assert rates[-1] == pytest.approx(0.1, abs=1e-4)
    assert max(rates) == pytest.approx(1.0)
    assert rates.index(max(rates)) == (3000 if schedule == "one_cycle" else 0)


def test_one_cycle_is_that_of_pytorch() -> None:
    import torch

    steps = 20_000
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    theirs = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 1.0, steps, pct_start=0.3, div_factor=25, final_div_factor=0.4, cycle_momentum=False
    )
    optimizer.step()
    for step in range(steps):
        if step % 100 == 0:
            mine = learning_rate_factor(step, steps, 0, "one_cycle", 0.1)
            # PyTorch ends its phases a step earlier.
            assert mine == pytest.approx(theirs.get_last_lr()[0], abs=3e-4)
        if step + 1 < steps:
            theirs.step()


def test_a_run_of_the_presets_has_the_rates_it_had_before_there_was_a_floor() -> None:
    for step in range(0, 1000, 7):
        before = min(1.0, (step + 1) / 50) * (1.0 - step / 1000)
        assert learning_rate_factor(step, 1000, 50, "linear") == before
