"""The scan of real, complex and quaternion states: its meaning, the order of time, every way to run it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from circuits.lowering import build_circuit
from circuits.runtime.runner import OnnxRunner
from mamba_int.graph import Graph, IntArray, Node
from mamba_int.interpreter import evaluate
from mamba_int.operations import OPERATIONS
from quantize.equality import compare, torch_tracer
from quantize.operation_counts import count_operations
from tests.mamba_int.graphs import chain, node, random_batch, traced
from triton_kernels.scan import ScanScales, fused_scan, scan

FORMS = [(1, 1), (1, 4), (2, 4), (4, 4)]
"""Components of q, and of B and the states."""
SCALES = {"q_bits": 6, "inflow_align": 3, "H_limit": 500, "D_align": 5}


def scan_graph(
    turning: int, components: int, groups: int = 2, P: int = 3, N: int = 2, steps: int = 5, **scales: int
) -> Graph:
    """One scan whose operands are slices of the input; q reaches beyond one."""
    modes = groups * N
    widths = {"x": groups * P, "q": turning * modes, "B": components * modes, "C": 4 * modes}
    nodes, start = [], 0
    for name, width in widths.items():
        nodes.append(node(name, "slice", "input", start=start, stop=start + width))
        start += width
    D = {"D": np.arange(groups * P) - 2}
    nodes.append(node("y", "scan", "x", "q", "B", "C", constants=D, groups=groups, **(SCALES | scales)))
    return chain(*nodes, width=start, low=-100, high=100, seq_len=steps)


def multiply(a: list[int], b: list[int]) -> list[int]:
    """Hamilton's product, written out."""
    return [
        a[0] * b[0] - a[1] * b[1] - a[2] * b[2] - a[3] * b[3],
        a[0] * b[1] + a[1] * b[0] + a[2] * b[3] - a[3] * b[2],
        a[0] * b[2] - a[1] * b[3] + a[2] * b[0] + a[3] * b[1],
        a[0] * b[3] + a[1] * b[2] - a[2] * b[1] + a[3] * b[0],
    ]


def by_hand(entry: Node, operands: dict[str, IntArray], groups: int, P: int, N: int) -> IntArray:
    """One state at a time, as Python integers: y of one sequence."""
    a: Any = entry.attributes
    x, q, B, C = (operands[name] for name in "xqBC")
    steps, modes = len(x), groups * N

    def quaternion(values: IntArray, mode: int) -> list[int]:
        found = [int(v) for v in values[mode::modes]]
        return found + [0] * (4 - len(found))

    y = np.zeros((steps, 4, groups * P), np.int64)
    for channel in range(groups * P):
        states = [[0] * 4 for _ in range(N)]
        for t in range(steps):
            entering = int(x[t, channel])
            total = [entering * int(entry.constants["D"][channel]) << a["D_align"], 0, 0, 0]
            for n in range(N):
                mode = channel // P * N + n
                turned = multiply(quaternion(q[t], mode), states[n])
                inflow = [b * entering * 2 ** a["inflow_align"] for b in quaternion(B[t], mode)]
                states[n] = [
                    max(-a["H_limit"], min(a["H_limit"], (h + b + 2 ** (a["q_bits"] - 1)) >> a["q_bits"]))
                    for h, b in zip(turned, inflow, strict=True)
                ]
                read = multiply(quaternion(C[t], mode), states[n])
                total = [one + other for one, other in zip(total, read, strict=True)]
            y[t, :, channel] = total
    return y.reshape(steps, -1)


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(FORMS),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 6),
    st.data(),
)
def test_the_scan_is_hamiltons_product_from_the_left_in_the_order_of_time(
    form: tuple[int, int], groups: int, P: int, N: int, steps: int, data: st.DataObject
) -> None:
    graph = scan_graph(*form, groups, P, N, steps)
    width = graph.types["input"].shape[-1]
    inputs = np.random.default_rng(data.draw(st.integers(0, 99))).integers(-100, 101, (2, steps, width))
    trace = traced(graph, inputs)
    for i in range(2):
        operands = {name: trace[name][i] for name in "xqBC"}
        np.testing.assert_array_equal(trace["y"][i], by_hand(graph.by_name["y"], operands, groups, P, N))
    assert np.abs(trace["y.H"]).max() <= SCALES["H_limit"]


def test_turns_in_another_order_give_another_state() -> None:
    graph = scan_graph(4, 4, 1, 1, 1, 3, q_bits=6, inflow_align=6)
    i, j = [0, 64, 0, 0], [0, 0, 64, 0]
    first = [1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]
    steps = [[0, *turn, 0, 0, 0, 0, 1, 0, 0, 0] for turn in (i, j)]
    ij, ji = (evaluate(graph, np.array([[first, *order]]))[0, -1] for order in (steps, steps[::-1]))
    # j i = -k and i j = k, of a state that was 1.
    assert ij.tolist() == [0, 0, 0, -1] and ji.tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize("turning", [1, 2])
