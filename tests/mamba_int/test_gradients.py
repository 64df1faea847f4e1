"""Gradients: the float twin's are the true ones, and the integer model's are theirs, straight through."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cosine_similarity

from mamba_int.config import MambaIntConfig
from mamba_int.executor import execute_nodes
from mamba_int.graph import Node
from mamba_int.model import MambaInt, quantize_parameter, ternarize
from mamba_int.operations import OPERATIONS
from tests.circuits_runtime.models import SMALL, random_inputs
from triton_kernels.bit_shift_norm import bit_shift_norm
from triton_kernels.clamp import saturate
from triton_kernels.shift import shift
from triton_kernels.ssd import SsdScales, decay_products, ssd
from triton_kernels.straight_through import straight_through
from triton_kernels.table import look_up

DOUBLE = torch.float64


def random_tensor(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE) * scale


# -- the float twin -------------------------------------------------------------------------------------

TWINS: dict[str, dict[str, Any]] = {
    "default": {},
    "chunked": {"seq_len": 7, "chunk_size": 3},
    "chunks_of_one": {"seq_len": 4, "chunk_size": 1},
    "shear": {"seq_len": 7, "chunk_size": 3, "rotation": "shear"},
    "squareplus_algebraic": {"activation": "squareplus", "gate": "algebraic", "rotation": "none"},
    "hard_sigmoid": {"gate": "hard_sigmoid", "pooling": "last", "activate_BC": True, "final_norm": False},
    "int8": {"weights": "int8", "conv_bias": False},
    "two_layers": {"n_layer": 2, "seq_len": 5, "chunk_size": 2},
    "language_model": {"task": "language_model", "vocab_size": 7, "seq_len": 5, "chunk_size": 2},
}


def calm(model: MambaInt) -> MambaInt:
    """Shrink what feeds the clamps (gate, decay), so that no point lies on or beyond one of their kinks."""
    E = model.config.d_inner
    with torch.no_grad():
        for name, parameter in model.latent.items():
            if name.endswith("in_proj/weight"):
                parameter[:E] *= 0.2
                parameter[-model.config.n_heads :] *= 0.05
            if name.endswith("decay_bias"):
                parameter.clamp_(0.3, 0.7)
            if name.endswith("bias") and "conv" in name:
                parameter.copy_(
                    0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
                )
    return model


def twin_and_inputs(forms: dict[str, Any], arithmetic: str = "float") -> tuple[MambaInt, Tensor]:
    config = MambaIntConfig(**(SMALL | {"conv_frac": 5} | forms | {"arithmetic": arithmetic}))
    model = calm(MambaInt(config, 1))
    inputs = torch.from_numpy(random_inputs(config, 4, 1))[2:]
    for _ in range(2):
        model.statistics[len(model.weight_scales) :] = -1.0
        model.observe(inputs)
    model.freeze_scales()
    return model, inputs


@pytest.mark.parametrize("form", TWINS)
def test_gradient_of_every_parameter_of_the_twin_is_the_true_one(form: str) -> None:
    """Against central differences along a random direction of each parameter, in float64."""
    model, inputs = twin_and_inputs(TWINS[form])
    model = model.double().eval()
    with torch.no_grad():
        weights = random_tensor(*model(inputs).shape, seed=5)

    def value() -> Tensor:
        return (model(inputs) * weights).sum()

    value().backward()
    for i, (name, parameter) in enumerate(model.named_parameters()):
        direction = random_tensor(*parameter.shape, seed=i)
        assert parameter.grad is not None
        slope = (parameter.grad * direction).sum().item()
        step = 1e-6
        with torch.no_grad():
            parameter += step * direction
            above = value().item()
            parameter -= 2 * step * direction
            below = value().item()
            parameter += step * direction
        assert slope == pytest.approx((above - below) / (2 * step), rel=1e-4, abs=1e-5), name
        assert slope != 0, name


def scan_scales(Q: int, headdim: int) -> SsdScales:
    return SsdScales(Q, headdim, 8, 12, 2, 4094, 16, 10, 8, 9, 5, 10, 4, 0, 6)


@pytest.mark.parametrize(("steps", "Q"), [(1, 1), (3, 4), (4, 4), (5, 2), (3, 1)])
def test_gradient_of_the_unrounded_scan_is_the_true_one(steps: int, Q: int) -> None:
    x, B, C, B_next = (random_tensor(1, steps, 4, seed=i, scale=9).requires_grad_() for i in range(4))
    n = (random_tensor(1, steps, 2, seed=9).sigmoid() * 255).requires_grad_()
    D = random_tensor(2, seed=8, scale=20).requires_grad_()
    cos, sin = (random_tensor(2, seed=i, scale=300).requires_grad_() for i in (10, 11))

    def scan(*operands: Tensor) -> Tensor:
        x, B, C, n, D, B_next, cos, sin = operands
        y: Tensor = ssd(x, B, C, n, D, scan_scales(Q, 2), B_next, cos, sin, rounding=False)[0]
        return y * 2.0**-12

    operands = (x, B, C, n, D, B_next, cos, sin)
    if steps <= Q:
        for unused in operands[5:]:
            unused.requires_grad_(False)
    assert torch.autograd.gradcheck(scan, operands, eps=1e-4, atol=1e-4, rtol=1e-4, fast_mode=True)


@pytest.mark.parametrize("length", [1, 2, 5])
def test_gradient_of_the_unrounded_decay_products_is_the_true_one(length: int) -> None:
    n = (random_tensor(2, length).sigmoid() * 255).requires_grad_()
    assert torch.autograd.gradcheck(lambda n: decay_products(n, 8, 12, rounding=False) * 2.0**-6, (n,))


# -- straight through -----------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [-3, 0, 1, 7])
def test_shift_passes_its_gradient_scaled(k: int) -> None:
    x = torch.arange(-20.0, 20.0).requires_grad_()
    shift(x, k).backward(torch.arange(40.0))
    assert torch.equal(x.grad, torch.arange(40.0) * 2.0**-k)


def test_saturation_blocks_only_what_would_go_further_out() -> None:
    """Descent moves x against the gradient: at the top a positive one brings it back."""
    x = torch.tensor([-9.0, -9.0, -5.0, -5.0, 0.0, 0.0, 5.0, 5.0, 9.0, 9.0]).requires_grad_()
    g = torch.tensor([1.0, -1.0] * 5)
    saturate(x, -5, 5).backward(g)
    passed = [0, -1, 0, -1, 1, -1, 1, 0, 1, 0]
    assert x.grad.tolist() == passed


TABLE = [10.0, 16.0, 14.0, 14.0, -6.0]


def test_table_passes_the_difference_of_the_neighbouring_entries() -> None:
    x = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0, -1.0]).requires_grad_()
    values = torch.tensor(TABLE).requires_grad_()
    y = look_up(x, values, -2)
    assert y.tolist() == [*TABLE, 16.0]
    y.backward(torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 10.0]))
    assert x.grad.tolist() == [6.0, 2.0, -1.0, -10.0, -20.0, 20.0]
    assert values.grad.tolist() == [1.0, 11.0, 1.0, 1.0, 1.0]


def test_table_of_one_entry_has_no_slope() -> None:
    for rounding in (True, False):
        x = torch.tensor([3.0, 3.0]).requires_grad_()
        y = look_up(x, torch.tensor([7.0]), 3, rounding)
        y.sum().backward()
        assert (y.tolist(), x.grad.tolist()) == ([7.0, 7.0], [0.0, 0.0])


def test_table_of_the_twin_is_the_line_through_its_entries_with_its_true_gradient() -> None:
    values = torch.tensor(TABLE, dtype=DOUBLE).requires_grad_()
    x = torch.tensor([-2.5, -1.75, -0.5, 0.25, 1.5, 2.5], dtype=DOUBLE).requires_grad_()
    assert look_up(x, values, -2, rounding=False).tolist() == [7.0, 11.5, 15.0, 14.0, 4.0, -16.0]
    whole = torch.arange(-2.0, 3.0, dtype=DOUBLE)
    assert look_up(whole, values, -2, rounding=False).tolist() == TABLE
    assert torch.autograd.gradcheck(lambda x, values: look_up(x, values, -2, rounding=False), (x, values))


def test_choice_passes_its_gradient_to_what_is_chosen_and_comparison_none() -> None:
    x = torch.tensor([[[-1.0, 0.0, 1.0]]]).requires_grad_()
    nodes = [
        Node("input", "input"),
        Node("double", "mul", ("input",), constants={"value": torch.tensor(2.0)}),
        Node("g", "compare", ("input",), constants={"value": torch.tensor(0.0)}),
        Node("y", "select", ("g", "double", "input")),
    ]
    values = execute_nodes(nodes, x)
    assert not values["g"].requires_grad and values["g"].dtype == torch.float32
    assert values["y"].tolist() == [[[-1.0, 0.0, 2.0]]]
    values["y"].backward(torch.tensor([[[1.0, 10.0, 100.0]]]))
    assert x.grad.tolist() == [[[1.0, 20.0, 200.0]]]


def test_condition_that_learns_gets_the_difference_of_the_branches() -> None:
    condition = torch.tensor([0.0, 1.0]).requires_grad_()
    node = Node("y", "select", ("c", "a", "b"))
    operands = [condition, torch.tensor([7.0, 7.0]), torch.tensor([2.0, -2.0])]
    y = OPERATIONS["select"].execute(node, operands, lambda name, value: None, True)
    assert y.tolist() == [2.0, 7.0]
    y.backward(torch.ones(2))
    assert condition.grad.tolist() == [5.0, 9.0]


def test_straight_through_is_exact_forward_and_smooth_backward() -> None:
    x = torch.tensor([0.3, -1.7, 1e8]).requires_grad_()
    exact = torch.tensor([1.0, 2.0, 3.0])
    y = straight_through(x * 3, exact)
    assert torch.equal(y, exact)
    y.sum().backward()
    assert x.grad.tolist() == [3.0, 3.0, 3.0]


@pytest.mark.parametrize("frac", [0, 3])
def test_ternarize_thresholds_at_half_the_mean_and_passes_the_scale(frac: int) -> None:
    weight = torch.tensor([[2.0, -2.0, 0.4, -0.4, 1.2, 0.0], [0.0] * 6]).requires_grad_()
    # the mean of the first row is 1: thresholds +-1/2
    ternary = ternarize(weight, frac)
    assert ternary.tolist() == [[1, -1, 0, 0, 1, 0], [0] * 6]
    ternary.backward(torch.arange(12.0).reshape(2, 6))
    assert torch.equal(weight.grad, torch.arange(12.0).reshape(2, 6) * 2.0**frac)


def test_quantized_parameter_comes_back_from_its_limit() -> None:
    real = torch.tensor([0.3, 99.0, 99.0, -99.0, -99.0]).requires_grad_()
    held = quantize_parameter(real, 4, 127)
    assert held.tolist() == [5, 127, 127, -127, -127]
    held.backward(torch.tensor([1.0, 1.0, -1.0, 1.0, -1.0]))
    assert real.grad.tolist() == [16, 16, 0, 0, -16]


def unrounded_products(n: Tensor, rounded: Tensor) -> Tensor:
    """A[t,s] = A[t-1,s] n_t / 2^k by autograd, with the rounded A as the value of each factor."""
    rows, length = [], n.shape[-1]
    row = n.new_full((1,), 4096.0)
    for t in range(length):
        row = torch.cat([row * n[t] / 256, ((256 - n[t]) * 16)[None]])
        row = straight_through(row, rounded[t, : t + 2])
        rows.append(torch.cat([row, n.new_zeros(length - 1 - t)]))
    return torch.stack(rows)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 255), min_size=1, max_size=9), st.integers(0, 1 << 30))
def test_decays_learn_with_the_rounded_values_as_factors(decays: list[int], seed: int) -> None:
    """Exact, also where decays are 0: nothing is divided by them."""
    n = torch.tensor(decays, dtype=DOUBLE).requires_grad_()
    A = decay_products(n, 8, 12)
    cotangent = random_tensor(*A.shape, seed=seed)
    (found,) = torch.autograd.grad(A, n, cotangent)
    (wanted,) = torch.autograd.grad(unrounded_products(n, A.detach()), n, cotangent)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-9)
    assert torch.isfinite(found).all()


# -- norm -----------------------------------------------------------------------------------------------


def norm(x: Tensor, rounding: bool = True) -> tuple[Tensor, dict[str, Tensor]]:
    """Two steps an octave, ten octaves, 5 binary places, the copy that is squared shifted by 4."""
    thresholds = [x.shape[-1] * 4**i // part for i in range(10) for part in (2, 1)]
    return bit_shift_norm(x, 4, 511, thresholds, multipliers(), 10, 5, 0.88, rounding)


def multipliers() -> list[int]:
    return [factor << (10 - i) for i in range(11) for factor in (3, 2)][:-1]


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 9), st.integers(0, 1 << 30))
def test_gradient_of_the_norm_is_that_of_an_rms_norm_times_its_multiplier(d: int, seed: int) -> None:
    """So it is orthogonal to x: no component is spent on the length, which the norm takes away."""
    x = (random_tensor(3, d, seed=seed) * 900).round()
    # Zero has no direction, and an RMSNorm without epsilon no gradient there.
    x[(x == 0).all(-1)] = 1.0
    x.requires_grad_()
    cotangent = random_tensor(3, d, seed=seed + 1)
    (g,) = torch.autograd.grad(norm(x)[0], x, cotangent)
    length = x.detach().norm(dim=-1, keepdim=True)
    along = (g * x).sum(-1, keepdim=True) / length.clamp_min(1)
    assert (along.abs() <= 1e-5 * (1 + cotangent.norm())).all()
    rms = (x * x).mean(-1, keepdim=True).sqrt()
    (true,) = torch.autograd.grad(x / rms.clamp_min(1e-9), x, cotangent)
    multiplier = torch.tensor(multipliers())[norm(x.detach())[1]["level"].long()]
    scaled = true * rms.detach() * multiplier * 2.0**-10
    torch.testing.assert_close(g, scaled, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_norm_of_zero_has_a_finite_gradient(dtype: torch.dtype) -> None:
    for rounding in (True, False):
        x = torch.zeros(2, 4, dtype=dtype).requires_grad_()
        y = norm(x, rounding)[0]
        y.backward(torch.ones_like(y))
        assert torch.isfinite(y).all()
        assert torch.isfinite(x.grad).all()


# -- no NaN, ever ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("arithmetic", ["integer", "float"])
@pytest.mark.parametrize("form", TWINS)
def test_no_gradient_is_nan_where_everything_is_zero_or_decays_at_once(form: str, arithmetic: str) -> None:
    model, inputs = twin_and_inputs(TWINS[form], arithmetic)
    for decay in (-9.0, 0.0, 9.0):
        with torch.no_grad():
            for name, parameter in model.latent.items():
                parameter.fill_(decay) if name.endswith("decay_bias") else parameter.zero_()
        model.zero_grad()
        model.train()(inputs * 0).sum().backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_division_and_root_pass_the_gradients_of_the_reals() -> None:
    x = torch.tensor([7.0, -7.0, 9.0]).requires_grad_()
    d = torch.tensor([2.0, 2.0, 4.0]).requires_grad_()
    nodes = [
        Node("input", "input"),
        Node("x", "slice", ("input",), {"start": 0, "stop": 3}),
        Node("d", "slice", ("input",), {"start": 3, "stop": 6}),
        Node("q", "div", ("x", "d")),
        Node("r", "isqrt", ("d",)),
    ]
    values = execute_nodes(nodes, torch.cat([x, d])[None, None])
    assert values["q"].tolist() == [[[3.0, -4.0, 2.0]]]
    assert values["r"].tolist() == [[[1.0, 1.0, 2.0]]]
    (values["q"].sum() + values["r"].sum()).backward()
    np.testing.assert_allclose(x.grad, [0.5, 0.5, 0.25])
    np.testing.assert_allclose(d.grad, [-7 / 4 + 8**-0.5, 7 / 4 + 8**-0.5, -9 / 16 + 0.25], rtol=1e-6)


# -- integer against float ------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "Q"), [(8, 8), (24, 8), (12, 1)])
def test_gradients_of_the_integer_scan_point_where_the_float_ones_do(steps: int, Q: int) -> None:
    def operands() -> list[Tensor]:
        sizes = {0: 8, 1: 8, 2: 8, 3: 8}
        values = [random_tensor(4, steps, width, seed=i, scale=35).round() for i, width in sizes.items()]
        n = (random_tensor(4, steps, 2, seed=9).sigmoid() * 255).round()
        return [value.clamp(-127, 127).requires_grad_() for value in values] + [n.requires_grad_()]

    D = torch.tensor([64.0, -30.0], dtype=DOUBLE)
    angle = torch.linspace(0.1, 0.9, 4, dtype=DOUBLE) * Q
    gradients = []
    for rounding in (True, False):
        x, B, C, B_next, n = leaves = operands()
        cos, sin = (torch.cos(angle) * 1024).trunc(), (torch.sin(angle) * 1024).trunc()
        y, _ = ssd(x, B, C, n, D, scan_scales(Q, 4), B_next, cos, sin, rounding)
        y.backward(random_tensor(*y.shape, seed=20))
        gradients.append([leaf.grad for leaf in leaves])
    for name, exact, smooth in zip(["x", "B", "C", "B_next", "n"], *gradients, strict=True):
        if smooth is None:
            assert exact is None and name == "B_next" and steps <= Q
        else:
            assert cosine_similarity(exact.flatten(), smooth.flatten(), dim=0) > 0.99, name


@pytest.mark.parametrize("form", ["default", "chunked", "hard_sigmoid", "shear"])
def test_gradient_of_the_integer_model_points_where_the_float_one_does(form: str) -> None:
    """Same weights: the twin gets the integers of the model, so that only roundings differ."""
    model, inputs = twin_and_inputs({**TWINS[form], "weights": "int8"}, "integer")
    twin, _ = twin_and_inputs({**TWINS[form], "weights": "int8"}, "float")
    twin.load_state_dict(model.state_dict())
    vectors = []
    for each in (model, twin):
        logits = each.train()(inputs)
        target = torch.arange(len(logits)) % logits.shape[-1]
        torch.nn.functional.cross_entropy(logits, target).backward()
        vectors.append(torch.cat([p.grad.flatten() for p in each.parameters() if p.grad is not None]))
    assert cosine_similarity(*vectors, dim=0) > 0.99
