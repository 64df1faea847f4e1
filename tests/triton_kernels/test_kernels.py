"""Single kernels at the ends of their ranges, against the operations of the integer graph."""

from __future__ import annotations

import itertools
from math import isqrt

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mamba_int.graph import Node
from mamba_int.model import quantize_parameter
from mamba_int.operations import OPERATIONS
from mamba_int.operations.base import rounding_shift
from mamba_int.operations.norm import Norm
from triton_kernels.conv import Activation, conv_requantize
from triton_kernels.linear import Rounding, linear_requantize, linear_residual, wide_linear
from triton_kernels.norm import Ladder, norm_requantize
from triton_kernels.packed_ternary import pack_ternary, ternary_gemv
from triton_kernels.quantize_parameter import quantize_parameter_fused
from triton_kernels.squareplus import squareplus
from triton_kernels.ternarize import ternarize
from triton_kernels.ternarize_rows import ternarize_rows

few = settings(max_examples=8, deadline=None)


def integers(low: int, high: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(low, high + 1, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("sign", [-1, 1])
def test_the_largest_sums_are_exact(sign: int) -> None:
    """127 x 127 x 1,000 terms is 2^23.9; the odd last column would be lost in 24 bits of a rounding sum."""
    x = torch.full((3, 1000), 127.0)
    weight = torch.full((5, 1000), 127.0) * sign
    weight[:, -1] -= sign
    expected = (x.long() @ weight.long().T).float()
    assert torch.equal(wide_linear(x, weight, None), expected)
    (y,) = linear_requantize(x, weight, None, [Rounding(0, 5, 17, -128, 128)])
    assert torch.equal(
        y.long(), torch.from_numpy(rounding_shift(expected.long().numpy(), 17)).clamp(-128, 128)
    )


@few
@given(
    rows=st.integers(1, 70),
    inner=st.integers(1, 90),
    widths=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    places=st.integers(-1, 6),
    seed=st.integers(0, 99),
)
def test_every_range_of_columns_gets_its_own_rounding(
    rows: int, inner: int, widths: list[int], places: int, seed: int
) -> None:
    x, weight = (
        integers(-127, 127, rows, inner, seed=seed),
        integers(-1, 1, sum(widths), inner, seed=seed + 1),
    )
    bias = integers(-500, 500, sum(widths), seed=seed + 2)
    ends = np.cumsum([0, *widths]).tolist()
    roundings = [
        Rounding(a, b, places + i, -20 * i, 100 + i) for i, (a, b) in enumerate(itertools.pairwise(ends))
    ]
    parts = linear_requantize(x.float(), weight.float(), bias.float(), roundings)
    total = (x @ weight.T + bias).numpy()
    for r, part in zip(roundings, parts, strict=True):
        expected = np.clip(rounding_shift(total[:, r.start : r.stop], r.places), r.low, r.high)
        assert np.array_equal(part.numpy(), expected)


def test_the_residual_is_added_after_the_shift_and_before_the_clamp() -> None:
    x, weight = integers(-127, 127, 9, 33), integers(-1, 1, 6, 33, seed=1)
    residual = integers(-(1 << 15), 1 << 15, 9, 6, seed=2)
    y = linear_residual(x.float(), weight.float(), None, residual.float(), 3, -32767, 32767)
    expected = np.clip(rounding_shift((x @ weight.T).numpy(), 3) + residual.numpy(), -32767, 32767)
    assert np.array_equal(y.numpy(), expected)


@few
@given(
    d=st.integers(1, 40),
    scale=st.integers(0, 15),
    per_octave=st.sampled_from([1, 2]),
    seed=st.integers(0, 99),
)
def test_every_step_of_the_ladder_is_found(d: int, scale: int, per_octave: int, seed: int) -> None:
    attributes = {"input_shift": 2, "input_limit": 511, "octaves": 10, "per_octave": per_octave}
    node = Node("norm", "norm", ("x",), attributes, {}, 5)
    x = integers(-(1 << scale), 1 << scale, 2, 3, d, seed=seed)
    ladder = Ladder(
        2, 511, tuple(Norm.thresholds(node, d)), tuple(Norm.multipliers(node)), Norm.places(node), -127, 127
    )
    expected = OPERATIONS["norm"].evaluate(node, [x.numpy()], lambda *_: None).clip(-127, 127)
    assert np.array_equal(norm_requantize(x.float(), ladder).numpy(), expected)


@few
@given(length=st.integers(1, 20), width=st.integers(1, 4), squareplus=st.booleans(), seed=st.integers(0, 99))
def test_a_convolution_sees_no_step_before_the_first_and_none_of_its_neighbours(
    length: int, width: int, squareplus: bool, seed: int
) -> None:
    x, taps = integers(-127, 127, 2, length, 5, seed=seed), integers(-127, 127, 5, width, seed=seed + 1)
    node = Node("conv", "conv", ("x",), {}, {"taps": taps.numpy()})
    sums = OPERATIONS["conv"].evaluate(node, [x.numpy()], lambda *_: None)
    expected = np.clip(rounding_shift(sums, 7), -127, 127)
    if squareplus:
        root = np.floor(np.sqrt(expected**2 + 4 * 4**3)).astype(np.int64)
        expected = np.clip(rounding_shift(expected + root, 1), -127, 127)
    y = conv_requantize(x.float(), taps.float(), None, Activation(7, -127, 127, False, squareplus, 3))
    assert np.array_equal(y.numpy(), expected)


@pytest.mark.parametrize("frac", [0, 3, 13])
def test_squareplus_is_right_where_a_float_root_is_one_off(frac: int) -> None:
    """Every argument: squares next to a perfect square are where float32 roots round across an integer."""
    top = (1 << 15) - (2 << frac) - 1
    x = torch.arange(-top, top + 1, dtype=torch.int32)
    four = 4 << 2 * frac
    wide = x.numpy().astype(object)
    expected = [(v + isqrt(v * v + four) + 1) >> 1 for v in wide.tolist()]
    assert squareplus(x, frac).tolist() == expected


@few
@given(rows=st.integers(1, 40), columns=st.integers(1, 600), seed=st.integers(0, 99))
def test_packed_rows_do_not_carry_into_each_other(rows: int, columns: int, seed: int) -> None:
    weight = integers(-1, 1, rows, columns, seed=seed)
    x = integers(-128, 127, columns, seed=seed + 1)
    y = ternary_gemv(pack_ternary(weight), x.to(torch.int8))
    assert torch.equal(y.long(), weight @ x)


@pytest.mark.parametrize("sign", [-1, 1])
def test_the_longest_packed_row_of_extremes_does_not_overflow(sign: int) -> None:
    weight = torch.full((3, 1 << 16), sign)
    weight[1] = -sign
    x = torch.full((1 << 16,), 127 if sign > 0 else -128)
    assert torch.equal(ternary_gemv(pack_ternary(weight), x.to(torch.int8)).long(), weight @ x)


def test_a_matrix_that_is_not_ternary_is_not_packed() -> None:
    for wrong in (torch.tensor([[2]]), torch.tensor([[0.5]])):
        with pytest.raises(ValueError, match="not ternary"):
            pack_ternary(wrong)


def test_a_vector_of_another_type_or_length_is_refused() -> None:
    packed = pack_ternary(torch.ones(4, 8))
    for wrong in (torch.zeros(8), torch.zeros(7, dtype=torch.int8)):
        with pytest.raises(ValueError, match="must be int8"):
            ternary_gemv(packed, wrong)


def test_a_parameter_beyond_its_limit_comes_back_and_goes_no_further() -> None:
    real = torch.tensor([-9.0, -2.0, -1.98, 0.0, 0.49, 1.5, 1.98, 2.0, 7.0])
    for sign in (-1.0, 1.0):
        ours, theirs = real.clone().requires_grad_(), real.clone().requires_grad_()
        y, expected = quantize_parameter_fused(ours, 6, 127), quantize_parameter(theirs, 6, 127)
        assert torch.equal(y, expected)
        gradient = sign * torch.arange(1.0, 10.0)
        y.backward(gradient)
        expected.backward(gradient)
        assert ours.grad is not None and theirs.grad is not None
        assert torch.equal(ours.grad, theirs.grad) and 0 < int((ours.grad == 0).sum()) < 9


def test_a_row_of_zeros_stays_zero_and_gradients_pass_unrounded() -> None:
    weight = torch.randn(7, 33, generator=torch.Generator().manual_seed(0))
    weight[3] = 0
    ours, theirs = weight.clone().requires_grad_(), weight.clone().requires_grad_()
    y, expected = ternarize_rows(ours, 3), ternarize(theirs, 3)
    assert torch.equal(y, expected) and not y[3].any()
    gradient = torch.randn(7, 33, generator=torch.Generator().manual_seed(1))
    y.backward(gradient)
    expected.backward(gradient)
    assert ours.grad is not None and theirs.grad is not None
    assert torch.equal(ours.grad, theirs.grad)
