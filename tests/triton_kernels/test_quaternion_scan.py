"""The quaternion recurrence and the scan with read-out: kernels against the definitions in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.triton_kernels.float_scans import Operands, Random, assert_close, errors
from triton_kernels import quaternion_recurrence as recurrence_module
from triton_kernels import quaternion_scan as scan_module
from triton_kernels.quaternion import cayley_reference, quaternion_product
from triton_kernels.quaternion_recurrence import (
    quaternion_cumulative_product,
    quaternion_recurrence,
    quaternion_recurrence_reference,
)
from triton_kernels.quaternion_scan import quaternion_scan, quaternion_scan_reference


@pytest.fixture(autouse=True)
def small_blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter composes the elements of a block one by one; so many bounds are also met sooner."""
    if request.node.get_closest_marker("gpu") is None:
        monkeypatch.setattr(recurrence_module, "CHANNELS", 4)
        monkeypatch.setattr(recurrence_module, "STEPS", 4)
        monkeypatch.setattr(scan_module, "CHUNK", 16)


def factors(random: Random, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """q of length below one, about a different axis at every step."""
    z = random(*shape, 4)
    z[..., 0] = -z[..., 0].abs() * 0.2
    return cayley_reference(z).to(dtype)


def recurrence_operands(
    batch: int, length: int, channels: int, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Operands, tuple[Tensor, Tensor]]:
    random = Random(length, device)
    values = {
        "q": factors(random, batch, length, channels, dtype=dtype),
        "u": random(batch, length, channels, 4, dtype=dtype),
        "initial_state": random(batch, channels, 4),
    }
    return values, (random(batch, length, channels, 4, dtype=dtype), random(batch, channels, 4))


def scan_operands(
    batch: int,
    length: int,
    groups: int,
    channels: int,
    states: int,
    dtype: torch.dtype = torch.float32,
    optional: bool = True,
    device: str = "cpu",
) -> tuple[Operands, tuple[Tensor, Tensor]]:
    random = Random(length, device)
    values: Operands = {
        "S": random(batch, length, groups, channels, dtype=dtype),
        "q": factors(random, batch, length, groups, states),
        "B": random(batch, length, groups, states, 4, dtype=dtype),
        "C": random(batch, length, groups, states, 4, dtype=dtype),
    }
    if optional:
        values["D"] = random(groups, channels)
        values["initial_state"] = random(batch, groups, channels, states, 4)
    gradients = (
        random(batch, length, groups, channels, 4, dtype=dtype),
        random(batch, groups, channels, states, 4),
    )
    return values, gradients


def compare_recurrence(values: Operands, gradients: tuple[Tensor | None, ...]) -> dict[str, float]:
    return errors(quaternion_recurrence, quaternion_recurrence_reference, values, gradients)


def compare_scan(values: Operands, gradients: tuple[Tensor | None, ...]) -> dict[str, float]:
    return errors(quaternion_scan, quaternion_scan_reference, values, gradients)


# -- the recurrence -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 1, 3), (1, 4, 4), (2, 19, 5), (1, 66, 2)])
def test_an_odd_shape_or_a_segment_bound_is_scanned_wrongly(shape: tuple[int, int, int]) -> None:
    values, gradients = recurrence_operands(*shape)
    assert_close(compare_recurrence(values, gradients), 1e-5)


def test_segments_see_another_state_than_one_long_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    values, gradients = recurrence_operands(1, 25, 3)
    monkeypatch.setattr(recurrence_module, "SEGMENT", 7)
    assert_close(compare_recurrence(values, gradients), 1e-5)
    short = {name: v for name, v in values.items() if name != "initial_state"}
    assert_close(compare_recurrence(short, (gradients[0], None)), 1e-5)
    assert_close(compare_recurrence(short, (None, gradients[1])), 1e-5)


def test_a_cumulative_product_is_taken_in_the_wrong_order() -> None:
    q = factors(Random(0), 2, 7, 3)
    q.requires_grad_()
    found = quaternion_cumulative_product(q)
    product = q[:, 0]
    for t in range(1, 7):
        product = quaternion_product(q[:, t], product)
        assert torch.allclose(found[:, t], product, atol=1e-6)
    other = quaternion_cumulative_product(q.flip(1))[:, -1]
    assert not torch.allclose(found[:, -1], other, atol=1e-2)
    found.sum().backward()
    assert q.grad is not None and bool(torch.isfinite(q.grad).all())


def test_a_rotation_drifts_off_length_one() -> None:
    z = Random(1)(1, 100, 1, 4)
    z[..., 0] = 0.0
    norms = quaternion_cumulative_product(cayley_reference(z))[:, -1].norm(dim=-1)
    assert torch.allclose(norms, torch.ones_like(norms), atol=2e-6)


# -- the scan with read-out ---------------------------------------------------------------------------------


@settings(max_examples=4, deadline=None)
@given(
    length=st.sampled_from([1, 2, 15, 17, 33]),
    groups=st.integers(1, 2),
    channels=st.sampled_from([1, 5]),
    states=st.sampled_from([1, 3, 17]),
    optional=st.booleans(),
)
def test_an_odd_shape_is_scanned_wrongly(
    length: int, groups: int, channels: int, states: int, optional: bool
) -> None:
    values, gradients = scan_operands(1, length, groups, channels, states, optional=optional)
    assert_close(compare_scan(values, gradients), 1e-5)


def test_levels_of_a_whole_chunk_or_the_state_after_it_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan_module, "CHUNK", 64)
    values, gradients = scan_operands(1, 67, 1, 3, 2)
    assert_close(compare_scan(values, gradients), 1e-5)


