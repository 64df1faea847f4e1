"""Mamba-2's float scan: kernels against the recurrence in float64, the recurrence against its matrix."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.triton_kernels.float_scans import Operands, Random, assert_close, errors
from triton_kernels.state_space_duality import state_space_duality, state_space_duality_reference


def operands(
    batch: int,
    length: int,
    heads: int,
    headdim: int,
    groups: int,
    d_state: int,
    dtype: torch.dtype = torch.float32,
    softplus: bool = True,
    optional: bool = True,
    seed: int = 0,
    device: str = "cpu",
) -> tuple[Operands, tuple[Tensor, Tensor]]:
    """Operands and gradients of output and final state."""
    random = Random(seed, device)
    dt = random(batch, length, heads) - 1.0
    values: dict[str, Any] = {
        "x": random(batch, length, heads, headdim, dtype=dtype),
        "dt": dt if softplus else dt.exp() * 0.2,
        "A": -random(heads).exp(),
        "B": random(batch, length, groups, d_state, dtype=dtype),
        "C": random(batch, length, groups, d_state, dtype=dtype),
        "dt_softplus": softplus,
    }
    if optional:
        values |= {
            "D": random(heads),
            # without softplus nothing else keeps step sizes positive
            "dt_bias": random(heads) if softplus else random(heads).abs() * 0.1,
            "initial_state": random(batch, heads, headdim, d_state),
        }
    gradients = random(batch, length, heads, headdim, dtype=dtype), random(batch, heads, headdim, d_state)
    return values, gradients


def compare(values: Operands, gradients: tuple[Tensor | None, ...]) -> dict[str, float]:
    return errors(state_space_duality, state_space_duality_reference, values, gradients)


@settings(max_examples=6, deadline=None)
@given(
    length=st.sampled_from([1, 2, 31, 32, 33, 65]),
    per_group=st.integers(1, 3),
    groups=st.integers(1, 2),
    headdim=st.sampled_from([1, 5, 16, 17]),
    d_state=st.sampled_from([1, 7, 16, 20]),
    softplus=st.booleans(),
    optional=st.booleans(),
)
def test_an_odd_shape_or_a_chunk_bound_is_scanned_wrongly(
    length: int, per_group: int, groups: int, headdim: int, d_state: int, softplus: bool, optional: bool
) -> None:
    values, gradients = operands(
        2,
        length,
        per_group * groups,
        headdim,
        groups,
        d_state,
        softplus=softplus,
        optional=optional,
        seed=length,
    )
    assert_close(compare(values, gradients), 1e-4)


def test_half_precision_is_summed_in_half_precision() -> None:
    values, gradients = operands(1, 130, 4, 16, 2, 24, torch.float16)
    assert_close(compare(values, gradients), 2e-3)


@pytest.mark.parametrize("which", [0, 1])
def test_a_missing_gradient_of_output_or_state_is_taken_for_garbage(which: int) -> None:
    values, gradients = operands(1, 40, 2, 4, 1, 5)
    assert_close(compare(values, (gradients[0], None) if which else (None, gradients[1])), 1e-5)


def test_a_decay_that_underflows_makes_a_nan() -> None:
    values, gradients = operands(1, 70, 2, 4, 1, 5, softplus=False)
    values["A"] = torch.tensor([-1e4, -1e-6])
    values["dt"][:, ::7] = 30.0
    assert_close(compare(values, gradients), 1e-4)


def test_a_tiny_step_loses_its_digits_in_softplus() -> None:
    values, gradients = operands(1, 33, 2, 4, 1, 5)
    values["dt"] = torch.full_like(values["dt"], -14.0)
    values["dt_bias"] = torch.zeros_like(values["dt_bias"])
    values["D"] = torch.zeros_like(values["D"])
    values["initial_state"] = torch.zeros_like(values["initial_state"])
    assert_close(compare(values, gradients), 1e-4)


def test_slices_and_expanded_gradients_are_read_with_the_wrong_strides() -> None:
    values, gradients = operands(2, 35, 4, 8, 2, 6)
    random = Random(1)
    packed = random(2, 35, 4 * 8 + 2 * 2 * 6)
    x, B, C = packed.split([32, 12, 12], -1)
    sliced = values | {"x": x.view(2, 35, 4, 8), "B": B.view(2, 35, 2, 6), "C": C.view(2, 35, 2, 6)}
    dense = values | {name: sliced[name].contiguous() for name in "xBC"}
    for result, expected in zip(state_space_duality(**sliced), state_space_duality(**dense), strict=True):
        assert torch.equal(result, expected)
    assert_close(compare(values, (torch.ones(()).expand_as(gradients[0]), gradients[1])), 1e-5)


def test_a_sequence_cut_in_two_ends_in_another_state() -> None:
    values, _ = operands(1, 75, 2, 4, 1, 5)
    y, state = state_space_duality(**values)
    times = ("x", "dt", "B", "C")
    head = values | {name: values[name][:, :41] for name in times}
    tail = values | {name: values[name][:, 41:] for name in times}
    y_head, between = state_space_duality(**head)
    y_tail, end = state_space_duality(**(tail | {"initial_state": between}))
    assert torch.allclose(torch.cat([y_head, y_tail], 1), y, atol=1e-5)
    assert torch.allclose(end, state, atol=1e-5)


def test_the_reference_departs_from_the_matrix_of_the_paper() -> None:
    """y = (L o C B^T) diag(dt) x with L[t, s] = exp of the sum of dt A over s+1..t (paper, section 3)."""
    values, _ = operands(1, 9, 2, 3, 1, 4, torch.float64, softplus=False, optional=False)
    x, dt, A, B, C = (values[name].double() for name in ("x", "dt", "A", "B", "C"))
    sums = (dt * A).cumsum(1)[0].T
    decay = torch.exp(sums[:, :, None] - sums[:, None, :]).tril()
    y = torch.einsum("hts,tn,sn,sh,shp->thp", decay, C[0, :, 0], B[0, :, 0], dt[0], x[0])
    assert torch.allclose(state_space_duality_reference(x, dt, A, B, C)[0][0], y)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"B": torch.zeros(1, 5, 3, 4)}, "make G divide H"),
        ({"C": torch.zeros(1, 5, 1, 3)}, r"C has shape \(1, 5, 1, 3\); give it as \(1, 5, 1, 4\)"),
        ({"B": torch.zeros(1, 5, 1, 4, dtype=torch.float16)}, "convert them to one"),
        ({"x": torch.zeros(1, 5, 2)}, "give x as"),
        ({"initial_state": torch.zeros(1, 2, 4, 3)}, "initial_state has shape"),
    ],
)
def test_operands_that_do_not_fit_are_scanned_anyway(change: Operands, message: str) -> None:
    values, _ = operands(1, 5, 2, 3, 1, 4)
    with pytest.raises(ValueError, match=message):
        state_space_duality(**(values | change))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 2e-4), (torch.float16, 5e-3), (torch.bfloat16, 3e-2)]
)
@pytest.mark.parametrize(
    "shape",
    [
        (2, 257, 8, 64, 2, 128),
        (1, 300, 24, 64, 1, 64),
        (3, 130, 5, 24, 1, 16),
        (1, 200, 2, 128, 1, 128),
        (1, 1000, 4, 32, 4, 256),
    ],
)
def test_the_compiled_kernels_differ_from_the_reference(
    dtype: torch.dtype, bound: float, shape: tuple[int, ...]
) -> None:
    values, gradients = operands(*shape, dtype=dtype, device="cuda")
    assert_close(compare(values, gradients), bound)
