"""Reconstruction: nearer outputs than rounding gives, by the update that the paper states."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantize.matrices import IntegerRows, int8_rows, ternary_rows
from quantize.reconstruction import DAMPING, output_error, reconstruct, reconstruct_ternary
from quantize.scales import FloatArray


def ill_conditioned(seed: int, samples: int = 40, inputs: int = 24) -> tuple[FloatArray, FloatArray]:
    """A matrix, and the covariance of inputs that mostly move together, one of them not at all."""
    rng = np.random.default_rng(seed)
    factors = rng.normal(size=(samples, 4)) @ rng.normal(size=(4, inputs))
    x = factors + 0.05 * rng.normal(size=(samples, inputs))
    x[:, rng.integers(inputs)] = 0.0
    return rng.normal(size=(9, inputs)), np.cov(x, rowvar=False, bias=True)


def error(weight: FloatArray, rows: IntegerRows, covariance: FloatArray) -> FloatArray:
    return output_error(weight, rows.reals, covariance)


@given(st.integers(0, 10**6), st.integers(1, 60))
@settings(max_examples=25, deadline=None)
def test_no_row_is_farther_than_by_rounding(seed: int, samples: int) -> None:
    weight, covariance = ill_conditioned(seed, samples)
    for limit in (1, 7, 127):
        units = np.abs(weight).max(1) / limit
        rounded = np.clip(np.floor(weight / units[:, None] + 0.5), -limit, limit).astype(np.int64)
        found = reconstruct(weight, units, limit, covariance)
        assert np.abs(found).max() <= limit
        plain = output_error(weight, units[:, None] * rounded, covariance)
        assert (output_error(weight, units[:, None] * found, covariance) <= plain).all()


@pytest.mark.parametrize("seed", range(3))
def test_inputs_that_move_together_leave_much_to_make_up_for(seed: int) -> None:
    weight, covariance = ill_conditioned(seed)
    int8, ternary = next(int8_rows(weight, 127, 4)), next(ternary_rows(weight))
    assert (
        error(weight, next(int8_rows(weight, 127, 4, covariance)), covariance).sum()
        < error(weight, int8, covariance).sum() / 2
    )
    assert (
        error(weight, next(ternary_rows(weight, covariance)), covariance).sum()
        < error(weight, ternary, covariance).sum() / 2
    )


@pytest.mark.parametrize("block", [1, 7, 128])
def test_the_columns_are_made_up_for_as_in_the_paper(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr("quantize.reconstruction.BLOCK", block)
    weight, covariance = ill_conditioned(5)
    units = np.full(len(weight), 0.4)
    order = list(np.argsort(-np.diag(covariance), kind="stable"))
    damped = covariance + DAMPING * np.diag(covariance).mean() * np.eye(len(covariance))
    # Equations 2 and 3: the inverse for the columns that are left, computed anew for every column.
    left, expected = weight.copy(), np.zeros_like(weight)
    for i, column in enumerate(order):
        rest = order[i:]
        inverse = np.linalg.inv(damped[np.ix_(rest, rest)])
        expected[:, column] = np.clip(np.floor(left[:, column] / 0.4 + 0.5), -3, 3)
        lost = (left[:, column] - 0.4 * expected[:, column]) / inverse[0, 0]
        left[:, rest] -= lost[:, None] * inverse[0]
    plain = np.clip(np.floor(weight / 0.4 + 0.5), -3, 3)
    better = output_error(weight, 0.4 * expected, covariance) < output_error(weight, 0.4 * plain, covariance)
    found = reconstruct(weight, units, 3, covariance)
    np.testing.assert_array_equal(found, np.where(better[:, None], expected, plain))
    assert better.any()


def test_rows_that_are_ternary_already_stay() -> None:
    weight, covariance = ill_conditioned(2)
    signs = np.sign(np.where(np.abs(weight) > 0.5, weight, 0)).astype(np.int64)
    scale = np.linspace(0.1, 2, len(signs))
    found, units = reconstruct_ternary(scale[:, None] * signs, covariance)
    np.testing.assert_array_equal(found, signs)
    np.testing.assert_allclose(units, scale)


def test_inputs_that_never_move_are_rounded() -> None:
    weight, covariance = ill_conditioned(3)
    still = np.zeros_like(covariance)
    np.testing.assert_array_equal(
        next(int8_rows(weight, 127, 4, still)).integers, next(int8_rows(weight, 127, 4)).integers
    )
    np.testing.assert_array_equal(
        next(ternary_rows(weight, still)).integers, next(ternary_rows(weight)).integers
    )
