"""What surrounds the float scans in a block: kernels against their definitions in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.triton_kernels.float_scans import Random, assert_close, errors
from triton_kernels.causal_conv1d import causal_conv1d, causal_conv1d_reference
from triton_kernels.cross_entropy import IGNORED_LABEL, cross_entropy, cross_entropy_reference
from triton_kernels.rms_norm import (
    add_rms_norm,
    add_rms_norm_reference,
    gated_rms_norm,
    gated_rms_norm_reference,
)

ACTIVATIONS = ("silu", "gelu", "relu", "identity", "squareplus", "algebraic_sigmoid")


def paired(operation: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    """With a second output, as the scans have, of which no gradient is asked."""

    def run(**operands: Any) -> tuple[Tensor, Tensor]:
        y = operation(**operands)
        return y, y.detach()

    return run


def conv_errors(
    length: int,
    channels: int,
    taps: int,
    bias: bool,
    activation: str,
    dtype: torch.dtype,
    device: str = "cpu",
) -> dict[str, float]:
    random = Random(length, device)
    operands: dict[str, Any] = {
        "x": random(2, length, channels, dtype=dtype),
        "weight": random(channels, taps),
        "bias": random(channels) if bias else None,
        "activation": activation,
    }
    gradient = random(2, length, channels, dtype=dtype)
    return errors(paired(causal_conv1d), paired(causal_conv1d_reference), operands, (gradient, None))


@settings(max_examples=12, deadline=None)
@given(
    length=st.sampled_from([1, 2, 3, 31, 32, 33, 67]),
    channels=st.sampled_from([1, 5, 65]),
    taps=st.integers(1, 4),
    bias=st.booleans(),
    activation=st.sampled_from(ACTIVATIONS),
)
def test_the_convolution_is_wrong_at_an_odd_shape_or_a_tile_bound(
    length: int, channels: int, taps: int, bias: bool, activation: str
) -> None:
    assert_close(conv_errors(length, channels, taps, bias, activation, torch.float32), 3e-6)


def test_the_convolution_reads_slices_with_the_wrong_strides() -> None:
    packed = Random(0)(2, 19, 24)
    x, weight = packed[..., 4:20], Random(1)(16, 4)
    assert torch.equal(causal_conv1d(x, weight), causal_conv1d(x.contiguous(), weight))


def add_norm_errors(
    rows: int, width: int, residual: bool, which: int, dtype: torch.dtype, device: str = "cpu"
) -> dict[str, float]:
    """``which``: gradients of the norm alone, of the sum alone, or of both."""
    random = Random(rows, device)
    operands: dict[str, Any] = {
        "x": random(rows, width, dtype=dtype),
        "weight": random(width),
        "residual": random(rows, width) if residual else None,
    }
    dy, dsum = random(rows, width, dtype=dtype), random(rows, width)
    gradients = (None if which == 1 else dy, None if which == 0 else dsum)
    return errors(add_rms_norm, add_rms_norm_reference, operands, gradients)


@settings(max_examples=12, deadline=None)
@given(
    rows=st.sampled_from([1, 3, 70]),
    width=st.sampled_from([3, 24, 64, 130]),
    residual=st.booleans(),
    which=st.sampled_from([0, 1, 2]),
)
def test_padding_or_a_missing_gradient_enters_the_norm(
    rows: int, width: int, residual: bool, which: int
) -> None:
    assert_close(add_norm_errors(rows, width, residual, which, torch.float32), 3e-6)


def test_the_residual_stream_is_rounded_to_half_precision() -> None:
    x, residual = Random(0)(3, 8, dtype=torch.float16), Random(1)(3, 8) * 1000
    y, total = add_rms_norm(x, torch.ones(8), residual)
    assert y.dtype == torch.float16
    assert total.dtype == torch.float32
    assert torch.equal(total, x.float() + residual)


def gated_errors(
    rows: int, width: int, groups: int, activation: str, dtype: torch.dtype, device: str = "cpu"
) -> dict[str, float]:
    random = Random(rows, device)
    operands: dict[str, Any] = {
        "x": random(rows, width * groups, dtype=dtype),
        "z": random(rows, width * groups, dtype=dtype),
        "weight": random(width * groups),
        "groups": groups,
        "activation": activation,
    }
    gradient = random(rows, width * groups, dtype=dtype)
    return errors(paired(gated_rms_norm), paired(gated_rms_norm_reference), operands, (gradient, None))


@settings(max_examples=12, deadline=None)
@given(
    rows=st.sampled_from([1, 3, 70]),
    width=st.sampled_from([8, 24, 130]),
    groups=st.sampled_from([1, 3]),
    activation=st.sampled_from(ACTIVATIONS),
)
def test_groups_or_gates_are_mixed_up_in_the_gated_norm(
    rows: int, width: int, groups: int, activation: str
) -> None:
    assert_close(gated_errors(rows, width, groups, activation, torch.float32), 1e-5)


def loss_errors(rows: int, classes: int, dtype: torch.dtype, device: str = "cpu") -> dict[str, float]:
    """Logits are a slice of longer rows, as where a vocabulary is padded; some targets are not counted."""
    random = Random(rows, device)
    targets = torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(rows)).to(device)
    targets[1::3] = IGNORED_LABEL

    def over(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
        return paired(lambda padded: loss(padded[:, :classes], targets))

    operands = {"padded": random(rows, classes + 3, dtype=dtype) * 10}
    gradient = torch.tensor(3.0, device=device)
    return errors(over(cross_entropy), over(cross_entropy_reference), operands, (gradient, None))


@pytest.mark.parametrize(("rows", "classes"), [(1, 1), (7, 5), (4, 2048), (5, 4101)])
def test_the_loss_is_wrong_at_the_bounds_of_blocks_or_counts_ignored_rows(rows: int, classes: int) -> None:
    assert_close(loss_errors(rows, classes, torch.float32), 1e-5)


def test_the_loss_overflows() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0], [-3e4, -3e4, -3e4]])
    assert cross_entropy(logits, torch.tensor([1, 2])) == pytest.approx((2e4 + 1.0986123) / 2)


def test_a_target_that_is_no_class_reads_foreign_memory() -> None:
    assert torch.isnan(cross_entropy(torch.zeros(2, 3), torch.tensor([0, 3])))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: causal_conv1d(torch.zeros(1, 2, 3), torch.zeros(3, 5)), "K from 1 to 4"),
        (lambda: causal_conv1d(torch.zeros(2, 3), torch.zeros(3, 4)), r"give it as \[batch, T, D\]"),
        (lambda: add_rms_norm(torch.zeros(2, 3), torch.zeros(4)), "weight has shape"),
        (lambda: gated_rms_norm(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(3), groups=2), "divisor"),
    ],
)
def test_operands_that_do_not_fit_are_taken(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_compiled_kernels_differ_from_float64(dtype: torch.dtype, bound: float, activation: str) -> None:
    assert_close(conv_errors(1000, 768, 4, True, activation, dtype, "cuda"), bound)
    assert_close(gated_errors(500, 1536, 2, activation, dtype, "cuda"), bound)
    assert_close(add_norm_errors(2000, 768, True, 2, dtype, "cuda"), bound)
    assert_close(loss_errors(500, 10000, dtype, "cuda"), bound)
