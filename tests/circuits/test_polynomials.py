"""Circuits without lookups: the same integers, no table, no digit, sign or fraction that slips through."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from circuits.cells import FIELD, Cells, CircuitTooNarrow, Ids
from circuits.gadgets.choice import bit
from circuits.gadgets.values import check_range, nonnegative
from circuits.polynomials import SQUARE, WINDOW, PolynomialCells
from mamba_int.errors import MambaintError
from tests.attacks.test_witness_one_cell import one_off
from tests.circuits.conftest import (
    assert_equal_to_interpreter,
    extreme_inputs,
    interpret,
    random_input,
)
from tests.circuits.lying import Lie, add_at, forge, override, privates, refuse_all, reject_all
from tests.circuits.test_equality import CLAIMED, POLYNOMIAL, built
from zk.identity import circuit_id
from zk.keys import make_keys
from zk.prove import mock, prove
from zk.srs import development_srs

PLAIN = [
    *("input", "embedding", "linear_ternary", "linear_many_rows", "linear_int8_shifted", "linear_pooled"),
    *("linear_shifted_two_packs", "linear_split_shift", "linear_one_output", "conv_shifted", "mul_constant"),
    *("compare", "compare_odd", "compare_wide_constant", "select_by_a_clamp", "table_odd"),
    *("table_of_one_entry", "shift_9", "shift_12", "clamp_signed", "clamp_below_the_interval", "clamp_wide"),
    *("clamp_shifted", "relu", "relu_clamped_negative", "norm", "norm_odd_and_shallow", "rotate_table"),
    *("rotate_shear", "ssd_carried", "ssd_chunk_of_one", "isqrt", "div", "reduce_last"),
]
CHALLENGED = [
    "input",
    "embedding",
    "linear_two_packs",
    "conv_shifted",
    "relu",
    "norm_clamped",
    "ssd_one_chunk",
]
FORMS = [name + POLYNOMIAL for name in PLAIN] + [name + CLAIMED + POLYNOMIAL for name in CHALLENGED]
MODEL_FORMS = [name + POLYNOMIAL for name in ("plain", "carried_state", "language_model_of_one_chunk")]
MODEL_FORMS += [name + CLAIMED + POLYNOMIAL for name in ("plain", "carried_state")]


@pytest.mark.parametrize("name", [*FORMS, *MODEL_FORMS])
def test_without_lookups_ezkl_accepts_the_interpreters_integers_and_lays_out_no_table(name: str) -> None:
    graph, lowered = built(name)
    assert not lowered.circuit.lookups
    assert not any(base.op == "relu" for base in lowered.cells.bases)
    inputs = [*extreme_inputs(graph), random_input(graph)]
    for x in inputs:
        assert_equal_to_interpreter(graph, lowered, x)
    # EZKL's own row count and the absence of lookups are checked inside.
    assert all(mock(lowered.circuit, [lowered.witness(inputs[i]) for i in (0, 2, -1)]))


@pytest.mark.parametrize("name", FORMS)
def test_without_lookups_any_private_cell_one_off_is_rejected(name: str) -> None:
    graph, lowered = built(name)
    for x in (random_input(graph), extreme_inputs(graph)[2]):
        lies, _ = one_off(lowered, x, 3)
        honest = lowered.witness(x)
        for tensor in privates(lowered):
            fraction = pow(2, -1, FIELD)
            lies[f"{tensor} half off"] = override(honest, tensor, [(0, fraction)])
        refuse_all(lowered, x, lies)


@pytest.mark.parametrize("name", ["relu", "relu" + CLAIMED, "input", "embedding" + CLAIMED])
def test_ezkl_rejects_false_digits_and_signs(name: str) -> None:
    graph, lowered = built(name + POLYNOMIAL)
    x = random_input(graph)

    def put(value: int) -> Lie:
        return lambda values: np.concatenate([[value], values.ravel()[1:]]).reshape(values.shape)

    lies = {}
    for tensor in privates(lowered):
        for value in {5, -5, 0, 2} - {lowered.witness(x).private[tensor][0]}:
            lies[f"{tensor} = {value}"] = forge(lowered, x, {tensor: put(value)})
        if "sign" in tensor:
            flip = 1 - 2 * lowered.witness(x).private[tensor][0]
            lies[f"{tensor} flipped"] = forge(lowered, x, {tensor: add_at((0, flip))})
    reject_all(lowered, x, lies)


def accepts(cells: Cells, residues: dict[str, Ids], private: dict[str, list[int]]) -> bool:
    """Whether every residue has its forced value; the honest digits of a false value are its lowest bits."""

    def lie(name: str) -> Lie:
        return lambda values: np.array(private[name], dtype=object).reshape(values.shape)

    values = cells.evaluate({}, {name: lie(name) for name in private})
    forced = {"zeros": 0, "squares": SQUARE}
    return all(
        (int(v) - forced[name]) % FIELD == 0 for name, ids in residues.items() for v in values.get(ids)
    )


def fractions() -> set[int]:
    """Elements that are no integers, though a multiple of them is."""
    found = {pow(n, -1, FIELD) for n in (2, 3, 4, 1 << 5, 1 << WINDOW)}
    return found | {-value for value in found}


RANGES = [
    (0, 0),
    (7, 7),
    (0, 1),
    (-1, 0),
    (5, 6),
    (0, 2),
    (-3, 4),
    (-9, 100),
    (1000, 1255),
    (0, (1 << 30) - 1),
]


@pytest.mark.parametrize(
    ("low", "high"), [*RANGES, (-(1 << 27) - 1, 1 << 27), ((1 << 26) + 1, (1 << 26) + 9)]
)
def test_a_range_ends_exactly_at_its_bounds(low: int, high: int) -> None:
    cells = PolynomialCells()
    check_range(cells, cells.private("v", (2,), low, high, lambda get: np.array([low, high])), low, high)
    residues = cells.close()
    for value in {low - 1, low, (low + high) // 2, high, high + 1, -low - 1, cells.high, *fractions()}:
        assert accepts(cells, residues, {"v": [value, high]}) == (low <= value <= high), value


@pytest.mark.parametrize(
    ("low", "high"), [(-1, 0), (-1, 1), (-5, 3), (-4, 100), (-129, 5), (-(1 << 30), 1 << 30)]
)
def test_the_sign_of_a_relu_cannot_be_chosen(low: int, high: int) -> None:
    cells = PolynomialCells()
    v = cells.private("v", (2,), low, high, lambda get: np.array([low, high]))
    result = cells.relu(v)
    residues = cells.close()
    (sign,) = (base.name for base in cells.bases if base.name.endswith(".sign"))
    for value in {low, -1, 0, high}:
        assert cells.evaluate({"v": np.array([value, 0])}).get(result).tolist() == [max(value, 0), 0]
        for claimed in (-1, 0, 1, 2, *fractions()):
            right = claimed == (value >= 0)
            assert accepts(cells, residues, {"v": [value, 0], sign: [claimed, 1]}) == right, (value, claimed)
    for value in fractions():
        assert not any(accepts(cells, residues, {"v": [value, 0], sign: [g, 1]}) for g in (0, 1))


def test_a_digit_of_another_base_does_not_make_a_second_sum() -> None:
    cells = PolynomialCells()
    cells.check(cells.private("v", (2,), 0, 255, lambda get: np.array([100, 200])))
    residues = cells.close()
    (digits,) = (base.name for base in cells.bases if base.name.endswith(".digits"))
    fitting = [
        row
        for row in np.ndindex(11, 11, 11)
        if accepts(
            cells,
            residues,
            {"v": [100, 85], digits: [d for i in row for d in (i - 5, 2 * (85 >> 2 & 3) - 3)]},
        )
    ]
    # 100 = 1 2 1 0 in base 4, and a digit d is given as 2 d - 3.
    assert fitting == [(2 * 1 - 3 + 5, 2 * 2 - 3 + 5, 2 * 1 - 3 + 5)]


@pytest.mark.parametrize("high", [1, 2, 9, 255, 256, (1 << 26) + 5])
def test_a_slack_below_zero_has_no_digits(high: int) -> None:
    cells = PolynomialCells()
    v = cells.private("v", (2,), 0, high, lambda get: np.array([0, high]))
    nonnegative(cells, "slack", [(v, 1)], 0, high)
    residues = cells.close()
    assert accepts(cells, residues, {"v": [0, high]})
    for value in {-1, -high, *fractions()}:
        assert not accepts(cells, residues, {"v": [value, high]})


def test_a_bit_is_zero_or_one_without_lookups() -> None:
    cells = PolynomialCells()
    bit(cells, "g", (2,), lambda get: np.zeros(2, np.int64))
    residues = cells.close()
    assert accepts(cells, residues, {"g": [0, 1]})
    for value in {-1, 2, 3, *fractions()}:
        assert not accepts(cells, residues, {"g": [value, 0]})


def test_a_range_beyond_the_window_or_the_declared_one_is_refused() -> None:
    def cells_in(low: int, high: int) -> tuple[PolynomialCells, Ids]:
        cells = PolynomialCells()
        return cells, cells.private("v", (2,), low, high, lambda get: np.zeros(2, np.int64))

    cells, v = cells_in(0, 1 << WINDOW)
    with pytest.raises(CircuitTooNarrow):
        cells.relu(v)
    cells.check(v)
    with pytest.raises(CircuitTooNarrow):
        cells.close()
    cells, v = cells_in(-4, 4)
    with pytest.raises(ValueError, match=r"declared in -4\.\.4"):
        check_range(cells, v, 0, 5)


def test_every_private_cell_is_checked_or_part_of_a_digit() -> None:
    for name in (*FORMS, *MODEL_FORMS):
        _, lowered = built(name)
        cells = lowered.cells
        assert isinstance(cells, PolynomialCells)
        proven = cells._checked | set(cells._pending)
        proven |= {int(c) for ids in (*cells._digits, *cells._fours) for c in ids.ravel()}
        read = {int(c) for base in cells.bases for ids in base.operands for c in ids.ravel()}
        for base in cells.bases:
            # A sign is proven a bit when it is made.
            claimed_only = CLAIMED in name and (base.name.endswith((".values", ".beyond", ".above")))
            if (
                base.op == "private"
                and not base.name.partition("#")[0].endswith(".sign")
                and not claimed_only
            ):
                assert set(range(base.first, base.first + base.size)) & read <= proven, (name, base.name)


def test_a_circuit_with_a_lookup_cannot_pass_for_one_without() -> None:
    graph, lowered = built("relu")
    posing = dataclasses.replace(lowered.circuit, lookups=False)
    assert circuit_id(posing, "0" * 64, "") != circuit_id(lowered.circuit, "0" * 64, "")
    with pytest.raises(MambaintError, match="required_lookups"):
        mock(posing, [lowered.witness(random_input(graph))])


def test_a_real_proof_without_lookups_shows_the_interpreters_logits(tmp_path: Path) -> None:
    graph, lowered = built("language_model_of_one_chunk" + POLYNOMIAL)
    x = random_input(graph, 3)
    witness = lowered.witness(x)
    keys = make_keys(lowered.circuit, witness, development_srs(lowered.circuit.logrows, tmp_path), tmp_path)
    result = prove(lowered.circuit, witness, keys, keys.package({}).encode())
    assert json.loads(result.file)["public"] == {"logits": interpret(graph, x)[graph.output].ravel().tolist()}
    shutil.rmtree(keys.folder)
