"""What the soundness argument rests on: windows against the true table, proven bounds, no cell left out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from circuits.cells import FIELD, Cells, CircuitTooNarrow
from circuits.circuit import Witness
from circuits.gadgets.choice import bit, pointer
from circuits.gadgets.values import check_range, nonnegative
from circuits.lowering import MODEL_INPUT, build_circuit
from tests.circuits.conftest import GRAPHS, MODELS, chain, extreme_inputs, node, random_input
from tests.circuits.lying import refuse_all, satisfied
from tests.circuits.test_equality import built


@settings(max_examples=200, deadline=None)
@given(st.integers(6, 12), st.data())
def test_range_checks_hold_exactly_their_range_at_every_width(k: int, data: st.DataObject) -> None:
    probe = Cells(k)
    low = data.draw(st.integers(probe.low, probe.high), "low")
    high = data.draw(st.integers(low, probe.high), "high")
    cells = Cells(k)
    ids = cells.private("v", (2,), low, high, lambda get: np.zeros(2, np.int64))
    check_range(cells, ids, low, high)
    cells.close()
    for value in {low - 1, low, (low + high) // 2, high, high + 1, cells.low, cells.high, -low, FIELD - 1}:
        signed = value if value <= FIELD // 2 else value - FIELD
        assert accepts(cells, {"v": [value, low]}) == (low <= signed <= high)


def accepts(cells: Cells, private: dict[str, list[int]]) -> bool:
    """Whether all lookups hold."""

    def lie(name: str) -> object:
        return lambda values: np.array(private[name], dtype=object).reshape(values.shape)

    values = cells.evaluate({}, {name: lie(name) for name in private})  # type: ignore[misc]
    looked_up = [values.get(base.operands[0]) for base in cells.bases if base.op == "relu"]
    signed = [(int(v) + FIELD // 2) % FIELD - FIELD // 2 for array in looked_up for v in array.ravel()]
    return all(cells.low <= v <= cells.high for v in signed)


@pytest.mark.parametrize("width", [6, 100, 237, 246, 247])
def test_a_range_wider_than_half_the_table_takes_two_lookups(width: int) -> None:
    cells = Cells(8)
    low = cells.low
    ids = cells.private("v", (2,), low, low + width, lambda get: np.zeros(2, np.int64))
    check_range(cells, ids, low, low + width)
    cells.close()
    assert accepts(cells, {"v": [low, low + width]})
    assert not accepts(cells, {"v": [low - 1, low]})
    assert not accepts(cells, {"v": [low, low + width + 1]})


def test_a_range_wider_than_the_table_asks_for_more_rows() -> None:
    assert build_circuit(chain(low=-120, high=128)).circuit.logrows == 9


@pytest.mark.parametrize("k", range(5, 15))
def test_a_bit_is_zero_or_one_at_every_width(k: int) -> None:
    cells = Cells(k)
    bit(cells, "g", (2,), lambda get: np.zeros(2, np.int64))
    cells.close()
    others = {-1, 2, 3, cells.low, cells.high, cells.low - 1, cells.high + 1}
    # Fractions whose multiple lies in the table are no integers themselves.
    others |= {pow(n, -1, FIELD) for n in (2, 3, 1 << (k - 1), 1 << k)}
    others |= {-value for value in others - {-1}}
    assert accepts(cells, {"g": [0, 1]}) and accepts(cells, {"g": [1, 0]})
    for value in others:
        for honest in (0, 1):
            assert not accepts(cells, {"g": [value, honest]}), value
            assert not accepts(cells, {"g": [honest, value]}), value


@pytest.mark.parametrize("low", [-3, 0, 1000])
def test_a_pointer_reaches_nothing_outside_its_range_and_only_one_column_inside(low: int) -> None:
    choices, zeros = 4, np.zeros(2, np.int64)
    cells = Cells(8)
    x = cells.private("x", (2,), low, low + choices - 1, lambda get: zeros)
    pointer(cells, "p", x, low, choices)
    cells.close()
    rows = [tuple(row) for row in np.ndindex(3, 3, 3, 3)]
    for value in range(low - 1, low + choices + 1):
        fitting = [r for r in rows if accepts(cells, {"x": [value, low], "p.one_hot": [*r, 1, 0, 0, 0]})]
        unit = np.eye(choices, dtype=int)
        inside = low <= value < low + choices
        assert fitting == ([tuple(unit[value - low])] if inside else []), value
    half = pow(2, -1, FIELD)
    assert not accepts(cells, {"x": [low + half, low], "p.one_hot": [half, half, 0, 0, 1, 0, 0, 0]})


@settings(max_examples=60, deadline=None)
@given(st.integers(5, 9), st.integers(0, 60), st.integers(0, 2**31))
def test_every_slack_up_to_its_bound_has_limbs_and_no_negative_one(k: int, bits: int, seed: int) -> None:
    high = (1 << bits) + seed % (1 << bits) if bits else 0
    random = np.random.default_rng(seed)
    edges = [0, high, max(0, high - 1), int(random.integers(0, high + 1))]
    # Limbs of all ones, the ones that a table 9 short of a power of two does not hold.
    edges += [v for v in ((1 << j) - 1 - i for j in range(1, bits + 1) for i in (0, 1)) if 0 <= v <= high]
    for value in edges:
        cells = Cells(k)
        x = cells.constant([value, value])
        probe = cells.private("v", (2,), 0, high, lambda get, x=x: get(x))
        nonnegative(cells, "slack", [(probe, 1)], 0, high)
        cells.close()
        assert accepts(cells, {"v": [value, value]}), value
        assert not accepts(cells, {"v": [value, -1]})
        assert not accepts(cells, {"v": [-(1 << (k - 1)), value]})


@pytest.mark.parametrize("name", [*GRAPHS, *MODELS])
def test_every_private_cell_is_looked_up_as_itself(name: str) -> None:
    _, lowered = built(name)
    cells = lowered.cells
    looked_up = {
        int(c) for base in cells.bases if base.op == "relu" for ids in base.operands for c in ids.ravel()
    }
    read = {int(c) for base in cells.bases for ids in base.operands for c in ids.ravel()}
    for base in cells.bases:
        if base.op == "private":
            own = set(range(base.first, base.first + base.size))
            assert own & read <= looked_up, base.name
            assert len(own - read) <= 1, f"{base.name}: more than the spare cell is unread"


@pytest.mark.parametrize("name", [*GRAPHS, *MODELS])
def test_no_cell_leaves_its_proven_bounds(name: str) -> None:
    graph, lowered = built(name)
    # All but the spare cells of odd tensors and the unread results of lookups.
    read = np.unique(np.concatenate([ids.ravel() for base in lowered.cells.bases for ids in base.operands]))
    for x in [*extreme_inputs(graph), *(random_input(graph, seed) for seed in range(3))]:
        values = lowered.cells.evaluate({MODEL_INPUT: x})
        for base in lowered.cells.bases:
            ids = np.arange(base.first, base.first + base.size)
            cells = values.get(ids[np.isin(ids, read)])
            if cells.size:
                assert base.low <= cells.min() and cells.max() <= base.high, base.name


@pytest.mark.parametrize("name", [*GRAPHS, *MODELS])
def test_bounds_of_looked_up_cells_fit_the_table(name: str) -> None:
    _, lowered = built(name)
    for base in lowered.cells.bases:
        if base.op == "relu":
            for source in lowered.cells.base_of(base.operands[0]):
                assert lowered.cells.fits(source.low, source.high), (base.name, source.name)


def test_a_product_that_would_wrap_in_the_field_is_refused() -> None:
    cells = Cells(8)
    x = cells.private("x", (2,), -(1 << 120), 1 << 120, lambda get: np.zeros(2, np.int64))
    square = cells.mul(x, x)
    with pytest.raises(ValueError, match="wrap in the field"):
        cells.mul(square, x)


@pytest.mark.parametrize("places", range(1, 13))
def test_one_quotient_only_fits_each_remainder_window(places: int) -> None:
    graph = chain(
        node("square", "mul", "input", "input"),
        node("cube", "mul", "square", "input"),
        node("q", "shift", "cube", places=places),
        T=1,
        C=2,
        low=-9,
        high=9,
    )
    lowered = build_circuit(graph)
    for first in range(-9, 10):
        x = np.array([[first, -first]])
        honest = lowered.witness(x)
        assert satisfied(lowered, honest)

        # A quotient too wide for the table is two limbs.
        limb = "q.q" if "q.q" in honest.private else "q.q0"

        def neighbour(delta: int, x: np.ndarray = x, limb: str = limb) -> Witness:
            def lie(values: np.ndarray) -> np.ndarray:
                return values + np.array([delta, 0]).reshape(values.shape)

            return Witness(lowered.witness(x, lies={limb: lie}).private, {})

        refuse_all(lowered, x, {f"{x} {delta:+}": neighbour(delta) for delta in (1, -1, 2, -2, 16, -16)})


def test_too_narrow_a_table_says_what_it_would_have_to_hold() -> None:
    cells = Cells(8)
    with pytest.raises(CircuitTooNarrow, match="can reach 200"):
        cells.relu(cells.constant([200, 200]))
