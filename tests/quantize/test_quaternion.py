"""Conversion of quaternion mixers: turns that never amplify, fixed axes as complex states, the norms."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from circuits.runtime.runner import OnnxRunner
from mamba_int.float_models.config import MambaConfig
from mamba_int.float_models.mixer import build_mixer
from mamba_int.float_models.models import MambaForCausalLM, MambaForSequenceClassification
from mamba_int.float_models.quaternion import QuaternionMamba2Block
from mamba_int.graph import Graph
from mamba_int.interpreter import evaluate
from mamba_int.operations.scan import Scan, ScanShape
from quantize.blocks import registry
from quantize.blocks.quaternion import Modes, QuaternionConversion
from quantize.calibration import calibrate, trace
from quantize.cayley import MARGINS, CayleyFit, cayley, fit_cayley
from quantize.equality import compare, torch_tracer
from quantize.float_mamba import PROVABLE, ConversionConfig, InputFormat, convert
from quantize.pieces import Pieces
from tests.mamba_int.graphs import node
from triton_kernels.quaternion import cayley_reference, quaternion_product_reference

FORMAT = InputFormat(0, 16, 4)
Array = NDArray[np.float64]


# -- the Cayley transform --------------------------------------------------------------------------------


def transform(fit: CayleyFit, components: int, max_bits: int) -> Graph:
    """u = -A + b of one state, as integers, to q."""
    config = dataclasses.replace(ConversionConfig(), max_bits=max_bits, seq_len=1)
    limit = max(fit.A_limit, fit.b_limit)
    pieces = Pieces(calibrate_nothing(), config, False)
    g = pieces.graph
    g.add("input", "input", frac=fit.u_frac, low=-limit, high=limit, features=components)
    parts = [
        g.add(f"u{i}", "slice", "input", frac=fit.u_frac, start=i, stop=i + 1) for i in range(components)
    ]
    A = g.saturate("A", parts[0], 0, fit.A_limit)
    b = [g.saturate(f"b{i}", part, -fit.b_limit, fit.b_limit) for i, part in enumerate(parts[1:])]
    return g.finish(cayley(pieces, "q", A, b, fit), {})


def calibrate_nothing() -> dict:  # type: ignore[type-arg]
    """Observations of a model of which only the residual stream matters."""
    mixer = build_mixer(MambaConfig(mixer="quaternion", d_model=2, d_state=1))
    return calibrate(mixer, torch.ones(1, 2, 2))


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from([1, 2, 4]),
    st.floats(1e-3, 20),
    st.floats(1e-3, 20),
    st.integers(6, 14),
    st.sampled_from([24, 29]),
    st.integers(0, 99),
)
def test_no_turn_is_longer_than_one_and_all_are_near_the_cayley_transform(
    components: int, A: float, b: float, q_bits: int, max_bits: int, seed: int
) -> None:
    fit = fit_cayley("q", A, b, components, q_bits, max_bits)
    graph = transform(fit, components, max_bits)
    random = np.random.default_rng(seed)
    shape = (400, 1, components)
    # The slowest and the fastest, where rounding counts most, and turns without fading.
    size = np.exp2(random.uniform(0, math.log2(max(fit.A_limit, fit.b_limit)), shape))
    u = np.rint(size * random.choice([-1, 1], shape)).astype(np.int64)
    u[:, :, 0] = np.abs(u[:, :, 0]) * random.integers(0, 2, shape[:2])
    limit = max(fit.A_limit, fit.b_limit)
    q = evaluate(graph, np.clip(u, -limit, limit))[:, 0]
    one = 1 << fit.q_bits
    assert (q * q).sum(-1).max() <= one * one
    real = np.zeros((400, 4))
    real[:, 0] = -np.clip(u[:, 0, 0], 0, fit.A_limit)
    real[:, 1:components] = np.clip(u[:, 0, 1:], -fit.b_limit, fit.b_limit)
    exact = cayley_reference(torch.from_numpy(real * 2.0 ** (1 - fit.u_frac))).numpy()[:, :components]
    # The margin and a rounding; and of 1 - q, at most 2, the share by which the divisor is too large.
    margin = MARGINS[components]
    largest = ((fit.A_limit * 2.0**-fit.u_frac + 1) ** 2 + 3 * (fit.b_limit * 2.0**-fit.u_frac) ** 2) * 1.1
    worst = (margin + 1) / one + 2 * (2.0 ** (1 - fit.divisor_places) + largest * margin / (one - margin))
    worst += 2 * 2.0**-fit.divisor_places
    assert np.abs(q / one - exact).max() <= worst


def test_states_keep_their_length_over_a_hundred_thousand_steps() -> None:
    """Turning without fading, a state neither grows nor ends at its limit."""
    fit = fit_cayley("q", 0.5, 0.5, 4, 13, 29)
    random = np.random.default_rng(0)
    u = np.rint(random.uniform(-1, 1, (16, 1, 4)) * fit.b_limit).astype(np.int64)
    u[:, :, 0] = np.arange(16)[:, None] % 2 * 3
    q = evaluate(transform(fit, 4, 29), np.minimum(u, max(fit.A_limit, fit.b_limit)))
    scales = {"groups": 1, "q_bits": 13, "inflow_align": 13, "H_limit": 8191, "D_align": 0}
    entry = node("y", "scan", "x", "q", "B", "C", constants={"D": [0]}, **scales)
    shape = ScanShape(entry, [np.zeros((1, width)) for width in (1, 4, 4, 4)])
    turn, one, none = q.reshape(16, 4, 1, 1), np.ones((16, 1, 1), np.int64), np.zeros((16, 4, 1, 1), np.int64)
    H = np.zeros((16, *shape.state), np.int64)
    H = Scan._next(entry, shape, H, turn, random.integers(-3000, 3001, none.shape), one)
    start, largest = (H * H).sum(1).ravel(), np.zeros(16)
    for _ in range(100_000):
        H = Scan._next(entry, shape, H, turn, none, one)
        largest = np.maximum(largest, (H * H).sum(1).ravel())
    # Two roundings of a half in each of four components.
    assert (np.sqrt(largest) <= np.sqrt(start) + 2).all()


# -- fixed axes as complex states ------------------------------------------------------------------------


def mixer_of(**forms: object) -> QuaternionMamba2Block:
    torch.manual_seed(0)
    config = MambaConfig(**({"mixer": "quaternion", "d_model": 4, "d_state": 3, "n_groups": 2} | forms))  # type: ignore[arg-type]
    mixer = build_mixer(config)
    assert isinstance(mixer, QuaternionMamba2Block)
    with torch.no_grad():
        # No turn, one about i, one about -i, where the shortest turn is not unique.
        mixer.Lambda_imag[0] = torch.tensor([[0.0, 0, 0], [2.0, 0, 0], [-3.0, 0, 0]])
    return mixer


def test_the_complex_form_computes_what_the_quaternions_do() -> None:
    """C q ... q B of all pairs of inputs, in reals."""
    mixer = mixer_of()
    plain, complex_ = Modes.of(mixer, 4), Modes.of(mixer, 2)
    random = np.random.default_rng(0)
    x, dt = random.standard_normal(8), random.uniform(0.1, 1, 6)

    def read(modes: Modes) -> Array:
        def quaternions(weight: Array) -> torch.Tensor:
            return torch.from_numpy((weight @ x).reshape(4, modes.count).T.copy())

        half = np.zeros((modes.count, 4))
        half[:, 0] = -modes.A_rate * dt
        for i, rate in enumerate(modes.b_rates):
            half[:, 1 + i] = rate * dt
        q = cayley_reference(torch.from_numpy(2 * half))
        turned = quaternion_product_reference(q, quaternion_product_reference(q, quaternions(modes.B)))
        found: Array = quaternion_product_reference(quaternions(modes.C), turned).numpy()
        return found

    np.testing.assert_allclose(read(complex_), read(plain), atol=1e-12)
    assert (complex_.turning, plain.turning) == (2, 4)


def classifier(**forms: object) -> tuple[MambaForSequenceClassification, torch.Tensor]:
    torch.manual_seed(0)
    small = {
        "mixer": "quaternion",
        "n_features": 3,
        "d_model": 8,
        "n_layer": 1,
        "d_state": 2,
        "num_labels": 3,
    }
    model = MambaForSequenceClassification(MambaConfig(**(small | {"dt_max": 0.5} | forms)))  # type: ignore[arg-type]
    return model.eval(), torch.randint(0, 17, (32, 6, 3))


def converted_as(
    turning: int, config: ConversionConfig, monkeypatch: pytest.MonkeyPatch
) -> tuple[Graph, float]:
    """The graph with fixed axes in one form, and its noise beside the float model."""
    model, integers = classifier()
    monkeypatch.setitem(registry.BLOCKS, "quaternion", QuaternionConversion(turning))
    graph = convert(model, integers / 16, FORMAT, config).graph
    with torch.no_grad():
        exact = trace(model, integers / 16, lambda name, value: None).double().numpy()
    found = evaluate(graph, integers.numpy()) * 2.0 ** -graph.by_name[graph.output].frac
    return graph, float(np.square(found - exact).mean() / exact.var())


@pytest.mark.parametrize("turning", [2, 4])
@pytest.mark.parametrize("config", [ConversionConfig(), PROVABLE])
def test_either_form_of_a_fixed_axis_follows_the_model(
    turning: int, config: ConversionConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph, noise = converted_as(turning, config, monkeypatch)
    scan = graph.by_name["layer0.scan"]
    assert graph.types[scan.inputs[1]].shape[-1] == turning * 2
    assert noise < 0.01


def test_more_bits_follow_a_quaternion_model_by_forty_decibels(monkeypatch: pytest.MonkeyPatch) -> None:
    fine = ConversionConfig(activation_bits=12, weight_bits=12, scan_bits=13)
    assert converted_as(2, fine, monkeypatch)[1] < 1e-4


def test_a_selective_axis_stays_a_quaternion() -> None:
    model, integers = classifier(selective_axis=True)
    graph = convert(model, integers / 16, FORMAT).graph
    scan = graph.by_name["layer0.scan"]
    assert graph.types[scan.inputs[1]].shape == graph.types[scan.inputs[3]].shape


# -- whole models ----------------------------------------------------------------------------------------


@st.composite
def shapes(draw: st.DrawFn) -> dict[str, Any]:
    """Settings of a small model of any quaternion mixer."""
    mixer = draw(
        st.sampled_from(["quaternion", "quaternion_lite", "quaternion_full", "quaternion_full_lite"])
    )
    groups = draw(st.integers(1, 2)) if "full" not in mixer else 1
    norm = draw(st.sampled_from(["rms", "none"]))
    return {
        "mixer": mixer,
        "n_groups": groups,
        "selective_axis": mixer == "quaternion" and draw(st.booleans()),
        # Fewer channels less their mean are hardly more than signs.
        "d_model": groups * draw(st.integers(5, 7)),
        "expand": float(draw(st.integers(1, 2))),
        "n_layer": draw(st.integers(1, 2)),
        "d_conv": draw(st.integers(1, 4)),
        "d_state": draw(st.integers(1, 3)),
        "n_features": draw(st.sampled_from([0, 1, 3])),
        "bias": draw(st.booleans()),
        "conv_bias": draw(st.booleans()),
        "norm": norm,
        "final_norm": "layer" if norm == "none" else draw(st.sampled_from(["same", "layer"])),
        "pooling": draw(st.sampled_from(["last", "mean", "max"])),
        "dt_max": draw(st.sampled_from([0.02, 0.5])),
        "vocab_size": 7,
        "num_labels": 3,
    }


@settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    shapes(), st.sampled_from([1, 2, 7, 17]), st.booleans(), st.sampled_from([ConversionConfig(), PROVABLE])
)
def test_backends_agree_on_every_integer_and_with_the_float_model(
    shape: dict[str, Any], length: int, language: bool, config: ConversionConfig
) -> None:
    torch.manual_seed(0)
    model_config = MambaConfig(**(shape | ({"n_features": 0} if language else {})))
    model = (MambaForCausalLM if language else MambaForSequenceClassification)(model_config).eval()
    if model_config.n_features:
        integers = torch.randint(0, 17, (12, length, model_config.n_features))
        reals, form = integers / 16, FORMAT
    else:
        integers = reals = torch.randint(0, model_config.vocab_size, (12, length))
        form = None
    graph = convert(model, reals, form, config).graph
    equality = compare(graph, integers.numpy(), {"torch": torch_tracer(graph), "onnx": OnnxRunner(graph)})
    assert equality.equal, equality.first
    with torch.no_grad():
        exact = trace(model, reals, lambda name, value: None).double().numpy()
    found = evaluate(graph, integers.numpy()) * 2.0 ** -graph.by_name[graph.output].frac
    # Norms that take means off, of few channels, make much of little: this is about scales and signs.
    assert np.square(found - exact).mean() < 0.3 * np.square(exact).mean()