def test_padded_sequences_mix_in_the_skip() -> None:
    values, gradients = scan_operands(2, 3, 2, 4, 2)
    assert_close(compare_scan(values, (gradients[0], None)), 1e-5)


def test_half_precision_is_summed_in_half_precision() -> None:
    values, gradients = scan_operands(1, 20, 1, 6, 5, torch.float16)
    assert_close(compare_scan(values, gradients), 8e-3)


@pytest.mark.parametrize("which", [0, 1])
def test_a_missing_gradient_is_taken_for_garbage(which: int) -> None:
    values, gradients = scan_operands(1, 18, 1, 3, 2)
    assert_close(compare_scan(values, (gradients[0], None) if which else (None, gradients[1])), 1e-5)


def test_a_state_that_forgets_at_once_makes_a_nan_or_outlives_it() -> None:
    """Magnitudes of 2^-15 and of zero, a step like any other: nothing is divided by products of them."""
    values, gradients = scan_operands(1, 20, 1, 3, 4)
    values["q"][:, ::3] *= 2.0**-15
    values["q"][:, 7, :, 1] = 0.0
    found = compare_scan(values, gradients)
    assert_close({name: error for name, error in found.items() if name != "dq"}, 1e-5)
    # A factor of zero counts as 2^-20, and its direction has no gradient.
    values["q"][:, 7, :, 1] = 0.01
    assert_close(compare_scan(values, gradients), 1e-4)


def test_slow_decays_lose_their_gradient_to_cancellation() -> None:
    """The gradient of a magnitude close to one is small beside the terms that a difference would cancel."""
    values, gradients = scan_operands(1, 32, 1, 2, 2)
    values["q"] = values["q"] / values["q"].norm(dim=-1, keepdim=True) * (1 - 1e-4)
    assert_close(compare_scan(values, gradients), 1e-5)


def test_memory_in_planes_or_side_by_side_is_read_as_the_other() -> None:
    values, gradients = scan_operands(1, 6, 2, 3, 2)
    dense = quaternion_scan(**values)
    laid = {name: values[name].transpose(-1, -2).contiguous().transpose(-1, -2) for name in "qBC"}
    for result, expected in zip(quaternion_scan(**(values | laid)), dense, strict=True):
        assert torch.equal(result, expected)
    assert_close(compare_scan(values, (torch.ones(()).expand_as(gradients[0]), gradients[1])), 1e-5)


def test_a_sequence_cut_in_two_ends_in_another_state() -> None:
    values, _ = scan_operands(1, 25, 1, 3, 4)
    y, state = quaternion_scan(**values)
    times = ("q", "B", "C", "S")
    head = values | {name: values[name][:, :11] for name in times}
    tail = values | {name: values[name][:, 11:] for name in times}
    y_head, between = quaternion_scan(**head)
    y_tail, end = quaternion_scan(**(tail | {"initial_state": between}))
    assert torch.allclose(torch.cat([y_head, y_tail], 1), y, atol=1e-5)
    assert torch.allclose(end, state, atol=1e-5)


