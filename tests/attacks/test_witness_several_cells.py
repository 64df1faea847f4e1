"""Attacks that change several cells at once, so that each equation but one still holds."""

from __future__ import annotations

import numpy as np
import pytest

from circuits.cells import FIELD
from circuits.circuit import Witness
from circuits.lowering import LoweredCircuit, build_circuit
from tests.circuits.conftest import Array, chain, interpret, node, random_input
from tests.circuits.lying import add_at, forge, override, privates, reject_all
from tests.circuits.test_equality import built

LINEAR = ("linear_ternary", "linear_two_groups", "linear_two_packs", "linear_many_rows")
LINEAR_SHIFTED = ("linear_int8_shifted", "linear_shifted_two_groups", "linear_shifted_two_packs")


def change(honest: Witness, changes: dict[str, list[tuple[int, int]]]) -> Witness:
    """A witness with several tensors changed, as field elements."""
    for name, deltas in changes.items():
        honest = override(honest, name, deltas)
    return honest


def setup(name: str) -> tuple[LoweredCircuit, Array, Witness]:
    graph, lowered = built(name)
    x = random_input(graph)
    return lowered, x, lowered.witness(x)


@pytest.mark.parametrize("name", LINEAR)
def test_digit_carry_in_a_packed_product(name: str) -> None:
    lowered, x, honest = setup(name)
    k, lies = lowered.circuit.logrows, {}
    for tensor, size in privates(lowered).items():
        graph, _ = built(name)
        outputs = graph.types["lin"].shape[-1]
        for i in range(size // outputs - 1):
            for sign in (1, -1):
                here, after = i * outputs, (i + 1) * outputs
                carry = {tensor: [(here, sign << k), (after, -sign)]}
                lies[f"{tensor} digit {i} to {i + 1}, {sign:+}"] = change(honest, carry)
        # The lowest digit is computed: a digit above it alone makes it overflow, by any power of the base.
        lies[f"{tensor} from the computed digit"] = change(honest, {tensor: [(0, 1)]})
        lies[f"{tensor} into the computed digit"] = change(honest, {tensor: [(0, -1)]})
        fraction = pow(1 << k, -1, FIELD)
        lies[f"{tensor} fraction into the computed digit"] = change(honest, {tensor: [(0, fraction)]})
    reject_all(lowered, x, lies)


@pytest.mark.parametrize("name", LINEAR_SHIFTED)
def test_remainder_traded_with_quotient_or_carried_to_the_next_step(name: str) -> None:
    lowered, x, honest = setup(name)
    graph, _ = built(name)
    k, outputs, lies = lowered.circuit.logrows, graph.types["q"].shape[-1], {}
    for tensor in [tensor for tensor in privates(lowered) if ".rho" in tensor]:
        q = tensor.replace(".rho", ".q")
        steps = len(honest.private[tensor]) // outputs
        for i in sorted({0, steps - 2, steps - 1}):
            here = i * outputs  # remainder i belongs to quotient i + 1
            for sign in (1, -1):
                traded = {tensor: [(here, sign << k)], q: [(here + outputs, -sign)]}
                lies[f"{tensor}[{i}] 2^k for one, {sign:+}"] = change(honest, traded)
                if i + 1 < steps:
                    carry = {tensor: [(here, sign << 2 * k), (here + outputs, -sign)]}
                    lies[f"{tensor}[{i}] carried to the next, {sign:+}"] = change(honest, carry)
                    swap = {tensor: [(here + outputs, -sign)], q: [(here + outputs, sign << k)]}
                    lies[f"{q}[{i}] carried to the next, {sign:+}"] = change(honest, swap)
        fraction = pow(1 << k, -1, FIELD)
        lies[f"{tensor} and {q} by a fraction"] = change(
            honest, {tensor: [(0, -1)], q: [(outputs, fraction)]}
        )
    reject_all(lowered, x, lies)


def test_split_remainder_traded_with_the_quotient() -> None:
    lowered, x, honest = setup("shift_9")
    places, fine = 9, lowered.circuit.logrows - 4
    whole, lies = 1 << (places - fine), {}
    for i in range(0, x.size, 3):
        for sign in (1, -1):
            lies[f"coarse limb beyond its window [{i}] {sign:+}"] = change(
                honest, {"q.q": [(i, sign)], "q.h": [(i, -sign * whole)]}
            )
        lies[f"fraction of the quotient into the coarse limb [{i}]"] = change(
            honest, {"q.q": [(i, pow(whole, -1, FIELD))], "q.h": [(i, -1)]}
        )
    reject_all(lowered, x, lies)


def test_limbs_of_a_quotient_too_wide_for_the_table_traded() -> None:
    cube = (node("square", "mul", "input", "input"), node("cube", "mul", "square", "input"))
    graph = chain(*cube, node("q", "shift", "cube", places=1), T=1, C=2, low=-9, high=9)
    lowered = build_circuit(graph)
    x = np.array([[7, -9]])
    honest = lowered.witness(x)
    assert {"q.q1", "q.q0"} <= set(privates(lowered)), "the split form"
    reach = max(-graph.types["q"].low, graph.types["q"].high)
    whole, lies = 1 << reach.bit_length() - (lowered.circuit.logrows - 2), {}
    for i in range(2):
        for sign in (1, -1):
            lies[f"lower limb beyond its window [{i}] {sign:+}"] = change(
                honest, {"q.q1": [(i, sign)], "q.q0": [(i, -sign * whole)]}
            )
            fraction = sign * pow(whole, -1, FIELD)
            lies[f"fraction of the upper limb [{i}] {sign:+}"] = change(
                honest, {"q.q1": [(i, fraction)], "q.q0": [(i, -sign)]}
            )
    reject_all(lowered, x, lies)


def test_packed_split_remainder_traded_between_quotient_limb_remainder_and_next_step() -> None:
    lowered, x, honest = setup("linear_split_shift")
    graph, _ = built("linear_split_shift")
    k, outputs = lowered.circuit.logrows, graph.types["q"].shape[-1]
    coarse = graph.by_name["q"].integer("places") - (k - 4)
    assert coarse > 0 and {"q.q", "q.h", "q.rho"} <= set(privates(lowered)), "the packed, split form"
    steps, lies = len(x), {}
    for sign in (1, -1):
        for t in range(1, steps):
            here, rho = t * outputs, (t - 1) * outputs
            lies[f"quotient and limb of step {t} {sign:+}"] = change(
                honest, {"q.q": [(here, sign)], "q.h": [(here, -sign << coarse)]}
            )
            lies[f"limb and remainder of step {t} {sign:+}"] = change(
                honest, {"q.h": [(here, sign)], "q.rho": [(rho, -sign << k)]}
            )
            lies[f"quotient and remainder of step {t} {sign:+}"] = change(
                honest, {"q.q": [(here, sign)], "q.rho": [(rho, -sign << k + coarse)]}
            )
            lies[f"quotient of step {t - 1} into the remainder of {t} {sign:+}"] = change(
                honest, {"q.q": [(here - outputs, sign << k)], "q.rho": [(rho, -sign)]}
            )
        lies[f"quotient and limb of the computed digit {sign:+}"] = change(
            honest, {"q.q": [(0, sign)], "q.h": [(0, -sign << coarse)]}
        )
        lies[f"limb into the computed digit {sign:+}"] = change(honest, {"q.h": [(0, sign)]})
        fraction = sign * pow(1 << coarse, -1, FIELD)
        lies[f"fraction of a quotient into the limb {sign:+}"] = change(
            honest, {"q.q": [(0, fraction)], "q.h": [(0, -sign)]}
        )
    reject_all(lowered, x, lies)


@pytest.mark.parametrize("name", ["embedding", "norm", "norm_clamped", "table"])
def test_one_hot_shifted_doubled_negative_empty_or_with_two_ones(name: str) -> None:
    lowered, x, honest = setup(name)
    tensor = next(tensor for tensor in privates(lowered) if tensor.endswith(".one_hot"))
    shape = next(base.shape for base in lowered.cells.bases if base.name == tensor)
    width = shape[-1] if len(shape) > 1 else privates(lowered)[tensor] // len(x)
    hot = honest.private[tensor].index(1)
    row, column = divmod(hot, width)
    other = row * width + (column + 1) % width
    further = row * width + (column + 2) % width
    lies = {
        "shifted up": [(hot, -1), (other, 1)],
        "shifted twice": [(hot, -1), (further, 1)],
        "two and minus one": [(hot, 1), (other, -1)],
        "minus one and two": [(hot, -2), (other, 2)],
        "two ones": [(other, 1)],
        "empty": [(hot, -1)],
        "one half each": [(hot, -pow(2, -1, FIELD)), (other, pow(2, -1, FIELD))],
        "a third of three": [
            (hot, pow(3, -1, FIELD) - 1),
            (other, pow(3, -1, FIELD)),
            (further, pow(3, -1, FIELD)),
        ],
    }
    reject_all(lowered, x, {what: change(honest, {tensor: deltas}) for what, deltas in lies.items()})


def test_one_hot_pointing_beside_the_entry_with_everything_after_it_recomputed() -> None:
    lowered, x, honest = setup("table")
    width, lies = privates(lowered)["out.one_hot"] // x.size, {}
    for row in range(x.size):
        hot = honest.private["out.one_hot"].index(1, row * width)
        for other in {hot - 1, hot + 1} & set(range(row * width, (row + 1) * width)):
            moved = {"out.one_hot": add_at((hot, -1), (other, 1))}
            lies[f"element {row}: {other - hot:+}"] = forge(lowered, x, moved)
            # Two columns whose mean is the right one: the index may hold, but not the sum, or by no integers.
            across = 2 * hot - other
            if row * width <= across < (row + 1) * width:
                pair = [(other, 1), (across, 1)]
                lies[f"element {row}: both sides of it"] = change(honest, {"out.one_hot": [(hot, -1), *pair]})
                half = pow(2, -1, FIELD)
                halves = [(hot, -1), (other, half), (across, half)]
                lies[f"element {row}: half of both"] = change(honest, {"out.one_hot": halves})
                less = [(hot, 2), (other, -1), (across, -1)]
                lies[f"element {row}: three and two minus ones"] = change(honest, {"out.one_hot": less})
    assert {what[-2:] for what in lies} >= {"+1", "-1"}
    reject_all(lowered, x, lies)


@pytest.mark.parametrize("name", ["compare_wide", "compare_wide_constant", "compare_beyond_the_table"])
def test_comparison_turned_at_equality_and_one_below_with_slacks_recomputed(name: str) -> None:
    graph, lowered = built(name)
    x = {
        "compare_wide": np.array([[0, 1, 29], [30, 31, 40], [-1, -40, 2]]),  # x^2 against 30 x
        "compare_wide_constant": np.array([[0, 2, -3, 20], [-1, 1, -4, 19]]),  # x^3 against a cube
        "compare_beyond_the_table": np.array([[-79, -80, -78, 40], [0, -79, -80, -1]]),
    }[name]
    honest, lies = lowered.witness(x), {}
    truth = interpret(graph, x)["out"].ravel()
    assert honest.private["out.bit"][: x.size] == truth.tolist() and {0, 1} == set(truth.tolist())
    half = pow(2, -1, FIELD)
    for i in range(x.size):
        turned = 1 - 2 * int(truth[i])
        lies[f"turned [{i}]"] = forge(lowered, x, {"out.bit": add_at((i, turned))})
        lies[f"turned alone [{i}]"] = override(honest, "out.bit", [(i, turned)])
        # For D >= 0 any bit above 1 keeps the inequality, for D < 0 any below 0: only the range stops it.
        for beyond in (2 * turned, -turned, 5 * turned, -5 * turned):
            lies[f"by {beyond:+} [{i}]"] = forge(lowered, x, {"out.bit": add_at((i, beyond))})
        lies[f"one half [{i}]"] = override(honest, "out.bit", [(i, half - int(truth[i]))])
        for sign in (1, -1):
            both = {"out.bit": [(i, turned)], "out.side.limb0": [(i, sign)]}
            lies[f"turned, with a limb of {sign:+} [{i}]"] = change(honest, both)
    reject_all(lowered, x, lies)


@pytest.mark.parametrize(
    "name", ["compare", "compare_odd", "compare_to_the_table_edge", "select", "select_by_a_clamp"]
)
def test_comparison_within_the_table_and_choice_leave_a_prover_nothing_to_choose(name: str) -> None:
    graph, lowered = built(name)
    assert not privates(lowered)
    x = random_input(graph)
    honest, lies = lowered.witness(x), {}
    for i in range(x.size):
        for what, delta in (("+1", 1), ("-1", -1), ("1/2", pow(2, -1, FIELD))):
            # The claimed outputs stay those of the true input.
            lie = override(honest, "model_input", [(i, delta)])
            other = x.copy()
            other.ravel()[i] += delta if abs(delta) == 1 else 0
            if what == "1/2" or (interpret(graph, other)["out"] != interpret(graph, x)["out"]).any():
                lies[f"input {what} [{i}]"] = Witness(lie.private, honest.public)
    logits = honest.public["logits"]
    for i, value in enumerate(logits):
        for wrong in {1 - value, value + 1, value - 1, -value} - {value}:
            claim = [*logits[:i], wrong, *logits[i + 1 :]]
            lies[f"output {wrong} for {value} [{i}]"] = Witness(
                honest.private, {**honest.public, "logits": claim}
            )
    reject_all(lowered, x, lies)


@pytest.mark.parametrize("name", ["norm", "norm_coarse", "norm_clamped", "norm_odd_and_shallow"])
def test_level_one_higher_or_lower_with_slacks_and_quotients_recomputed(name: str) -> None:
    _, lowered = built(name)
    shift = int(built(name)[0].by_name["y"].attributes["input_shift"])
    width = privates(lowered)["y.one_hot"] // 3
    # Sums of squares exactly at a threshold, one beyond it, and in between.
    x = np.full(lowered.tensors["input"].shape, 4 << shift)
    x[1, 0] += 1 << shift
    x[2] = 1 << shift
    honest, size = lowered.witness(x), 3 * width
    lies = {}
    for row in range(len(x)):
        hot = honest.private["y.one_hot"].index(1, row * width)
        for other in {hot - 1, hot + 1} & set(range(row * width, (row + 1) * width)) & set(range(size)):
            moved = add_at((hot, -1), (other, 1))
            lies[f"step {row}: {other - hot:+}"] = forge(lowered, x, {"y.one_hot": moved})
    assert {what[-2:] for what in lies} == {"+1", "-1"}
    reject_all(lowered, x, lies)


def test_root_beside_that_of_a_perfect_square_and_of_its_predecessor() -> None:
    # x^2 + 64 is a square in the first row and one less than a square in the second: either end is tight.
    _, lowered = built("isqrt")
    x = np.array([[0, 6, 15, -6], [4, 32, -4, -32], [1, 7, 16, -7], [-16, 1, 7, 40]])
    roots = lowered.witness(x).private["root.root"]
    assert roots[:4] == [8, 10, 17, 10]
    lies = {
        f"x = {x.ravel()[i]}, {delta:+}": forge(lowered, x, {"root.root": add_at((i, delta))})
        for i in range(x.size)
        for delta in (1, -1)
    }
    reject_all(lowered, x, lies)


def test_quotient_at_exact_multiples_of_the_divisor() -> None:
    # 16 z / (8 + |z|) leaves no remainder for many of these z, and the largest for -35.
    _, lowered = built("div")
    x = np.array([[0, 8, -8, 24], [-24, -35, -1, 40], [7, 9, -7, -9], [23, 25, -40, -23]])
    lies = {
        f"z = {x.ravel()[i]}, {delta:+}": forge(lowered, x, {"ratio.quotient": add_at((i, delta))})
        for i in range(x.size)
        for delta in (1, -1)
    }
    reject_all(lowered, x, lies)


@pytest.mark.parametrize("name", ["clamp_wide", "clamp_wide_one_sided"])
def test_clamped_value_moved_together_with_the_excess(name: str) -> None:
    lowered, x, honest = setup(name)
    names = list(privates(lowered))
    clamped = next(tensor for tensor in names if tensor.endswith(".clamped"))
    over, lies = clamped.replace(".clamped", ".over0"), {}
    for i in range(x.size):
        for sign in (1, -1):
            lies[f"over [{i}] {sign:+}"] = change(honest, {clamped: [(i, sign)], over: [(i, -sign)]})
            under = clamped.replace(".clamped", ".under0")
            if under in names:
                lies[f"under [{i}] {sign:+}"] = change(honest, {clamped: [(i, sign)], under: [(i, sign)]})
                both = {over: [(i, 1)], under: [(i, 1)]}
                lies[f"both [{i}]"] = change(honest, both)
    reject_all(lowered, x, lies)


def test_root_and_quotient_far_off_or_negative_with_slacks_recomputed() -> None:
    for name, tensor in (("isqrt", "root.root"), ("div", "ratio.quotient")):
        lowered, x, honest = setup(name)
        lies = {}
        for delta in (2, -2, 8):
            for i in range(0, x.size, 5):
                lies[f"{tensor}[{i}]{delta:+}"] = forge(lowered, x, {tensor: add_at((i, delta))})
        # The other root of x: -r squares to the same.
        value = honest.private[tensor][0]
        lies[f"{tensor} negative"] = override(honest, tensor, [(0, -2 * value)])
        reject_all(lowered, x, lies)


def test_quotient_whose_remainder_lies_beyond_the_declared_but_inside_the_true_table() -> None:
    # The published attack on EZKL's declared ranges: with multiplier m' for a table that ends where it was
    # declared, q - 1 leaves a remainder that the true table holds. Here every x, and every neighbour of q.
    graph = chain(node("q", "shift", "input", places=3), T=32, C=2, low=-60, high=60)
    lowered = build_circuit(graph)
    x = np.linspace(-60, 60, 64).round().astype(np.int64).reshape(32, 2)
    honest = lowered.witness(x)
    lies = {
        f"x = {x.ravel()[i]}, {d:+}": override(honest, "q.q", [(i, d)]) for i in range(64) for d in (1, -1)
    }
    reject_all(lowered, x, lies)
