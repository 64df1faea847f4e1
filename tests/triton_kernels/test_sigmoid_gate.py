"""The sigmoid gate: its kernel against the definition in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.triton_kernels.float_scans import Random, assert_close, errors
from triton_kernels.sigmoid_gate import sigmoid_gate, sigmoid_gate_reference


def gate_errors(*shape: int, dtype: torch.dtype, device: str = "cpu", cut: bool = False) -> dict[str, float]:
    random = Random(shape[-1], device)
    operands = {"g": 3 * random(*shape, dtype=dtype), "x": random(*shape, dtype=dtype)}
    gradient = random(*shape, dtype=dtype)

    def of_parts(g: Tensor, x: Tensor) -> Tensor:
        """From the middle of wider tensors, whose rows are apart."""
        wide = torch.cat([x, g, x, x], -1)
        width = x.shape[-1]
        return sigmoid_gate(wide[..., width : 2 * width], wide[..., 2 * width : 3 * width])

    function = of_parts if cut else sigmoid_gate
    return errors(
        lambda **v: (function(**v), torch.zeros(1)),
        lambda **v: (sigmoid_gate_reference(**v), torch.zeros(1)),
        operands,
        (gradient, None),
    )


@settings(max_examples=10, deadline=None)
@given(
    shape=st.sampled_from([(1,), (3, 5), (1, 2, 513), (2, 3, 7, 2), (9, 64)]),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    cut=st.booleans(),
)
def test_a_row_or_its_end_is_gated_wrongly(shape: tuple[int, ...], dtype: torch.dtype, cut: bool) -> None:
    assert_close(gate_errors(*shape, dtype=dtype, cut=cut), 1e-6 if dtype == torch.float32 else 2e-3)


def test_a_gate_far_open_or_shut_gives_a_nan() -> None:
    g = torch.tensor([-200.0, -20.0, 0.0, 20.0, 200.0], requires_grad=True)
    y = sigmoid_gate(g, torch.ones(5))
    assert y.tolist() == pytest.approx([0.0, 2.0611536e-9, 0.5, 1.0, 1.0], rel=1e-5)
    y.sum().backward()
    assert g.grad is not None and bool(torch.isfinite(g.grad).all()) and float(g.grad[2]) == 0.25


def test_a_gradient_spread_from_one_number_is_read_beyond_it() -> None:
    g, x = torch.zeros(3, 4, requires_grad=True), torch.ones(3, 4)
    sigmoid_gate(g, x).sum().backward()
    assert g.grad is not None and g.grad.tolist() == [[0.25] * 4] * 3


def test_a_gate_of_another_shape_is_taken() -> None:
    with pytest.raises(ValueError, match=r"g has shape \(3,\); give it as \(2, 3\)"):
        sigmoid_gate(torch.zeros(3), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="none of them 0"):
        sigmoid_gate(torch.zeros(0), torch.zeros(0))


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_the_compiled_gate_differs_from_its_definition(dtype: torch.dtype, bound: float) -> None:
    for cut in (False, True):
        assert_close(gate_errors(3, 700, 1536, dtype=dtype, device="cuda", cut=cut), bound)
        assert_close(gate_errors(5, 33, dtype=dtype, device="cuda", cut=cut), bound)
