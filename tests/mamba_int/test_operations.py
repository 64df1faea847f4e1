"""Every operation means what the specification says, and PyTorch computes the same integers."""

from __future__ import annotations

from math import isqrt
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mamba_int.executor import Executor
from mamba_int.graph import Graph, IntArray
from mamba_int.interpreter import check_input, evaluate
from mamba_int.operations import OPERATIONS
from mamba_int.operations.base import rounding_shift, shifted
from mamba_int.operations.rotate import unrotate
from tests.circuits.conftest import GRAPHS
from tests.mamba_int.graphs import (
    assert_equal,
    chain,
    decode,
    node,
    random_batch,
    scan_graph,
    traced,
)

# -- all of them ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GRAPHS)
def test_torch_equals_numpy_on_every_operation(name: str) -> None:
    graph = GRAPHS[name]()
    assert graph.max_bits <= 24
    assert Executor(graph).dtype is torch.float32
    assert_equal(graph, random_batch(graph, seed=1))


def test_no_operation_escapes_the_equality_test() -> None:
    assert {entry.op for make in GRAPHS.values() for entry in make().nodes} == set(OPERATIONS)


@pytest.mark.parametrize("name", [name for name in GRAPHS if name != "reduce_sum"])
@pytest.mark.parametrize("steps", [1, 2, 7, 11])
def test_torch_equals_numpy_at_lengths_the_graph_was_not_made_for(name: str, steps: int) -> None:
    graph = GRAPHS[name]()
    if any(entry.op == "reduce" or len(entry.inputs) == 4 for entry in graph.nodes):
        steps = graph.seq_len  # sums over a fixed time, or a scan of one chunk only
    assert_equal(graph, random_batch(graph, seed=2, seq_len=steps))


def test_a_batch_of_nothing_gives_nothing() -> None:
    graph = scan_graph(5, 2)
    empty = check_input(graph, np.zeros((0, 5, 18)))
    assert evaluate(graph, empty).shape == Executor(graph)(torch.from_numpy(empty)).shape == (0, 5, 4)


# -- shift ----------------------------------------------------------------------------------------------


@given(st.integers(-(1 << 50), 1 << 50), st.integers(-8, 40))
def test_shift_rounds_halves_up_on_both_sides_of_zero(x: int, k: int) -> None:
    # floor(x / 2^k + 1/2) = floor((2x + 2^k) / 2^(k+1)), in exact rational arithmetic
    expected = x * 2**-k if k < 0 else (2 * x + 2**k) // 2 ** (k + 1)
    assert rounding_shift(np.array([x]), k).item() == shifted(x, k) == expected


def test_ties_and_negatives_of_shift_by_hand() -> None:
    values = np.array([-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6])
    rounded = [-2, -2, -1, -1, -1, -1, 0, 0, 0, 0, 1, 1, 1, 1, 2]
    assert rounding_shift(values, 2).tolist() == rounded
    assert rounding_shift(values, 0).tolist() == values.tolist()
    assert rounding_shift(values, -3).tolist() == (values * 8).tolist()


@pytest.mark.parametrize("k", [-3, 0, 1, 5, 12, 22, 23])
def test_shift_is_exact_in_float32_up_to_the_last_of_24_bits(k: int) -> None:
    reach = (1 << 24) - (1 << k >> 1) if k > 0 else 1 << (24 + k)
    top = isqrt(reach)
    graph = chain(node("y", "shift", "input", places=k), width=513, low=-reach, high=reach)
    assert graph.max_bits == 24 and Executor(graph).dtype is torch.float32
    edge = np.arange(257)
    values = np.concatenate([reach - edge, edge - 128 + top]) * np.resize([1, -1], 514)
    assert_equal(graph, np.stack([values[:513], -values[:513]])[:, None])


def test_beyond_24_bits_float64_takes_over() -> None:
    # 2^24 + 1 is the first integer that float32 cannot hold
    graph = chain(node("y", "shift", "input", places=1), width=1, low=0, high=(1 << 24) + 1)
    assert Executor(graph).dtype is torch.float64
    assert_equal(graph, np.array([[[(1 << 24) + 1]]]))


# -- isqrt, div -----------------------------------------------------------------------------------------

ROOTS = np.unique(
    np.concatenate([np.arange(0, 300), (1 << np.arange(21)) - 1, 1 << np.arange(21), 2**20 - np.arange(300)])
)


