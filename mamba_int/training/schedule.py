"""How the learning rate moves over a run."""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["linear", "cosine", "one_cycle"]

CYCLE_RISE = 0.3
"""Share of a run in which the rate of ``one_cycle`` rises."""
CYCLE_START = 0.04
"""Share of the peak rate at which ``one_cycle`` starts."""


def learning_rate_factor(
    step: int, steps: int, warmup_steps: int, schedule: Schedule, final_rate: float = 0.0
) -> float:
    """Share of the peak learning rate at a step: above 0, at most 1.

    ``linear`` and ``cosine`` (Loshchilov and Hutter 2017, arXiv 1608.03983, equation 5, without restarts)
    fall from 1 to ``final_rate``. ``one_cycle`` (Smith and Topin 2018, arXiv 1708.07120) first rises from
    0.04 for three tenths of the run; both of its parts are half cosines, and momentum stays as it is.

    Args:
        step: from 0 to ``steps`` - 1.
        steps: length of the run.
        warmup_steps: the first steps, in which all this is multiplied by a line up to 1.
        schedule: its form.
        final_rate: what the factor tends to at the end.
    """
    warmup = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    done = step / steps
    if schedule == "linear":
        return warmup * _between(final_rate, 1.0, 1.0 - done)
    if schedule == "cosine":
        return warmup * _between(final_rate, 1.0, _half_cosine(done))
    if done < CYCLE_RISE:
        return warmup * _between(1.0, CYCLE_START, _half_cosine(done / CYCLE_RISE))
    return warmup * _between(final_rate, 1.0, _half_cosine((done - CYCLE_RISE) / (1.0 - CYCLE_RISE)))


def _between(end: float, start: float, left: float) -> float:
    """``start`` where ``left`` is 1, ``end`` where it is 0."""
    return end + (start - end) * left


def _half_cosine(done: float) -> float:
    """From 1 at 0 to 0 at 1."""
    return 0.5 * (1.0 + math.cos(math.pi * done))
