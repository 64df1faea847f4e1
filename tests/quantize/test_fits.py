"""Tables of real functions: their error bounds hold at every real number, and are not merely large."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantize.fits import ACTIVATIONS, SMALL_STEP, fit_decay, fit_piecewise, fit_table, log_step

FRACS = st.integers(0, 8)


def index_of(x: float, frac: int) -> int:
    """What the rounding shift makes of a real number."""
    return math.floor(x * 2.0**frac + 0.5)


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(sorted(ACTIVATIONS)),
    FRACS,
    st.integers(-4, 10),
    st.integers(-300, 100),
    st.integers(1, 400),
    st.floats(0, 1),
    st.sampled_from([7, 127, 2047]),
)
def test_no_real_number_is_further_from_its_entry_than_the_error(
    name: str, index_frac: int, frac: int, low: int, entries: int, place: float, limit: int
) -> None:
    curve = ACTIVATIONS[name]
    fit = fit_table(curve, low, low + entries - 1, index_frac, frac, limit)
    assert fit.high == low + entries - 1 and np.abs(fit.values).max() <= limit
    # The cells of the range, ends included: there the error is largest.
    step = 2.0**-index_frac
    x = (low - 0.5 + place * (entries - 1e-9)) * step
    found = fit.values[index_of(x, index_frac) - low] * 2.0**-frac
    assert abs(found - float(curve.evaluate(np.array([x]))[0])) <= fit.error


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_an_error_is_what_index_and_entry_rounding_cost(name: str) -> None:
    fit = fit_table(ACTIVATIONS[name], -128, 127, 5, 6, 1 << 12)
    steepest = 1.2
    assert 2.0**-7 * 0.5 <= fit.error <= steepest * 2.0**-6 + 2.0**-7 + 1e-9


def test_a_turning_point_inside_a_cell_counts() -> None:
    # One cell, -2 to 0, whose ends both exceed the minimum of silu inside.
    fit = fit_table(ACTIVATIONS["silu"], 0, 0, -1, 8, 127)
    assert fit.error == pytest.approx(float(ACTIVATIONS["silu"].evaluate(np.array([1.0]))[0]), abs=1e-6)
    fit = fit_table(ACTIVATIONS["silu"], -1, -1, -1, 8, 127)
    lowest = float(ACTIVATIONS["silu"].evaluate(np.array([-1.2784645427610738]))[0])
    assert fit.error >= abs(fit.values[0] / 256 - lowest)


def test_saturation_counts_as_error() -> None:
    fit = fit_table(ACTIVATIONS["silu"], 0, 255, 4, 6, 127)
    assert fit.error >= float(ACTIVATIONS["silu"].evaluate(np.array([255.5 / 16]))[0]) - 127 / 64


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(sorted(ACTIVATIONS)),
    FRACS,
    st.integers(-2, 8),
    st.integers(-200, 60),
    st.integers(1, 260),
    st.floats(0, 1),
    st.sampled_from([127, 2047]),
    st.integers(1, 9),
)
def test_lines_are_what_their_table_says_and_no_further_than_its_error(
    name: str, index_frac: int, frac: int, low: int, entries: int, place: float, limit: int, pieces: int
) -> None:
    curve = ACTIVATIONS[name]
    fit = fit_piecewise(curve, low, low + entries - 1, index_frac, frac, limit, pieces)
    assert len(fit.knots) == len(fit.slopes) <= pieces and fit.knots[0] == low
    lines = [
        fit.offset + sum(slope * max(i - knot, 0) for knot, slope in zip(fit.knots, fit.slopes, strict=True))
        for i in range(low, low + entries)
    ]
    rounded = [math.floor(line / 2 ** (fit.slope_frac - frac) + 0.5) for line in lines]
    assert fit.table.values.tolist() == [min(max(value, -limit), limit) for value in rounded]
    x = (low - 0.5 + place * (entries - 1e-9)) * 2.0**-index_frac
    found = fit.table.values[index_of(x, index_frac) - low] * 2.0**-frac
    assert abs(found - float(curve.evaluate(np.array([x]))[0])) <= fit.table.error


def test_more_lines_are_nearer() -> None:
    silu, counts = ACTIVATIONS["silu"], (2, 4, 8, 16)
    errors = [fit_piecewise(silu, -128, 127, 4, 8, 1 << 12, n).table.error for n in counts]
    exact = fit_table(silu, -128, 127, 4, 8, 1 << 12).error
    assert errors == sorted(errors, reverse=True) and errors[0] > 0.1
    assert exact <= errors[-1] < exact + 0.01


@settings(max_examples=100, deadline=None)
@given(st.floats(-60, 20), st.sampled_from([(0.0, 0.0), (0.01, 0.0), (0.0, 0.5), (0.01, 0.5)]))
def test_the_logarithm_of_a_step_is_exact_where_softplus_underflows(
    t: float, limits: tuple[float, float]
) -> None:
    step = math.log1p(math.exp(t)) if t > -30 else math.exp(t)
    low, high = limits
    step = min(max(step, low), high or math.inf)
    assert float(log_step(low, high).evaluate(np.array([t]))[0]) == pytest.approx(math.log(step), abs=1e-9)


@settings(max_examples=150, deadline=None)
@given(
    st.integers(2, 6),
    st.integers(4, 16),
    st.integers(6, 12),
    st.integers(-9, -1),
    st.floats(0, 1),
    st.integers(1, 6),
)
def test_decay_and_gain_stay_within_their_errors(
    index_frac: int, decay_bits: int, gain_bits: int, lowest: int, place: float, span: int
) -> None:
    low = lowest << index_frac
    high = low + (span << index_frac)
    fit = fit_decay(low, high, index_frac, decay_bits, gain_bits)
    one = 1 << decay_bits
    assert fit.decay.min() >= 0 and fit.decay.max() < one
    assert fit.gain.min() >= 0 and fit.gain.max() < 1 << gain_bits
    v = (low - 0.5 + place * (high - low + 1 - 1e-9)) * 2.0**-index_frac
    i = index_of(v, index_frac) - low
    u = math.exp(v)
    assert abs(fit.decay[i] / one - math.exp(-u)) <= fit.decay_error
    entered = (1 - fit.decay[i] / one) * fit.gain[i] * 2.0**-fit.gain_frac
    assert abs(entered - u) <= fit.step_error * max(u, SMALL_STEP)


def test_the_gain_makes_up_for_a_coarse_decay() -> None:
    # u = 2^-7 and 8-bit decays: 1 - a is off by up to a quarter, what enters is not.
    fit = fit_decay(-5 * 64, 0, 6, 8, 10)
    assert fit.step_error < 2.0**-7 + 2.0**-8


def test_an_input_without_a_step_size_gets_one() -> None:
    fit = fit_decay(-40, 20, 3, 12, 14, stepless=True)
    entered = (1 - fit.decay / 4096) * fit.gain * 2.0**-fit.gain_frac
    assert np.abs(entered - 1).max() <= fit.step_error < 0.01
