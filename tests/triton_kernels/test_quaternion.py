"""Quaternion algebra and layer norm: kernels against definitions in float64, and what algebra promises."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.triton_kernels.float_scans import Random, assert_close, errors
from triton_kernels.quaternion import (
    cayley,
    cayley_reference,
    quaternion_conjugate,
    quaternion_conjugate_reference,
    quaternion_inverse,
    quaternion_inverse_reference,
    quaternion_norm,
    quaternion_norm_reference,
    quaternion_product,
    quaternion_product_reference,
)
from triton_kernels.quaternion_layer_norm import quaternion_layer_norm, quaternion_layer_norm_reference

UNARY = {
    "conjugate": (quaternion_conjugate, quaternion_conjugate_reference),
    "norm": (quaternion_norm, quaternion_norm_reference),
    "inverse": (quaternion_inverse, quaternion_inverse_reference),
    "cayley": (cayley, cayley_reference),
}


def compare(function: Any, reference: Any, operands: dict[str, Any], gradient: Tensor) -> dict[str, float]:
    """``errors`` for functions of one result."""

    def paired(f: Any) -> Any:
        def call(**values: Any) -> tuple[Tensor, Tensor]:
            return f(**values), torch.zeros(1)

        return call

    return errors(paired(function), paired(reference), operands, (gradient, None))


def planes(x: Tensor) -> Tensor:
    """The same [..., D, 4] in memory [..., 4, D]."""
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


BROADCASTS = [
    ((4,), (4,), (4,)),
    ((3, 1, 5, 4), (2, 1, 4), (3, 2, 5, 4)),
    ((1, 4), (600, 4), (600, 4)),
    ((2, 1, 3, 1, 2, 1, 4), (1, 2, 1, 3, 1, 2, 4), (2, 2, 3, 3, 2, 2, 4)),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("p", "q", "product"), BROADCASTS)
def test_a_broadcast_factor_is_read_at_the_wrong_place(
    p: tuple[int, ...], q: tuple[int, ...], product: tuple[int, ...], dtype: torch.dtype
) -> None:
    random = Random(0)
    operands = {"p": random(*p, dtype=dtype), "q": random(*q, dtype=dtype)}
    found = compare(quaternion_product, quaternion_product_reference, operands, random(*product, dtype=dtype))
    assert_close(found, 1e-6 if dtype == torch.float32 else 2e-3)


@pytest.mark.parametrize("operation", UNARY)
def test_planes_or_gradients_of_other_strides_are_read_at_the_wrong_place(operation: str) -> None:
    function, reference = UNARY[operation]
    random = Random(1)
    x = random(3, 5, 4)
    shape = (3, 5) if operation == "norm" else (3, 5, 4)
    gradient = random(*shape)
    name = "z" if operation == "cayley" else "q"
    assert_close(compare(function, reference, {name: x}, gradient), 2e-6)
    laid = planes(x)
    assert torch.equal(function(laid), function(x))
    assert function(laid).stride() == laid.stride() or operation == "norm"
    assert_close(compare(function, reference, {name: x}, torch.ones(()).expand(shape)), 2e-6)


def test_i_j_k_multiply_in_another_order() -> None:
    one, i, j, k = torch.eye(4)
    for p, q, r in ((i, j, k), (j, k, i), (k, i, j)):
        assert torch.equal(quaternion_product(p, q), r)
        assert torch.equal(quaternion_product(q, p), -r)
        assert torch.equal(quaternion_product(p, p), -one)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), scale=st.floats(1e-3, 1e3))
def test_the_algebra_is_no_algebra_of_quaternions(seed: int, scale: float) -> None:
    """Associative, norms multiply, products reverse under conjugation, inverses are some, order matters."""
    p, q, r = (Random(seed)(3, 7, 4) * scale).unbind(0)
    pq = quaternion_product(p, q)
    assert torch.allclose(
        quaternion_product(pq, r), quaternion_product(p, quaternion_product(q, r)), atol=1e-5 * scale**3
    )
    assert torch.allclose(quaternion_norm(pq), quaternion_norm(p) * quaternion_norm(q))
    reversed_product = quaternion_product(quaternion_conjugate(q), quaternion_conjugate(p))
    assert torch.allclose(quaternion_conjugate(pq), reversed_product, atol=1e-6 * scale**2)
    one = torch.tensor([1.0, 0, 0, 0]).expand_as(p)
    assert torch.allclose(quaternion_product(p, quaternion_inverse(p)), one, atol=1e-6)
    assert not torch.allclose(pq, quaternion_product(q, p), atol=1e-3 * scale**2)


@settings(max_examples=30, deadline=None)
@given(
    real=st.floats(-100, 100).filter(lambda x: abs(x) > 1e-4),
    imaginary=st.tuples(*[st.floats(-100, 100)] * 3),
)
def test_cayley_grows_where_the_real_part_is_negative(
    real: float, imaginary: tuple[float, float, float]
) -> None:
    z = torch.tensor([real, *imaginary], dtype=torch.float64)
    half = z / 2
    half[0] -= 1.0
    distance = float(half.square().sum())
    if distance > 1e-6:
        norm = float(quaternion_norm(cayley(z)))
        assert (norm < 1.0) == (real < 0)
        assert norm**2 == pytest.approx(1 + 2 * real / distance, rel=1e-9, abs=1e-9)


def test_cayley_of_an_axis_turns_by_another_angle() -> None:
    """A unit quaternion, whose angle is 2 atan(|z| / 2) about the axis."""
    axis = torch.tensor([0.0, 2.0, -1.0, 2.0]) / 3
    for length in (0.0, 0.1, 1.0, 30.0):
        q = cayley(length * axis)
        angle = 2 * torch.atan(torch.tensor(length / 2))
        expected = torch.cos(angle) * torch.tensor([1.0, 0, 0, 0]) + torch.sin(angle) * axis
        assert torch.allclose(q, expected, atol=1e-6)


def test_the_kernel_of_cayley_grows_too() -> None:
    z = Random(2)(4000, 4) * torch.tensor([10.0, 3.0, 3.0, 3.0])
    z[:, 0] = -z[:, 0].abs() - 1e-3
    assert float(quaternion_norm(cayley(z)).max()) < 1.0


# -- layer norm ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("width", [1, 7, 33])
def test_a_layer_norm_of_an_odd_width_has_other_gradients(width: int, centered: bool) -> None:
    random = Random(width)
    operands = {
        "y": random(2, 3, width, 4),
        "gamma": random(width),
        "beta": random(width, 4),
        "centered": centered,
        "eps": 1e-2,
    }
    gradient = random(2, 3, width, 4)
    found = compare(quaternion_layer_norm, quaternion_layer_norm_reference, operands, gradient)
    assert_close(found, 1e-5)
    laid = operands | {"y": planes(operands["y"])}
    assert torch.equal(quaternion_layer_norm(**laid), quaternion_layer_norm(**operands))
    padded = torch.cat([laid["y"], laid["y"]], 1)[:, :3]
    assert torch.equal(quaternion_layer_norm(**(laid | {"y": padded})), quaternion_layer_norm(**operands))


def test_a_direction_is_turned_or_flipped_by_the_norm() -> None:
    y = Random(3)(5, 9, 4)
    y[:, 0] *= 1e-3
    gamma, beta = torch.ones(9), torch.zeros(9, 4)
    out = quaternion_layer_norm(y, gamma, beta)
    cosine = torch.nn.functional.cosine_similarity(out, y, dim=-1)
    assert float(cosine.min()) > 1 - 1e-5
    assert float(out.square().sum(-1).mean()) == pytest.approx(1.0, rel=1e-3)
    # what it is there to avoid
    flipped = torch.nn.functional.cosine_similarity(
        quaternion_layer_norm(y, gamma, beta, centered=True), y, dim=-1
    )
    assert float(flipped.min()) < -0.99


def test_the_norm_depends_on_the_frame() -> None:
    y, turn = Random(4)(6, 11, 4), Random(5)(4)
    turn = turn / quaternion_norm(turn)
    gamma, beta = Random(6)(11), torch.zeros(11, 4)
    turned = quaternion_layer_norm(quaternion_product(turn, y), gamma, beta)
    expected = quaternion_product(turn, quaternion_layer_norm(y, gamma, beta))
    assert torch.allclose(turned, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: quaternion_product(torch.zeros(3), torch.zeros(4)), r"give it as \[..., 4\]"),
        (lambda: quaternion_product(torch.zeros(3, 4), torch.zeros(2, 4)), "shapes that broadcast"),
        (lambda: quaternion_product(torch.zeros(4), torch.zeros(4).half()), "convert them to one"),
        (lambda: cayley(torch.zeros(2, 3)), r"give it as \[..., 4\]"),
        (
            lambda: quaternion_layer_norm(torch.zeros(2, 3, 4), torch.ones(2), torch.zeros(3, 4)),
            "gamma has shape",
        ),
        (
            lambda: quaternion_layer_norm(torch.zeros(1, 8193, 4), torch.ones(8193), torch.zeros(8193, 4)),
            "choose at most 8192",
        ),
    ],
)
def test_operands_that_do_not_fit_are_computed_with(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-5), (torch.float16, 5e-3), (torch.bfloat16, 3e-2)]
)
def test_the_compiled_kernels_differ_from_the_definitions(dtype: torch.dtype, bound: float) -> None:
    random = Random(7, "cuda")
    for p, q, product in BROADCASTS:
        operands = {"p": random(*p, dtype=dtype), "q": random(*q, dtype=dtype)}
        gradient = random(*product, dtype=dtype)
        assert_close(compare(quaternion_product, quaternion_product_reference, operands, gradient), bound)
    for operation, (function, reference) in UNARY.items():
        x = random(7, 300, 4, dtype=dtype)
        gradient = random(*(x.shape[:-1] if operation == "norm" else x.shape), dtype=dtype)
        name = "z" if operation == "cayley" else "q"
        if operation == "cayley":
            x[..., 0] = -x[..., 0].abs()
        if operation == "inverse":
            x[..., 0] += 3.0
        assert_close(compare(function, reference, {name: x}, gradient), bound)
        assert torch.equal(function(planes(x)), function(x))
    for width in (5, 1536, 8192):
        for centered in (False, True):
            operands = {
                "y": random(2, 70, width, 4, dtype=dtype),
                "gamma": random(width),
                "beta": random(width, 4),
                "centered": centered,
                "eps": 1e-2,
            }
            gradient = random(2, 70, width, 4, dtype=dtype)
            found = compare(quaternion_layer_norm, quaternion_layer_norm_reference, operands, gradient)
            assert_close(found, bound)
            laid = quaternion_layer_norm(**(operands | {"y": planes(operands["y"])}))
            assert torch.allclose(
                laid.float(), quaternion_layer_norm(**operands).float(), rtol=bound, atol=bound
            )
