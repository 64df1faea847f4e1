"""The graph's own promises, which the gadgets rely on: no input takes a tensor out of its proven interval."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mamba_int.graph import Graph
from mamba_int.operations.ssd import ssd_bounds
from tests.circuits.conftest import (
    GRAPHS,
    MODELS,
    Array,
    chain,
    extreme_inputs,
    interpret,
    node,
    random_input,
)
from tests.circuits.test_equality import built, mixed_input


def assert_inside(graph: Graph, x: Array) -> None:
    """Every tensor inside its interval, and its pairs inside their norm."""
    trace = interpret(graph, x)
    for name, tensor in graph.types.items():
        value = trace[name]
        assert tensor.low <= value.min(), name
        assert value.max() <= tensor.high, name
        assert np.abs(value).max() <= tensor.peak, name
        if tensor.pair_norm is not None:
            half = value.shape[-1] // 2
            squares = value[..., :half] ** 2 + value[..., half:] ** 2
            assert squares.max() <= tensor.pair_norm**2, name


@pytest.mark.parametrize("name", [*GRAPHS, *MODELS])
def test_extreme_inputs_stay_inside_every_interval(name: str) -> None:
    graph, _ = built(name)
    for x in [*extreme_inputs(graph), *(random_input(graph, seed) for seed in range(5))]:
        assert_inside(graph, x)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_norm_of_extreme_vectors_stays_inside_its_relational_bound(data: st.DataObject) -> None:
    d, octaves, per_octave = data.draw(st.tuples(st.integers(1, 9), st.integers(1, 8), st.integers(1, 2)))
    shift, limit = data.draw(st.integers(0, 4)), data.draw(st.integers(1, 60))
    frac = data.draw(st.integers(0, octaves + shift - 1))
    high = data.draw(st.integers(1, 2000))
    held = {"input_shift": shift, "input_limit": limit, "octaves": octaves, "per_octave": per_octave}
    held["frac"] = frac
    graph = chain(node("y", "norm", "input", **held), T=64, C=d, low=-high, high=high)
    x = mixed_input(graph, data.draw(st.integers(0, 2**32)), 0.4)
    # One large element among small ones, and vectors just at a threshold, are the worst cases.
    x[:16] = 0
    x[np.arange(16), np.arange(16) % d] = np.linspace(-high, high, 16).round().astype(np.int64)
    x[16:32] = np.linspace(-high, high, 16).round().astype(np.int64)[:, None]
    assert_inside(graph, x)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_shears_of_any_constants_stay_inside_their_interval_and_norm(data: st.DataObject) -> None:
    frac, high = data.draw(st.integers(1, 11)), data.draw(st.integers(1, 127))
    one, half = 1 << frac, data.draw(st.integers(1, 3))
    random = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    if data.draw(st.booleans()):
        angle = random.uniform(-np.pi / 2, np.pi / 2, (3, half))
        lam = np.floor(-np.tan(angle / 2) * one + 0.5).astype(np.int64)
        gam = np.floor(np.sin(angle) * one + 0.5).astype(np.int64)
    else:
        lam, gam = random.integers(-2 * one, 2 * one + 1, (2, 3, half))
    constants = {"lam": lam, "gam": gam, "sign": random.choice([-1, 1], (3, half))}
    turn = node("r", "rotate", "input", constants=constants, form="shear", period=3, constant_frac=frac)
    graph = chain(turn, T=60, C=2 * half, low=-high, high=high)
    assert_inside(graph, mixed_input(graph, data.draw(st.integers(0, 2**32)), 0.7))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_table_rotations_of_any_constants_stay_inside_their_interval_and_norm(data: st.DataObject) -> None:
    frac, high = data.draw(st.integers(1, 11)), data.draw(st.integers(1, 127))
    random = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    cos, sin = random.integers(-2 << frac, (2 << frac) + 1, (2, 3, 2))
    constants = {"cos": cos, "sin": sin}
    turn = node("r", "rotate", "input", constants=constants, form="table", period=3, constant_frac=frac)
    graph = chain(turn, T=60, C=4, low=-high, high=high)
    assert_inside(graph, mixed_input(graph, data.draw(st.integers(0, 2**32)), 0.7))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_everything_inside_a_scan_stays_inside_ssd_bounds(data: st.DataObject) -> None:
    def whole(low: int, high: int, label: str) -> int:
        return data.draw(st.integers(low, high), label)

    k, H, P, N = whole(2, 8, "k"), whole(1, 2, "H"), whole(1, 2, "P"), 2 * whole(1, 2, "N/2")
    fA, Q, T, fR = whole(k, 12, "fA"), whole(1, 4, "Q"), whole(1, 24, "T"), whole(3, 10, "fR")
    cuts = {"x": H * P, "B": N, "C": N, "n_in": H}
    nodes, start = [], 0
    for name, width in cuts.items():
        nodes.append(node(name, "slice", "input", start=start, stop=start + width))
        start += width
    nodes.append(node("n", "clamp", "n_in", low=0, high=(1 << k) - 1, saturation=False))
    # Steps of a carried state keep the decay high: the worst case for H.
    turn = np.random.default_rng(whole(0, 99, "turn")).uniform(-3, 3, N // 2)
    cos, sin = (np.trunc(f(turn) * (1 << fR)).astype(np.int64) for f in (np.cos, np.sin))
    ranges = {
        "G_shift": (0, 6),
        "M_shift": (1, 12),
        "u_shift": (0, 8),
        "beta_shift": (0, 9),
        "H_align": (0, 4),
    }
    ranges |= {"M_align": (0, 3), "u_align": (0, 3), "D_align": (0, 3), "A_u_bits": (0, fA)}
    attributes = {name: whole(low, high, name) for name, (low, high) in ranges.items()}
    attributes |= {"chunk_size": Q, "headdim": P, "decay_bits": k, "A_bits": fA, "rotation_frac": fR}
    attributes["G_limit"] = whole(1, 5000, "G_limit")
    D = np.arange(H) * 3 - 2
    constants = {"D": D, "cos_Q": cos, "sin_Q": sin}
    nodes.append(node("y", "ssd", "x", "B", "C", "n", "B", constants=constants, **attributes))
    magnitude = max((1 << k) - 1, 20)
    graph = chain(*nodes, T=T, C=sum(cuts.values()), low=-magnitude, high=magnitude)
    x = mixed_input(graph, whole(0, 2**32, "seed"), 0.8)
    if data.draw(st.booleans(), "slow decay"):
        x[:, -H:] = np.where(x[:, -H:] < 0, (1 << k) - 1, np.minimum(x[:, -H:], (1 << k) - 1))
    if data.draw(st.booleans(), "constant inputs"):
        x[:, :-H] = x[0, :-H]
    assert_inside(graph, x)

    types, trace = graph.types, interpret(graph, x)
    norm = float(np.sqrt((cos**2 + sin**2).max())) / (1 << fR)
    bounds = ssd_bounds(
        attributes, types["x"], types["B"], types["C"], types["B"], int(np.abs(D).max()), norm
    )
    inside = {"G": bounds.G, "M": bounds.M, "A": 1 << fA}
    if T > Q:
        inside |= {"beta": bounds.beta, "H": bounds.H, "u": bounds.u, "kappa": 1 << fA, "sigma": 1 << fA}
    for name, bound in inside.items():
        assert np.abs(trace[f"y.{name}"]).max() <= bound, name
    assert trace["y.A"].sum(-1).max() <= bounds.row_sum


@settings(max_examples=100, deadline=None)
@given(st.integers(-50, 50), st.integers(0, 50), st.integers(1, 30))
def test_quotients_roots_and_squares_stay_inside_their_interval(low: int, width: int, least: int) -> None:
    values = np.arange(low, low + width + 1)
    square = chain(node("s", "mul", "input", "input"), T=len(values), C=1, low=low, high=low + width)
    assert_inside(square, values[:, None])
    exact = square.types["s"]
    assert (exact.low, exact.high) == ((values**2).min(), (values**2).max())
    root = chain(
        node("s", "mul", "input", "input"),
        node("r", "isqrt", "s"),
        T=len(values),
        C=1,
        low=low,
        high=low + width,
    )
    assert_inside(root, values[:, None])
    divided = chain(
        node("n", "slice", "input", start=0, stop=1),
        node("d_in", "slice", "input", start=1, stop=2),
        node("d", "clamp", "d_in", low=least, high=least + 20, saturation=False),
        node("q", "div", "n", "d"),
        T=len(values),
        C=2,
        low=min(low, 0),
        high=max(low + width, least + 20),
    )
    for divisor in (least, least + 20):
        assert_inside(divided, np.stack([values, np.full(len(values), divisor)], 1))