@pytest.mark.parametrize("offset", [-1, 0, 1])
def test_isqrt_is_exact_beside_perfect_squares_up_to_2_to_40(offset: int) -> None:
    values = np.maximum(ROOTS**2 + offset, 0)
    graph = chain(node("y", "isqrt", "input"), width=len(values), low=0, high=(1 << 40) + 1)
    found = evaluate(graph, values[None, None])
    assert found.ravel().tolist() == [isqrt(int(value)) for value in values]
    assert_equal(graph, values[None, None])


@given(st.integers(0, (1 << 50) - 1))
def test_isqrt_is_the_floor_of_the_root(value: int) -> None:
    graph = chain(node("y", "isqrt", "input"), width=1, low=0, high=(1 << 50) - 1)
    inputs = np.array([[[value]]])
    assert evaluate(graph, inputs).item() == isqrt(value)
    assert Executor(graph)(torch.from_numpy(inputs)).item() == isqrt(value)


@given(st.lists(st.tuples(st.integers(-(1 << 24), 1 << 24), st.integers(1, 1 << 24)), min_size=1, max_size=9))
def test_div_floors_and_its_float_quotient_never_crosses_an_integer(pairs: list[tuple[int, int]]) -> None:
    pairs += [(a - a % b + e, b) for a, b in pairs for e in (-1, 0, 1) if abs(a - a % b + e) <= 1 << 24]
    graph = chain(
        node("x", "slice", "input", start=0, stop=1),
        node("d_in", "slice", "input", start=1, stop=2),
        node("d", "clamp", "d_in", low=1, high=1 << 24, saturation=True),
        node("y", "div", "x", "d"),
        width=2,
        low=-(1 << 24),
        high=1 << 24,
    )
    assert Executor(graph).dtype is torch.float32
    inputs = np.array(pairs)[:, None]
    assert evaluate(graph, inputs).ravel().tolist() == [a // b for a, b in pairs]
    assert_equal(graph, inputs)


# -- compare, select, table ------------------------------------------------------------------------------


def test_compare_is_one_at_equality_and_zero_just_below() -> None:
    against = chain(node("y", "compare", "input", constants={"value": -3}), width=3, low=-9, high=9)
    assert evaluate(against, np.array([[[-4, -3, -2]]])).tolist() == [[[0, 1, 1]]]
    each = chain(node("y", "compare", "input", constants={"value": [0, 5, -9]}), width=3, low=-9, high=9)
    assert evaluate(each, np.array([[[-1, 5, -9]], [[0, 4, 9]]])).tolist() == [[[0, 1, 1]], [[1, 0, 1]]]
    assert evaluate(each, np.array([[[0, 0, 0]]])).dtype == np.int64


@pytest.mark.parametrize("value", [(1 << 24) + 1, -(1 << 24) - 1])
def test_compare_with_what_float32_would_round_to_its_neighbour(value: int) -> None:
    graph = chain(
        node("y", "compare", "input", constants={"value": value}), width=2, low=-(1 << 24), high=1 << 24
    )
    inputs = np.array([[[1 << 24, -(1 << 24)]]])
    assert evaluate(graph, inputs).tolist() == [[[int(value < 0)] * 2]]
    assert_equal(graph, inputs)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(*[st.integers(-(1 << 24), 1 << 24)] * 3), min_size=1, max_size=9))
def test_choice_by_comparison_is_that_of_python_and_exact_to_the_last_of_24_bits(
    triples: list[tuple[int, int, int]],
) -> None:
    # Equal ones, neighbours, and both ends: a - b takes 25 bits.
    triples += [(a, a + e, c) for a, _, c in triples for e in (-1, 0, 1) if abs(a + e) <= 1 << 24]
    triples += [(0, 1 << 24, -(1 << 24)), (0, -(1 << 24), (1 << 24) - 1), (1, 1 - (1 << 24), 1 << 24)]
    cut = [node(name, "slice", "input", start=i, stop=i + 1) for i, name in enumerate("abc")]
    graph = chain(
        *cut,
        node("g", "compare", "a", "b"),
        node("y", "select", "g", "b", "c"),
        width=3,
        low=-(1 << 24),
        high=1 << 24,
    )
    assert Executor(graph).dtype is torch.float32
    inputs = np.array(triples)[:, None]
    assert evaluate(graph, inputs).ravel().tolist() == [b if a >= b else c for a, b, c in triples]
    assert_equal(graph, inputs)