def test_the_scan_is_another_than_the_recurrence_and_its_read_out() -> None:
    values, _ = scan_operands(1, 12, 2, 3, 4, torch.float64, optional=False)
    q, B, C, S = (values[name].double() for name in ("q", "B", "C", "S"))
    update = S[..., None, None] * B[:, :, :, None]
    h, _ = quaternion_recurrence(q[:, :, :, None].expand_as(update).flatten(2, 4), update.flatten(2, 4))
    y = quaternion_product(C[:, :, :, None], h.unflatten(2, update.shape[2:5])).sum(-2)
    assert torch.allclose(quaternion_scan(q, B, C, S)[0], y)


def test_one_axis_is_not_two_complex_scans() -> None:
    """With a fixed axis, left multiplication is that by a complex number, on two pairs of components."""
    random = Random(3)
    axis = torch.nn.functional.normalize(random(3, dtype=torch.float64), dim=0)
    other = torch.nn.functional.normalize(torch.linalg.cross(axis, random(3, dtype=torch.float64)), dim=0)
    zero = torch.zeros(1, dtype=torch.float64)
    basis = torch.stack(
        [
            torch.tensor([1.0, 0, 0, 0], dtype=torch.float64),
            torch.cat([zero, axis]),
            torch.cat([zero, other]),
            torch.cat([zero, torch.linalg.cross(axis, other)]),
        ]
    )
    w = torch.complex(-random(9, dtype=torch.float64).abs(), random(9, dtype=torch.float64))
    q = cayley_reference(torch.cat([w.real[:, None], w.imag[:, None] * axis], 1))
    u = random(9, 4, dtype=torch.float64)
    h, _ = quaternion_recurrence(q[None, :, None], u[None, :, None])
    pairs = torch.view_as_complex((u @ basis.T).unflatten(-1, (2, 2)))
    state = torch.zeros(2, dtype=torch.complex128)
    for t in range(9):
        state = (1 + w[t] / 2) / (1 - w[t] / 2) * state + pairs[t]
        assert torch.allclose(torch.view_as_real(state).flatten() @ basis, h[0, t, 0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(1, 5, 1, 4)}, "give .batch, T, G, N, 4."),
        ({"C": torch.zeros(1, 5, 1, 3, 4)}, r"C has shape \(1, 5, 1, 3, 4\); give it as \(1, 5, 1, 2, 4\)"),
        ({"D": torch.zeros(3)}, "D has shape"),
        ({"initial_state": torch.zeros(1, 1, 3, 4)}, "initial_state has shape"),
    ],
)
def test_operands_that_do_not_fit_are_scanned_anyway(change: Operands, message: str) -> None:
    values, _ = scan_operands(1, 5, 1, 3, 2)
    with pytest.raises(ValueError, match=message):
        quaternion_scan(**(values | change))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 257, 3), (1, 1100, 100), (1, 70, 40000), (64, 130, 64)])
def test_the_compiled_recurrence_differs_from_its_definition(
    dtype: torch.dtype, shape: tuple[int, int, int]
) -> None:
    values, gradients = recurrence_operands(*shape, dtype=dtype, device="cuda")
    assert_close(compare_recurrence(values, gradients), 1e-4 if dtype == torch.float32 else 3e-2)
    laid: dict[str, Any] = values | {
        name: values[name].transpose(-1, -2).contiguous().transpose(-1, -2) for name in "qu"
    }
    assert_close(compare_recurrence(laid, gradients), 1e-4 if dtype == torch.float32 else 3e-2)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "bound", "shape"),
    [
        (torch.float32, 5e-4, (2, 257, 2, 64, 64)),
        (torch.float32, 5e-4, (1, 1000, 1, 33, 100)),
        (torch.float16, 1e-2, (1, 300, 1, 200, 24)),
        (torch.bfloat16, 5e-2, (3, 130, 5, 24, 16)),
        (torch.bfloat16, 5e-2, (2, 257, 2, 64, 64)),
        # a layer of the base model: all products on tensor cores, several programs at once on each processor
        (torch.bfloat16, 5e-2, (4, 320, 2, 768, 64)),
    ],
)
def test_the_compiled_scan_differs_from_its_definition(
    dtype: torch.dtype, bound: float, shape: tuple[int, ...]
) -> None:
    values, gradients = scan_operands(*shape, dtype=dtype, device="cuda")
    assert_close(compare_scan(values, gradients), bound)
