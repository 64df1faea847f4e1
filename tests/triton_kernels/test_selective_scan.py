"""Mamba-1's selective scan: kernels against the recurrence in float64, the recurrence against Mamba-2's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.triton_kernels.float_scans import Operands, Random, assert_close, errors
from triton_kernels.selective_scan import selective_scan, selective_scan_reference
from triton_kernels.state_space_duality import state_space_duality_reference


def operands(
    batch: int,
    length: int,
    channels: int,
    d_state: int,
    dtype: torch.dtype = torch.float32,
    softplus: bool = True,
    optional: bool = True,
    seed: int = 0,
    device: str = "cpu",
) -> tuple[Operands, tuple[Tensor, Tensor]]:
    """Operands and gradients of output and final state."""
    random = Random(seed, device)
    delta = random(batch, length, channels, dtype=dtype) - 1.0
    values: dict[str, Any] = {
        "u": random(batch, length, channels, dtype=dtype),
        "delta": delta if softplus else delta.exp() * 0.2,
        "A": -random(channels, d_state).exp(),
        "B": random(batch, length, d_state, dtype=dtype),
        "C": random(batch, length, d_state, dtype=dtype),
        "delta_softplus": softplus,
    }
    if optional:
        values |= {
            "D": random(channels),
            "z": random(batch, length, channels, dtype=dtype),
            # without softplus nothing else keeps step sizes positive
            "delta_bias": random(channels) if softplus else random(channels).abs() * 0.1,
            "initial_state": random(batch, channels, d_state),
        }
    return values, (random(batch, length, channels, dtype=dtype), random(batch, channels, d_state))


def compare(values: Operands, gradients: tuple[Tensor | None, ...]) -> dict[str, float]:
    return errors(selective_scan, selective_scan_reference, values, gradients)


@settings(max_examples=5, deadline=None)
@given(
    length=st.sampled_from([1, 2, 15, 16, 17, 33]),
    channels=st.sampled_from([1, 3, 33]),
    d_state=st.integers(1, 3),
    softplus=st.booleans(),
    optional=st.booleans(),
)
def test_an_odd_shape_or_a_chunk_bound_is_scanned_wrongly(
    length: int, channels: int, d_state: int, softplus: bool, optional: bool
) -> None:
    values, gradients = operands(
        1, length, channels, d_state, softplus=softplus, optional=optional, seed=length
    )
    assert_close(compare(values, gradients), 1e-5)


def test_half_precision_is_summed_in_half_precision() -> None:
    values, gradients = operands(2, 20, 5, 2, torch.float16)
    assert_close(compare(values, gradients), 2e-3)


@pytest.mark.parametrize("which", [0, 1])
def test_a_missing_gradient_of_output_or_state_is_taken_for_garbage(which: int) -> None:
    values, gradients = operands(1, 18, 3, 2)
    assert_close(compare(values, (gradients[0], None) if which else (None, gradients[1])), 1e-5)


def test_a_decay_that_underflows_makes_a_nan() -> None:
    values, gradients = operands(1, 33, 2, 2, softplus=False)
    values["A"] = torch.tensor([[-1e4, -1e-6], [-1.0, -1e5]])
    values["delta"][:, ::7] = 30.0
    assert_close(compare(values, gradients), 1e-4)


def test_slices_are_read_with_the_wrong_strides() -> None:
    values, _ = operands(2, 18, 4, 2)
    packed = Random(1)(2, 18, 12)
    sliced = values | dict(zip(("u", "z", "delta"), packed.chunk(3, -1), strict=True))
    dense = values | {name: sliced[name].contiguous() for name in ("u", "z", "delta")}
    for result, expected in zip(selective_scan(**sliced), selective_scan(**dense), strict=True):
        assert torch.equal(result, expected)


def test_a_sequence_cut_in_two_ends_in_another_state() -> None:
    values, _ = operands(1, 37, 3, 2)
    y, state = selective_scan(**values)
    times = ("u", "delta", "B", "C", "z")
    head = values | {name: values[name][:, :19] for name in times}
    tail = values | {name: values[name][:, 19:] for name in times}
    y_head, between = selective_scan(**head)
    y_tail, end = selective_scan(**(tail | {"initial_state": between}))
    assert torch.allclose(torch.cat([y_head, y_tail], 1), y, atol=1e-5)
    assert torch.allclose(end, state, atol=1e-5)


def test_the_reference_departs_from_the_scan_of_mamba_2_where_both_are_defined() -> None:
    """With one rate for all states of a channel, every channel is a head of one row."""
    values, _ = operands(2, 7, 3, 4, torch.float64)
    values["A"] = values["A"][:, :1].expand(3, 4)
    gated, state = selective_scan_reference(**values)
    y, other = state_space_duality_reference(
        values["u"][..., None],
        values["delta"],
        values["A"][:, 0],
        values["B"][:, :, None],
        values["C"][:, :, None],
        values["D"],
        values["delta_bias"],
        True,
        values["initial_state"][:, :, None],
    )
    assert torch.allclose(gated, y[..., 0] * torch.nn.functional.silu(values["z"]))
    assert torch.allclose(state, other[:, :, 0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"B": torch.zeros(1, 5, 3)}, r"B has shape \(1, 5, 3\); give it as \(1, 5, 4\)"),
        ({"z": torch.zeros(1, 4, 2)}, "z has shape"),
        ({"A": torch.zeros(2)}, r"give \[batch, L, D\] and \[D, N\]"),
        ({"C": torch.zeros(1, 5, 4, dtype=torch.float16)}, "convert them to one"),
    ],
)
def test_operands_that_do_not_fit_are_scanned_anyway(change: Operands, message: str) -> None:
    values, _ = operands(1, 5, 2, 4)
    with pytest.raises(ValueError, match=message):
        selective_scan(**(values | change))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-4), (torch.float16, 3e-3), (torch.bfloat16, 2e-2)]
)
@pytest.mark.parametrize("shape", [(2, 257, 96, 16), (1, 1000, 33, 5), (3, 100, 512, 64)])
def test_the_compiled_kernels_differ_from_the_reference(
    dtype: torch.dtype, bound: float, shape: tuple[int, ...]
) -> None:
    values, gradients = operands(*shape, dtype=dtype, device="cuda")
    assert_close(compare(values, gradients), bound)