@settings(deadline=None, max_examples=60)
@given(st.integers(-40, 40), st.integers(0, 9), st.integers(0, 9), st.integers(0, 9), st.integers(0, 1 << 30))
def test_table_gives_the_entry_of_every_integer_it_covers(
    low: int, before: int, width: int, after: int, seed: int
) -> None:
    reach = 1 << 24
    held = np.random.default_rng(seed).integers(-reach, reach + 1, before + width + 1 + after)
    entry = node("y", "table", "input", constants={"values": held}, low=low - before)
    graph = chain(entry, width=width + 1, low=low, high=low + width)
    inputs = np.arange(low, low + width + 1)[None, None]
    assert evaluate(graph, inputs).ravel().tolist() == held[before : before + width + 1].tolist()
    assert_equal(graph, inputs)


# -- norm -----------------------------------------------------------------------------------------------


def norm_graph(
    d: int, input_shift: int = 0, limit: int = 511, high: int = 32767, frac: int = 5, per_octave: int = 1
) -> Graph:
    ladder = {"octaves": 10, "per_octave": per_octave}
    entry = node("y", "norm", "input", input_shift=input_shift, input_limit=limit, frac=frac, **ladder)
    return chain(entry, width=d, low=-high, high=high)


@pytest.mark.parametrize("i", range(4))
@pytest.mark.parametrize("sign", [1, -1])
def test_norm_takes_the_lower_power_at_the_exact_threshold(i: int, sign: int) -> None:
    # all |x| = 2^i: the sum of squares is d 4^i, which is not above the threshold; one more unit is
    d = 4
    graph = norm_graph(d)
    at = np.full((1, 1, d), sign << i)
    above = at.copy()
    above[..., 0] += sign
    levels = [traced(graph, x)["y.level"].item() for x in (at, above)]
    assert levels == [i, i + 1]
    assert evaluate(graph, at).ravel().tolist() == [sign * 32] * d
    assert_equal(graph, np.concatenate([at, above]))


@pytest.mark.parametrize("d", [2, 3])
def test_norm_of_two_steps_an_octave_multiplies_by_three_halves_below_the_half_octave(d: int) -> None:
    """Sums of squares at d 4^i / 2 and one above it; for odd d the half lies between two integers."""
    graph = norm_graph(d, per_octave=2)
    # 2 * 4^2 / 2 = 16 = 4^2 + 0; 3 * 4^2 / 2 = 24 = 4^2 + 2^2 + 2^2
    at = np.array([[[4, 0]], [[4, 1]]]) if d == 2 else np.array([[[4, 2, 2]], [[4, 3, 0]]])
    assert traced(graph, at)["y.level"].ravel().tolist() == [4, 5]
    assert evaluate(graph, at)[:, 0, 0].tolist() == [4 * 32 * 3 // 2 // 4, 4 * 32 // 4]
    assert_equal(graph, at)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 9), st.integers(0, 1 << 30))