def test_a_complex_scan_is_the_quaternion_scan_that_turns_about_i(turning: int) -> None:
    narrow, wide = scan_graph(turning, 4), scan_graph(4, 4)
    inputs = random_batch(narrow)
    x, q, B, C = np.split(inputs, np.cumsum([narrow.types[name].shape[-1] for name in "xqB"]), -1)
    padded = np.concatenate([q, np.zeros((*q.shape[:-1], (4 - turning) * 4), np.int64)], -1)
    found = evaluate(wide, np.concatenate([x, padded, B, C], -1))
    np.testing.assert_array_equal(found, evaluate(narrow, inputs))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("steps", [1, 7])
@pytest.mark.parametrize("q_bits", [0, 6, 11])
def test_backends_compute_the_same_integers(form: tuple[int, int], steps: int, q_bits: int) -> None:
    # 11 places take the graph beyond 24 bits, to int32.
    graph = scan_graph(*form, steps=steps, q_bits=q_bits, H_limit=500 << q_bits)
    equality = compare(graph, random_batch(graph), {"torch": torch_tracer(graph), "onnx": OnnxRunner(graph)})
    assert equality.equal, equality.first


@pytest.mark.parametrize("form", FORMS)
def test_no_input_leaves_the_bounds_of_the_scan(form: tuple[int, int]) -> None:
    graph = scan_graph(*form, D_align=0, inflow_align=0)
    y, trace = graph.types["y"], traced(graph, random_batch(graph, count=50))
    assert y.low <= trace["y"].min() and trace["y"].max() <= y.high
    entry, limit = graph.by_name["y"], SCALES["H_limit"]
    # All at their ends, with signs that add up: the bound is reached where D adds nothing.
    terms = form[1] * 2
    reach = int(np.abs(entry.constants["D"]).max()) * 100
    assert y.high == terms * 100 * limit + reach
    assert y.peak == max(y.high, form[0] * 100 * limit + 100 * 100 + 32)


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"groups": 4}, "x does not fit the groups"),
        ({"H_limit": 0}, "H_limit"),
        ({"q_bits": -1}, "q_bits"),
    ],
)
def test_a_malformed_scan_is_refused(change: dict[str, int], cause: str) -> None:
    graph = scan_graph(2, 4)
    entry = graph.by_name["y"]
    wrong = Node("y", "scan", entry.inputs, {**entry.attributes, **change}, entry.constants)
    types = [graph.types[name] for name in entry.inputs]
    with pytest.raises(ValueError, match=cause):
        OPERATIONS["scan"].infer(wrong, types, 5)
    mixed = Node("y", "scan", ("x", "B", "q", "C"), entry.attributes, entry.constants)
    with pytest.raises(ValueError, match="4 components of q with 2 of B"):
        OPERATIONS["scan"].infer(mixed, [types[i] for i in (0, 2, 1, 3)], 5)


@pytest.mark.parametrize("challenged", [False, True])
def test_complex_states_take_fewer_cells_and_multiplications_than_quaternions(challenged: bool) -> None:
    graphs = [scan_graph(turning, 4, 1, 8, 2, 4) for turning in (2, 4)]
    # Of q alone the scan reads more: the input is left out.
    cells = []
    for graph in graphs:
        cost = build_circuit(graph, logrows=14, challenged=challenged).cost
        cells.append(sum(sum(kinds.values()) for part, kinds in cost.items() if part.startswith("y")))
    products = [count_operations(graph)["y"].multiplies for graph in graphs]
    assert cells[0] < cells[1] and products[0] < products[1]


@pytest.mark.parametrize("form", FORMS)
def test_multiplications_are_those_of_the_formulas(form: tuple[int, int]) -> None:
    (turning, components), groups, P, N, steps = form, 2, 3, 2, 5
    products = 0
    for t in range(steps):
        states = groups * P * N
        products += states * components  # B x
        products += states * components * turning if t else 0  # q H
        products += states * components * 4 + groups * P  # C H, D x
    assert count_operations(scan_graph(*form))["y"].multiplies == products


# -- the kernel -----------------------------------------------------------------------------------------


def check_kernel(device: str, form: tuple[int, int], groups: int, P: int, N: int, steps: int) -> None:
    random = torch.Generator().manual_seed(0)

    def integers(*shape: int) -> torch.Tensor:
        return torch.randint(-100, 101, shape, generator=random).float().to(device)

    batch, (turning, components) = 2, form
    x = integers(batch, steps, groups, P)
    q, B, C = (integers(batch, steps, width, groups, N) for width in (turning, components, 4))
    operands = (x, q, B, C, integers(groups * P), ScanScales(**SCALES))
    expected, _ = scan(*operands)
    assert torch.equal(fused_scan(*operands), expected)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 5, 4)])
def test_the_kernel_computes_the_same_integers(
    form: tuple[int, int], shape: tuple[int, int, int, int]
) -> None:
    check_kernel("cpu", form, *shape)


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 5, 4), (3, 1100, 3, 65), (2, 40, 64, 257)])
def test_the_compiled_kernel_computes_the_same_integers(
    form: tuple[int, int], shape: tuple[int, int, int, int]
) -> None:
    check_kernel("cuda", form, *shape)
