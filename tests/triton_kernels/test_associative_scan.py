"""The first-order recurrence: kernels against the loop in float64, real and complex."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.triton_kernels.float_scans import Operands, Random, assert_close, errors
from triton_kernels.associative_scan import associative_scan, associative_scan_reference


def operands(
    batch: int,
    length: int,
    channels: int,
    dtype: torch.dtype = torch.float32,
    initial: bool = True,
    seed: int = 0,
    device: str = "cpu",
) -> tuple[Operands, tuple[Tensor, Tensor]]:
    """Operands and gradients of states and final state."""
    random = Random(seed, device)
    a, b = random(batch, length, channels, dtype=dtype) * 0.6, random(batch, length, channels, dtype=dtype)
    wide = torch.promote_types(dtype, torch.float32)
    values = {"a": a, "b": b}
    if initial:
        values["initial_state"] = random(batch, channels, dtype=wide)
    return values, (random(batch, length, channels, dtype=dtype), random(batch, channels, dtype=wide))


def compare(values: Operands, gradients: tuple[Tensor | None, ...]) -> dict[str, float]:
    return errors(associative_scan, associative_scan_reference, values, gradients)


@settings(max_examples=8, deadline=None)
@given(
    length=st.sampled_from([1, 2, 63, 64, 65, 130]),
    channels=st.sampled_from([1, 5, 17]),
    dtype=st.sampled_from([torch.float32, torch.complex64]),
    initial=st.booleans(),
)
def test_an_odd_shape_or_a_block_bound_is_scanned_wrongly(
    length: int, channels: int, dtype: torch.dtype, initial: bool
) -> None:
    values, gradients = operands(2, length, channels, dtype, initial, seed=length)
    assert_close(compare(values, gradients), 1e-5)


def test_half_precision_is_carried_in_half_precision() -> None:
    values, gradients = operands(1, 70, 3, torch.float16)
    assert_close(compare(values, gradients), 2e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
@pytest.mark.parametrize("which", [0, 1])
def test_a_missing_gradient_of_states_or_final_state_is_taken_for_garbage(
    which: int, dtype: torch.dtype
) -> None:
    values, gradients = operands(1, 9, 3, dtype)
    assert_close(compare(values, (gradients[0], None) if which else (None, gradients[1])), 1e-5)


def test_a_decay_of_zero_is_divided_by() -> None:
    values, gradients = operands(1, 66, 3)
    values["a"][:, ::5] = 0.0
    assert_close(compare(values, gradients), 1e-5)


def test_a_conjugated_view_is_read_without_its_conjugation() -> None:
    values, _ = operands(1, 9, 3, torch.complex64)
    views = values | {"a": values["a"].conj()}
    copies = values | {"a": values["a"].conj().resolve_conj()}
    assert torch.equal(associative_scan(**views)[0], associative_scan(**copies)[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"b": torch.zeros(1, 4, 3)}, "b has shape"),
        ({"b": torch.zeros(1, 5, 3, dtype=torch.float16)}, "convert them to one"),
        ({"initial_state": torch.zeros(1, 3, dtype=torch.complex64)}, "make both real or both complex"),
        ({"a": torch.zeros(5, 3)}, "give it as"),
    ],
)
def test_operands_that_do_not_fit_are_scanned_anyway(change: Operands, message: str) -> None:
    values, _ = operands(1, 5, 3)
    with pytest.raises(ValueError, match=message):
        associative_scan(**(values | change))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "bound"),
    [(torch.float32, 1e-5), (torch.complex64, 1e-5), (torch.float16, 3e-3), (torch.bfloat16, 2e-2)],
)
@pytest.mark.parametrize("shape", [(2, 257, 96), (1, 2000, 33)])
def test_the_compiled_kernels_differ_from_the_reference(
    dtype: torch.dtype, bound: float, shape: tuple[int, ...]
) -> None:
    values, gradients = operands(*shape, dtype=dtype, device="cuda")
    assert_close(compare(values, gradients), bound)
