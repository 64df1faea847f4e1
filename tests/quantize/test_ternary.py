"""Ternary rows: the best there are, and found again where they are already."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantize.matrices import ternary_rows
from quantize.ternary import Ternarization, absmean_ternary, nearest_ternary


def least_error(row: np.ndarray) -> float:
    """Square error of the best of all signs and scales."""
    best = float(np.square(row).sum())
    for signs in product((-1, 0, 1), repeat=len(row)):
        t = np.array(signs)
        if t.any():
            scale = max(float(row @ t) / float(t @ t), 0.0)
            best = min(best, float(np.square(row - scale * t).sum()))
    return best


@given(st.lists(st.floats(-8, 8), min_size=1, max_size=6))
@settings(max_examples=40, deadline=None)
def test_no_signs_and_scale_are_nearer(values: list[float]) -> None:
    row = np.array(values)
    signs, scale = nearest_ternary(torch.from_numpy(row)[None])
    assert set(signs.unique().tolist()) <= {-1.0, 0.0, 1.0} and scale.item() >= 0
    found = float(np.square(row - scale.item() * signs[0].numpy()).sum())
    assert found <= least_error(row) * (1 + 1e-9) + 1e-12


@pytest.mark.parametrize("rule", [nearest_ternary, absmean_ternary])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ternary_rows_are_found_as_they_are(
    rule: Callable[[Tensor], tuple[Tensor, Tensor]], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    signs = torch.randint(-1, 2, (40, 700)).to(dtype)
    signs[0], signs[1, 1:] = 0, 0
    signs[1, 0] = -1
    scale = torch.rand(40, 1, dtype=dtype) + 0.01
    found, found_scale = rule(signs * scale)
    assert torch.equal(found, signs)
    torch.testing.assert_close(found_scale[1:], scale[1:])
    assert found_scale[0] == 0


def test_scales_of_very_different_rows_are_a_factor_of_few_bits() -> None:
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(30, 50)) * np.exp2(-rng.uniform(0, 5, (30, 1)))
    signs, scale = (tensor.numpy() for tensor in nearest_ternary(torch.from_numpy(weight)))
    forms = list(ternary_rows(weight))
    rows = forms[0]
    np.testing.assert_array_equal(rows.integers, signs)
    assert rows.factors.min() >= 1 and rows.factors.max() < 1 << 10
    np.testing.assert_allclose(rows.units, scale[:, 0], rtol=2**-4)
    for bits, narrower in zip(range(10, 0, -1), forms, strict=True):
        np.testing.assert_array_equal(narrower.integers, signs)
        assert 1 << (bits - 1) <= narrower.factors.max() < 1 << bits


def test_the_gradient_passes_through_to_the_latent_weight() -> None:
    weight = torch.randn(4, 9, requires_grad=True)
    grad = torch.randn(4, 9)
    Ternarization()(weight).backward(grad)
    assert weight.grad is not None and torch.equal(weight.grad, grad)