def test_norm_brings_the_root_mean_square_to_within_half_an_octave(d: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    values = np.clip(random.integers(-1 << random.integers(3, 9), 1 << 9, (16, 1, d)), -511, 511)
    y = evaluate(norm_graph(d, frac=7, per_octave=2), values)
    rms = np.sqrt((y**2).mean(-1))[(values**2).sum((1, 2)) > 0] / 128
    assert ((rms > 0.70) & (rms < 1.07)).all()


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 9), st.integers(0, 4), st.integers(0, 6), st.integers(1, 2), st.integers(0, 1 << 30))
def test_norm_equals_in_torch_at_every_size(
    d: int, input_shift: int, frac: int, per_octave: int, seed: int
) -> None:
    limit = 1 + seed % 511
    graph = norm_graph(d, input_shift, limit, 1 << 12, frac, per_octave)
    random = np.random.default_rng(seed)
    size = 1 << random.integers(0, 13, (16, 1, 1))
    values = np.clip(random.integers(-size, size + 1, (16, 1, d)), -(1 << 12), 1 << 12)
    values[0] = 0
    assert_equal(graph, values)
    # The definition once more, with exact integers.
    for x, y in zip(values[:, 0].tolist(), evaluate(graph, values)[:, 0].tolist(), strict=True):
        half = (1 << input_shift) >> 1
        xs = [max(-limit, min(limit, (v + half) // (1 << input_shift))) for v in x]
        square = sum(v * v for v in xs)
        j = sum(square > d * 4**i for i in range(10))
        places = j + input_shift - frac
        if per_octave == 2 and 2 * square <= d * 4**j:
            assert y == [shifted(3 * v, places + 1) for v in x]
        else:
            assert y == [shifted(v, places) for v in x]


# -- conv, rotate ---------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 9), st.integers(1, 6), st.integers(1, 3), st.integers(0, 1 << 30))
def test_conv_reads_no_step_of_the_future_and_zeros_before_the_first(
    steps: int, width: int, channels: int, seed: int
) -> None:
    random = np.random.default_rng(seed)
    taps, bias = random.integers(-127, 128, (channels, width)), random.integers(-99, 99, channels)
    graph = chain(
        node("y", "conv", "input", constants={"taps": taps, "bias": bias}),
        width=channels,
        low=-128,
        high=127,
        seq_len=steps,
    )
    inputs = random_batch(graph, seed)
    assert_equal(graph, inputs)
    y = evaluate(graph, inputs)
    for t in range(steps):
        wanted = bias.copy()
        for i in range(width):
            if t - (width - 1) + i >= 0:
                wanted = wanted + taps[:, i] * inputs[:, t - (width - 1) + i]
        assert (y[:, t] == wanted).all()


def shear_node(angle: IntArray, frac: int) -> Any:
    folded = np.arctan(np.tan(angle))
    constants = {
        "lam": np.floor(-np.tan(folded / 2) * 2**frac + 0.5),
        "gam": np.floor(np.sin(folded) * 2**frac + 0.5),
        "sign": np.where(np.cos(angle) >= 0, 1, -1),
    }
    return node(
        "y", "rotate", "input", constants=constants, form="shear", period=len(angle), constant_frac=frac
    )


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 11), st.integers(1, 4), st.integers(1, 3), st.integers(0, 12), st.integers(0, 1 << 30))
def test_shear_rotation_is_undone_exactly(steps: int, period: int, half: int, frac: int, seed: int) -> None:
    angle = np.random.default_rng(seed).uniform(-7, 7, (period, half))
    graph = chain(shear_node(angle, frac), width=2 * half, low=-128, high=127, seq_len=steps)
    inputs = random_batch(graph, seed)
    assert_equal(graph, inputs)
    rotated = evaluate(graph, inputs)
    assert (unrotate(graph.by_name["y"], rotated) == inputs).all()


@pytest.mark.parametrize("angle", [0.0, np.pi / 2, np.pi, -np.pi / 2, -np.pi, 2.5, -0.4])
def test_shear_turns_the_way_the_table_does(angle: float) -> None:
    """A wrong sign or a forgotten half turn is off by the length of the vector, not by roundings."""
    inputs = np.array([[[100, 37]], [[-100, 80]], [[0, -127]]])
    frac, grid = 12, np.array([[angle]])
    table = {"cos": np.rint(np.cos(grid) * 2**frac), "sin": np.rint(np.sin(grid) * 2**frac)}
    turned = node("y", "rotate", "input", constants=table, form="table", period=1, constant_frac=frac)
    results = [
        evaluate(chain(entry, width=2, low=-128, high=127), inputs)
        for entry in (turned, shear_node(grid, frac))
    ]
    assert np.abs(results[0] - results[1]).max() <= 2


# -- ssd ------------------------------------------------------------------------------------------------


def assert_decodes(graph: Graph, inputs: IntArray) -> None:
    """Every number of the chunked scan is that of the token-by-token one."""
    trace = traced(graph, inputs)
    Q = min(graph.by_name["y"].integer("chunk_size"), inputs.shape[1])
    P = graph.by_name["y"].integer("headdim")
    for i, heads in enumerate(decode(graph, trace)):
        for head, steps in enumerate(heads):
            for t, step in enumerate(steps):
                chunk, offset = divmod(t, Q)
                assert trace["y"][i, t, head * P : (head + 1) * P].tolist() == step["y"].tolist()
                assert trace["y.A"][i, chunk, head, offset, : offset + 2].tolist() == step["A"]
                assert trace["y.G"][i, chunk, offset, : offset + 1].tolist() == step["G"]
                assert trace["y.M"][i, chunk, head, offset, : offset + 1].tolist() == step["M"]
                if inputs.shape[1] > Q:
                    assert trace["y.u"][i, chunk, head, :, offset].tolist() == step["u"].tolist()
                    assert trace["y.A_u"][i, chunk, head, offset] == step["A_u"]
                if "H" in step and t + 1 < inputs.shape[1]:
                    assert trace["y.H"][i, chunk, head].tolist() == step["H"].tolist()


@pytest.mark.parametrize("seed", range(3))
def test_scan_with_chunks_of_one_is_the_plain_step_by_step_scan(seed: int) -> None:
    """Q = 1 written out: h' = shift((kap, sig) h + (x beta) << c, fA), y = M x + A_u u + D x."""
    graph = scan_graph(9, 1, headdim=1, heads=1, state=2, angles=(0.9,), D=(-77,))
    a = {key: int(value) for key, value in graph.by_name["y"].attributes.items()}  # type: ignore[arg-type]
    constants = graph.by_name["y"].constants
    cos, sin = int(constants["cos_Q"][0]), int(constants["sin_Q"][0])
    inputs = random_batch(graph, seed)
    trace = traced(graph, inputs)

    def shift(v: int, k: int) -> int:
        return (v + 2**k // 2) // 2**k

    for i in range(len(inputs)):
        h1 = h2 = 0
        for t in range(9):
            x = int(trace["x"][i, t, 0])
            B, C, Bn = (trace[name][i, t].tolist() for name in ("B", "C", "B_next"))
            n = int(trace["n"][i, t, 0])
            u = shift(h1 * C[0] + h2 * C[1], a["u_shift"])
            own = (256 - n) * 16
            G = max(-a["G_limit"], min(a["G_limit"], shift(B[0] * C[0] + B[1] * C[1], a["G_shift"])))
            M = shift(own * G, a["M_shift"])
            y = 16 * M * x + shift(16 * n, 2) * u + -77 * x * 64
            assert trace["y"][i, t, 0] == y
            kap, sig = shift(16 * n * cos, 10), shift(16 * n * sin, 10)
            gain = [shift(own * b, a["beta_shift"]) * x * 2 ** a["H_align"] for b in Bn]
            h1, h2 = (
                shift(kap * h1 - sig * h2 + gain[0], 12),
                shift(sig * h1 + kap * h2 + gain[1], 12),
            )


@settings(deadline=None, max_examples=30)
@given(
    st.integers(1, 14),
    st.integers(1, 9),
    st.sampled_from([(1, 1, 2), (2, 2, 4), (3, 1, 6), (1, 3, 8)]),
    st.integers(0, 1 << 30),
)
def test_chunked_scan_equals_decoding_token_by_token(
    steps: int, chunk: int, shape: tuple[int, int, int], seed: int
) -> None:
    headdim, heads, state = shape
    graph = scan_graph(steps, chunk, headdim, heads, state, D=(seed % 255 - 127, 5))
    inputs = random_batch(graph, seed, count=2)
    assert_equal(graph, inputs)
    assert_decodes(graph, inputs)


@pytest.mark.parametrize("n", [0, 1, 128, 254, 255])
def test_scan_decodes_with_decays_that_never_move(n: int) -> None:
    graph = scan_graph(33, 16)
    inputs = random_batch(graph, 5, count=1)
    inputs[..., -2:] = n - 128
    trace = traced(graph, inputs)
    assert (trace["n"] == n).all()
    assert_equal(graph, inputs)
    assert_decodes(graph, inputs)


def test_prefix_of_a_sequence_gives_the_same_first_outputs() -> None:
    """Padding the last chunk must not leak into it."""
    graph = scan_graph(23, 5)
    inputs = random_batch(graph, 3)
    whole = evaluate(graph, inputs)
    for steps in range(1, 23):
        assert (evaluate(graph, inputs[:, :steps]) == whole[:, :steps]).all()


def test_one_rotation_constant_off_by_one_is_noticed() -> None:
    """Negative control of the equalities above."""
    graph = scan_graph(65, 4)
    inputs = random_batch(graph, 3)
    before = traced(graph, inputs)
    graph.by_name["y"].constants["cos_Q"][0] += 1
    changed = sum((before[name] != value).sum() for name, value in traced(graph, inputs).items())
    assert changed > 20


def test_long_sequence_without_a_next_frame_is_refused_by_torch() -> None:
    graph = GRAPHS["ssd_one_chunk"]()
    with pytest.raises(ValueError, match="4 steps needs B_next"):
        Executor(graph)(torch.zeros(1, 4, graph.input.integer("features")))
