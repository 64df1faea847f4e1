"""The bounds are proofs: no input and no constant leaves them, and a wrong one would be noticed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mamba_int.errors import MambaintError
from mamba_int.graph import Graph, IntArray, Node, TensorType
from mamba_int.native import build_nodes
from mamba_int.operations import OPERATIONS
from mamba_int.operations.norm import Norm
from mamba_int.operations.scan import Scan, ScanShape, product_terms
from mamba_int.operations.ssd import SsdBounds, ssd_bounds
from tests.circuits.conftest import GRAPHS
from tests.circuits_runtime.models import SMALL, MambaIntConfig, frozen_model
from tests.mamba_int.graphs import FORMS, chain, node, random_batch, scan_graph, traced

Trace = Mapping[str, IntArray]


def largest(value: Any) -> int:
    return int(np.abs(value).max(initial=0))


def bounds_of(graph: Graph, name: str) -> SsdBounds:
    """What the range rule proves inside a scan."""
    ssd, types = graph.by_name[name], [graph.types[source] for source in graph.by_name[name].inputs]
    norm = 0.0
    if len(types) == 5:
        cos, sin = ssd.constants["cos_Q"], ssd.constants["sin_Q"]
        norm = float(np.sqrt((cos**2 + sin**2).max())) / 2 ** ssd.integer("rotation_frac")
    B_next = types[4] if len(types) == 5 else None
    return ssd_bounds(ssd.attributes, types[0], types[1], types[2], B_next, largest(ssd.constants["D"]), norm)


def check_scan(graph: Graph, ssd: Node, trace: Trace) -> int:
    """Recompute the accumulators of a scan and hold each against its own bound; the largest of them."""
    a: dict[str, int] = {key: int(value) for key, value in ssd.attributes.items()}  # type: ignore[arg-type]
    b = bounds_of(graph, ssd.name)
    x, B, C, n = (trace[name] for name in ssd.inputs[:4])
    A, G, M = (trace[f"{ssd.name}.{name}"] for name in "AGM")
    batch, chunks, heads, Q, _ = A.shape

    def chunked(v: IntArray) -> IntArray:
        padded = np.pad(v, ((0, 0), (0, chunks * Q - v.shape[1]), (0, 0)))
        return padded.reshape(batch, chunks, Q, v.shape[-1])

    X = np.abs(chunked(x)).reshape(batch, chunks, Q, heads, a["headdim"])
    seen = {
        "row_sum": int(A.sum(-1).max()),
        "G_pre": int(np.einsum("bctn,bcsn->bcts", np.abs(chunked(C)), np.abs(chunked(B))).max()),
        "G": largest(G),
        "M_pre": largest(A[..., 1:] * G[:, :, None]),
        "M": largest(M),
        "Mx": int(np.einsum("bchts,bcshp->bcthp", np.abs(M), X).max()) << a["M_align"],
        "Dx": largest(X * np.abs(ssd.constants["D"])[:, None]) << a["D_align"],
    }
    if f"{ssd.name}.H" in trace:
        H, u, beta = (trace[f"{ssd.name}.{name}"] for name in ("H", "u", "beta"))
        half = H.shape[-1] // 2
        before = np.concatenate([np.zeros_like(H[:, :1]), H], 1)
        pairs = np.sqrt((H[..., :half] ** 2 + H[..., half:] ** 2).max(initial=0))
        inflow = np.einsum("bcshp,bchsn->bchpn", X, np.abs(beta)) << a["H_align"]
        kappa, sigma = (np.abs(trace[f"{ssd.name}.{name}"])[:, :, :, None] for name in ("kappa", "sigma"))
        H1, H2 = np.abs(before[..., :half]), np.abs(before[..., half:])
        turned = np.concatenate([kappa * H1 + sigma * H2, sigma * H1 + kappa * H2], -1)
        A_u = trace[f"{ssd.name}.A_u"]
        seen |= {
            "beta": largest(beta),
            "H": int(np.ceil(pairs)),
            "H_pre": largest(turned + inflow),
            "u_pre": int(np.einsum("bchpn,bctn->bchpt", np.abs(before), np.abs(chunked(C))).max()),
            "u": largest(u),
            "A_u_times_u": largest(A_u[:, :, :, None] * u) << a["u_align"],
        }
    for name, value in seen.items():
        assert value <= getattr(b, name), (ssd.name, name, value)
    shifts = [
        seen["G_pre"] + (1 << a["G_shift"] >> 1),
        seen["M_pre"] + (1 << a["M_shift"] >> 1),
        seen.get("H_pre", 0) + (1 << a["A_bits"] >> 1),
        seen.get("u_pre", 0) + (1 << a["u_shift"] >> 1),
    ]
    return max(largest(A[..., :-1] * chunked(n).max()), *shifts)


def check_states(entry: Node, operands: list[IntArray], trace: Trace) -> int:
    """Recompute the accumulators of quaternion states; the largest of them."""
    shape = ScanShape(entry, operands)
    x, q, B, C = (np.abs(plane) for plane in Scan.planes(shape, operands))
    H = np.abs(trace[f"{entry.name}.H"])
    assert largest(H) <= entry.integer("H_limit")
    before = np.concatenate([np.zeros_like(H[:, :1]), H[:, :-1]], 1)
    entering = (B[:, :, :, :, None] * x[:, :, None, :, :, None]) << entry.integer("inflow_align")
    D = np.abs(entry.constants["D"]).reshape(x.shape[-2:])
    found = [0]
    for m in range(shape.components):
        turned = sum(
            q[:, :, i, :, None] * before[:, :, j]
            for i, j, _ in product_terms(m, shape.turning, shape.components)
        )
        found.append(largest(turned + entering[:, :, m]) + (1 << entry.integer("q_bits") >> 1))
    for m in range(4):
        read = sum(
            (C[:, :, i, :, None] * H[:, :, j]).sum(-1) for i, j, _ in product_terms(m, 4, shape.components)
        )
        found.append(largest(read + (x * D << entry.integer("D_align") if m == 0 else 0)))
    return max(found)


def accumulator(graph: Graph, entry: Node, trace: Trace) -> int:
    """Largest intermediate that really occurs in a node: sums of |terms|, values before a shift."""
    operands = [trace[name] for name in entry.inputs]
    if entry.op == "shift" and entry.integer("places") > 0:
        return largest(operands[0]) + (1 << entry.integer("places") >> 1)
    if entry.op == "linear":
        bias = np.abs(entry.constants.get("bias", np.zeros(1, np.int64)))
        return largest(np.abs(operands[0]) @ np.abs(entry.constants["weight"]).T + bias)
    if entry.op == "conv":
        bias, taps = (
            np.abs(entry.constants.get("bias", np.zeros(1, np.int64))),
            np.abs(entry.constants["taps"]),
        )
        padded = np.pad(np.abs(operands[0]), ((0, 0), (taps.shape[1] - 1, 0), (0, 0)))
        steps = operands[0].shape[1]
        return largest(sum(padded[:, i : i + steps] * taps[:, i] for i in range(taps.shape[1])) + bias)
    if entry.op == "reduce" and entry.attributes["kind"] == "sum":
        return largest(np.abs(operands[0]).sum(1))
    if entry.op == "norm":
        multiplier = np.array(Norm.multipliers(entry))[trace[f"{entry.name}.level"]]
        scaled = largest(operands[0] * multiplier) + (1 << Norm.places(entry) >> 1)
        return max(largest(trace[f"{entry.name}.squares"]), scaled)
    if entry.op == "ssd":
        return check_scan(graph, entry, trace)
    if entry.op == "scan":
        return check_states(entry, operands, trace)
    return max((largest(value) for value in operands), default=0)


def assert_within(graph: Graph, trace: Trace) -> None:
    """Every tensor inside its interval, every accumulator within the peak, every pair within its norm."""
    for entry in graph.nodes:
        kind, value = graph.types[entry.name], trace[entry.name]
        assert value.shape[1:] == kind.shape or value.shape[1] != graph.seq_len, entry.name
        assert kind.low <= value.min() and value.max() <= kind.high, entry.name
        assert accumulator(graph, entry, trace) <= kind.peak, entry.name
        if kind.pair_norm is not None:
            half = kind.shape[-1] // 2
            pairs = value[..., :half] ** 2 + value[..., half:] ** 2
            assert pairs.max() <= kind.pair_norm**2, entry.name


# -- operations -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GRAPHS)
def test_no_input_leaves_the_interval_of_an_operation(name: str) -> None:
    graph = GRAPHS[name]()
    assert_within(graph, traced(graph, random_batch(graph, 1, count=40)))


@pytest.mark.parametrize("op", ["add", "sub", "mul", "div", "compare"])
@pytest.mark.parametrize("a", [(-3, 5), (-7, -2), (2, 9), (0, 0)])
@pytest.mark.parametrize("b", [(-4, 6), (-5, -1), (1, 3)])
def test_interval_of_a_binary_operation_is_reached_at_both_ends(
    op: str, a: tuple[int, int], b: tuple[int, int]
) -> None:
    """Neither too narrow (unsound) nor wider than its corners."""
    if op == "div" and b[0] < 1:
        b = (1, 4)
    graph = chain(
        node("l", "slice", "input", start=0, stop=1),
        node("r", "slice", "input", start=1, stop=2),
        node("lc", "clamp", "l", low=a[0], high=a[1], saturation=True),
        node("rc", "clamp", "r", low=b[0], high=b[1], saturation=True),
        node("y", op, "lc", "rc"),
        width=2,
        low=-9,
        high=9,
    )
    inputs = np.array(list(product(range(-9, 10), repeat=2)))[:, None]
    y = traced(graph, inputs)["y"]
    assert (y.min(), y.max()) == (graph.types["y"].low, graph.types["y"].high)


@pytest.mark.parametrize("a", [(-3, 5), (2, 9)])
@pytest.mark.parametrize("b", [(-4, 6), (-5, -1)])
def test_interval_of_a_choice_is_the_union_and_reached_at_both_ends(
    a: tuple[int, int], b: tuple[int, int]
) -> None:
    sides = zip(("l", "r"), (a, b), strict=True)
    graph = chain(
        node("s", "slice", "input", start=0, stop=1),
        node("c", "clamp", "s", low=0, high=1, saturation=False),
        node("t", "slice", "input", start=1, stop=2),
        *(node(name, "clamp", "t", low=low, high=high, saturation=True) for name, (low, high) in sides),
        node("y", "select", "c", "l", "r"),
        width=2,
        low=-9,
        high=9,
    )
    inputs = np.array(list(product(range(-9, 10), repeat=2)))[:, None]
    y = traced(graph, inputs)["y"]
    assert (y.min(), y.max()) == (graph.types["y"].low, graph.types["y"].high)
    assert (y.min(), y.max()) == (min(a[0], b[0]), max(a[1], b[1]))


@given(
    st.integers(1, 5),
    st.integers(1, 4),
    st.sampled_from([1, 127, 1 << 31, 1 << 53, (1 << 63) - 1]),
    st.integers(-300, 300),
    st.integers(0, 600),
    st.integers(0, 1000),
)
def test_bounds_of_a_matrix_are_those_of_python_integers_however_large_its_weights(
    outputs: int, terms: int, largest: int, low: int, width: int, seed: int
) -> None:
    """Sums that int64 cannot hold must not wrap: a foreign file chooses the weights."""
    random = np.random.default_rng(seed)
    weight = random.integers(-largest, largest, (outputs, terms), endpoint=True)
    weight[0] = random.choice([-largest, largest], terms)
    bias = random.integers(-largest, largest, outputs, endpoint=True)
    x = TensorType((1, terms), low, low + width)
    found = OPERATIONS["linear"].infer(
        node("y", "linear", constants={"weight": weight, "bias": bias}), [x], 1
    )
    rows = [[int(w) for w in row] for row in weight]
    ends = [
        [[min(w * x.low, w * x.high), max(w * x.low, w * x.high), abs(w) * x.magnitude] for w in row]
        for row in rows
    ]
    sums = [[sum(term[i] for term in row) for i in range(3)] for row in ends]
    assert found.low == min(s[0] + int(b) for s, b in zip(sums, bias, strict=True))
    assert found.high == max(s[1] + int(b) for s, b in zip(sums, bias, strict=True))
    assert found.peak == max(s[2] + abs(int(b)) for s, b in zip(sums, bias, strict=True))


def test_interval_of_a_table_is_that_of_the_entries_in_reach() -> None:
    held = {"values": [1 << 50, 7, -3, 5, -(1 << 50)]}
    graph = chain(node("y", "table", "input", constants=held, low=-2), width=3, low=-1, high=1)
    kind = graph.types["y"]
    assert (kind.low, kind.high, kind.peak) == (-3, 7, 7)
    assert_within(graph, traced(graph, np.array([[[-1, 0, 1]]])))


@pytest.mark.parametrize(("low", "high"), [(-5, 3), (-5, -2), (2, 6), (0, 4), (-3, 0), (0, 0)])
def test_interval_of_a_square_is_exact(low: int, high: int) -> None:
    graph = chain(node("y", "mul", "input", "input"), width=1, low=low, high=high)
    y = traced(graph, np.arange(low, high + 1)[:, None, None])["y"]
    assert graph.types["y"].high == y.max()
    assert graph.types["y"].low == y.min()


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 7),
    st.integers(0, 4),
    st.integers(1, 60),
    st.integers(1, 9),
    st.integers(1, 2),
    st.integers(0, 1 << 30),
)
def test_bound_of_the_norm_holds_where_its_level_changes(
    d: int, input_shift: int, limit: int, octaves: int, per_octave: int, seed: int
) -> None:
    """The relational rule: near every threshold, with one dominant element, and clamped."""
    ladder = {"octaves": octaves, "per_octave": per_octave}
    entry = node("y", "norm", "input", input_shift=input_shift, input_limit=limit, frac=0, **ladder)
    graph = chain(entry, width=d, low=-3000, high=3000)
    one = 1 << input_shift
    roots = [int(np.sqrt(threshold)) for threshold in Norm.thresholds(entry, d)]
    edges = [root * one + e for root in roots for e in (-one, -1, 0, one // 2, one)]
    edges += [limit * one + e for e in (-1, 0, one // 2 - 1, one // 2, one)] + [3000]
    random = np.random.default_rng(seed)
    single = np.zeros((len(edges), d), np.int64)
    single[:, 0] = edges
    values = np.concatenate([single, -single, np.repeat(np.array(edges)[:, None], d, 1)])
    values = np.concatenate([values, values + random.integers(-one, one + 1, values.shape)])
    assert_within(graph, traced(graph, np.clip(values, -3000, 3000)[:, None]))


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(["table", "shear"]), st.integers(0, 8), st.integers(0, 1 << 30))
def test_bound_of_a_rotation_holds_for_any_constants(form: str, frac: int, seed: int) -> None:
    """Also for those that are no rotation: a graph file may hold anything."""
    random, reach = np.random.default_rng(seed), 1 << (frac + 1)
    names = ("cos", "sin") if form == "table" else ("lam", "gam")
    constants = {name: random.integers(-reach, reach + 1, (2, 2)) for name in names}
    if form == "shear":
        constants["sign"] = random.choice([-1, 1], (2, 2))
    entry = node("y", "rotate", "input", constants=constants, form=form, period=2, constant_frac=frac)
    graph = chain(entry, width=4, low=-127, high=127, seq_len=2)
    assert_within(graph, traced(graph, random_batch(graph, seed, count=60)))


# -- whole models ---------------------------------------------------------------------------------------


def extreme(name: str, value: IntArray, random: np.random.Generator) -> IntArray:
    """The same constant at the ends of what training can make of it."""
    key = name.rsplit(".", 1)[1]
    if key in ("cos", "sin", "cos_Q", "sin_Q", "lam", "gam", "sign", "value"):
        return value
    reach = {"weight": 1 if np.abs(value).max() <= 1 else 127, "taps": 127, "D": 127, "table": 2047}
    limit = reach.get(key, 1 << 15)
    picked: IntArray = np.where(random.integers(0, 2, value.shape) > 0, limit, -limit)
    return picked


@pytest.mark.parametrize("adversarial", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_no_tensor_of_a_model_leaves_its_interval(form: str, adversarial: bool) -> None:
    config = MambaIntConfig(**(SMALL | FORMS[form]))
    model = frozen_model(config)
    random = np.random.default_rng(1)
    integers = {name: value.numpy() for name, value in model.frozen_integers().items()}
    if adversarial:
        integers = {name: extreme(name, value, random) for name, value in integers.items()}
    built = build_nodes(config, model.scales(), lambda name, frac: integers[name])
    graph = Graph(tuple(built.nodes), built.output, config.seq_len).verify(24 if not adversarial else 30)
    assert_within(graph, traced(graph, random_batch(graph, 2, count=12)))


# -- the scan over many chunks --------------------------------------------------------------------------


def worst_input(graph: Graph, steps: int, n: int | None, kind: str, seed: int) -> IntArray:
    """Inputs that push H to its bound: x and B always of one sign, turning with the state, or random."""
    random = np.random.default_rng(seed)
    ssd, shape = graph.by_name["y"], graph.types["input"].shape
    values = np.full((1, steps, shape[-1]), 127)
    if kind == "random signs":
        values = np.where(random.integers(0, 2, values.shape) > 0, 127, -128)
    elif kind == "turning":
        # x B' in step with the rotation of the state, so that every chunk adds to what is there
        cos, sin = ssd.constants["cos_Q"].astype(float), ssd.constants["sin_Q"].astype(float)
        angle = np.arctan2(sin, cos) * (np.arange(steps) // ssd.integer("chunk_size"))[:, None]
        width = shape[-1] - graph.types["n"].shape[-1]
        pair = np.concatenate([np.cos(angle), np.sin(angle)], -1)
        values[0, :, width - pair.shape[1] : width] = np.rint(127 * pair)
    heads = graph.types["n"].shape[-1]
    values[..., -heads:] = random.integers(-128, 128, (1, steps, heads)) if n is None else n - 128
    return values.astype(np.int64)


@pytest.mark.parametrize("kind", ["one sign", "random signs", "turning"])
@pytest.mark.parametrize("n", [0, 1, 128, 254, 255, None])
@pytest.mark.parametrize(("chunk", "angles"), [(1, (0.0, 0.0)), (4, (0.4, 1.3)), (16, (0.02, 0.1))])
def test_state_stays_within_its_bound_over_many_chunks(
    kind: str, n: int | None, chunk: int, angles: tuple[float, float]
) -> None:
    steps = 60 * chunk
    graph = scan_graph(steps, chunk, headdim=1, heads=2, angles=angles)
    trace = traced(graph, worst_input(graph, steps, n, kind, seed=1))
    assert_within(graph, trace)


def test_bound_of_the_state_is_not_idle() -> None:
    """The worst input that we know comes near it: one much larger would prove nothing useful."""
    graph = scan_graph(2000, 4, headdim=1, angles=(0.0, 0.0))
    reached = largest(traced(graph, worst_input(graph, 2000, 255, "one sign", 1))["y.H"])
    bound = bounds_of(graph, "y").H  # of a pair, sqrt(2) above an element that is alone
    assert bound / 2 < reached <= bound


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 32), st.integers(0, 1 << 30))
def test_rows_of_the_decay_products_sum_to_no_more_than_one_and_its_roundings(Q: int, seed: int) -> None:
    graph = scan_graph(Q + 1, Q, headdim=1)
    random = np.random.default_rng(seed)
    inputs = random_batch(graph, seed, count=2)
    inputs[..., -2:] = random.choice([-128, -127, 0, 126, 127], (*inputs.shape[:2], 2))
    sums = traced(graph, inputs)["y.A"].sum(-1)
    allowance = np.cumsum([0] + [t + 1 for t in range(1, Q)]) / 2
    assert (sums <= 4096 + allowance).all()
    assert sums.max() <= bounds_of(graph, "y").row_sum


def test_rotation_that_amplifies_the_state_is_refused() -> None:
    """Without decay (n = 255) a norm above 1 lets H grow for ever: no bound exists, so no graph."""
    with pytest.raises(MambaintError, match="the rotation amplifies"):
        graph = scan_graph(9, 1)
        graph.by_name["y"].constants["cos_Q"][:] = 1 << 10
        graph.by_name["y"].constants["sin_Q"][:] = 1 << 8
        Graph(graph.nodes, "y", 9).verify()


# -- negative controls ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["row_sum", "G_pre", "G", "M", "Mx", "Dx", "beta", "u"])
def test_bound_of_the_scan_that_is_too_small_would_be_noticed(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = scan_graph(33, 4, headdim=1, angles=(0.0, 0.0))
    trace = traced(graph, random_batch(graph, 1))
    assert_within(graph, trace)
    true = bounds_of(graph, "y")
    fields = {key: getattr(true, key) for key in SsdBounds.__dataclass_fields__}
    wrong = SsdBounds(**(fields | {name: fields[name] // 4 if name != "row_sum" else 4095}))
    monkeypatch.setattr(f"{__name__}.bounds_of", lambda *_: wrong)
    with pytest.raises(AssertionError):
        assert_within(graph, trace)


@pytest.mark.parametrize(
    "change",
    [
        lambda kind: TensorType(kind.shape, kind.low + 1, kind.high, kind.peak),
        lambda kind: TensorType(kind.shape, kind.low, kind.high - 1, kind.peak),
    ],
)
def test_interval_that_is_one_too_narrow_would_be_noticed(change: Callable[[TensorType], TensorType]) -> None:
    graph = GRAPHS["linear_ternary"]()
    weight = graph.by_name["lin"].constants["weight"]
    ends = np.where(weight[np.abs(weight).sum(1).argmax()] > 0, 9, -9)
    inputs = np.broadcast_to(np.stack([ends, -ends])[:, None], (2, graph.seq_len, len(ends))).astype(np.int64)
    trace = traced(graph, inputs)
    assert_within(graph, trace)
    graph.types["lin"] = change(graph.types["lin"])
    with pytest.raises(AssertionError):
        assert_within(graph, trace)
