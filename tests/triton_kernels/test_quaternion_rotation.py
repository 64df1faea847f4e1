"""Rotations as quaternions and matrices: one is the other's, half turns and small angles too."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from triton_kernels.quaternion import quaternion_product
from triton_kernels.quaternion_rotation import matrix_to_quaternion, quaternion_rotate, quaternion_to_matrix

UNIT = st.floats(-1, 1)


def rotor(axis: tuple[float, float, float], angle: float) -> Tensor:
    direction = torch.tensor(axis, dtype=torch.float64)
    direction = direction / direction.norm()
    return torch.cat(
        [torch.tensor([math.cos(angle / 2)], dtype=torch.float64), math.sin(angle / 2) * direction]
    )


# The first matrix exponential of a process takes a second.
@settings(deadline=None)
@given(st.tuples(UNIT, UNIT, UNIT).filter(lambda v: math.hypot(*v) > 1e-3), st.floats(0, 2 * math.pi))
def test_a_matrix_turns_other_than_its_quaternion(axis: tuple[float, float, float], angle: float) -> None:
    q = rotor(axis, angle)
    v = torch.tensor([0.3, -1.2, 2.0], dtype=torch.float64)
    x, y, z = (torch.tensor(axis, dtype=torch.float64) / math.hypot(*axis) * angle).tolist()
    cross = torch.tensor([[0.0, -z, y], [z, 0.0, -x], [-y, x, 0.0]], dtype=torch.float64)
    expected = torch.linalg.matrix_exp(cross)
    torch.testing.assert_close(quaternion_to_matrix(q), expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(quaternion_to_matrix(-3 * q), expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(quaternion_rotate(q, v), expected @ v, atol=1e-12, rtol=0)


@given(
    st.tuples(UNIT, UNIT, UNIT).filter(lambda v: math.hypot(*v) > 1e-3),
    st.floats(0, 2 * math.pi) | st.sampled_from([0.0, 1e-9, math.pi, math.pi - 1e-9, math.pi + 1e-9]),
)
def test_a_quaternion_is_lost_on_the_way_through_its_matrix(
    axis: tuple[float, float, float], angle: float
) -> None:
    """At half turns too, where the real part is zero."""
    q = rotor(axis, angle)
    back = matrix_to_quaternion(quaternion_to_matrix(q))
    assert float(back[0]) >= 0
    assert min(float((back - q).abs().max()), float((back + q).abs().max())) < 1e-8


def test_batches_and_products_differ_from_single_rotations() -> None:
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randn(2, 5, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    p, q = (x / x.norm(dim=-1, keepdim=True) for x in (p, q))
    both = quaternion_to_matrix(quaternion_product(p, q))
    torch.testing.assert_close(both, quaternion_to_matrix(p) @ quaternion_to_matrix(q))
    v = torch.randn(3, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(quaternion_rotate(p, v), quaternion_to_matrix(p) @ v)
    again = torch.stack([matrix_to_quaternion(quaternion_to_matrix(x)) for x in p.flatten(0, 1)])
    assert torch.equal(again.view(2, 5, 4), matrix_to_quaternion(quaternion_to_matrix(p)))


def test_gradients_are_not_those_of_differences() -> None:
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(3, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    v = torch.randn(3, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(quaternion_rotate, (q, v))
    assert torch.autograd.gradcheck(quaternion_to_matrix, (q,))
    assert torch.autograd.gradcheck(lambda x: matrix_to_quaternion(quaternion_to_matrix(x)), (q,))


def test_vectors_and_matrices_of_other_shapes_are_taken() -> None:
    with pytest.raises(ValueError, match=r"give them as \[..., 3\]"):
        quaternion_rotate(torch.ones(4), torch.ones(4))
    with pytest.raises(ValueError, match=r"give them as \[..., 3, 3\]"):
        matrix_to_quaternion(torch.ones(4, 3))
    with pytest.raises(ValueError, match=r"give it as \[..., 4\]"):
        quaternion_to_matrix(torch.ones(3))
