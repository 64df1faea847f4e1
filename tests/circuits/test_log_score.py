"""The gadgets of the log-score: equal to the specification, and no other witness than the honest one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from circuits.cells import FIELD, Cells, CellValues, CircuitTooNarrow, Ids, Values
from circuits.gadgets.choice import pointer
from circuits.gadgets.log_score import log_score
from circuits.gadgets.lookup import look_up
from mamba_int.graph import IntArray
from mamba_int.log_score import LogScore
from tests.circuits.lying import add_at

ALPHA = 0x1D2C3B4A59687786958493A2B1C0DFEEF0E1D2C3B4A5968778695A4B3C2D1E0F
"""Whatever the prover does: all private values are hashed before the challenge is known."""

Lie = Callable[[Values], Values]


def _given(get: object) -> Values:
    raise ValueError("not given")


def holds(cells: Cells, values: CellValues) -> bool:
    """Whether all lookups and all claims hold."""
    looked_up = [values.get(base.operands[0]) for base in cells.bases if base.op == "relu"]
    signed = [(int(v) + FIELD // 2) % FIELD - FIELD // 2 for array in looked_up for v in array.ravel()]
    claims = [int(v) % FIELD for ids in cells.claims for v in values.get(ids).ravel()]
    return all(cells.low <= v <= cells.high for v in signed) and not any(claims)


@dataclass(frozen=True)
class Scored:
    """A circuit that scores tokens under logits, both private."""

    cells: Cells
    scores: Ids
    score: LogScore

    @staticmethod
    def of(steps: int, choices: int, frac: int, reach: int, k: int) -> Scored:
        """With logits up to ``reach``."""
        cells, score = Cells(k, challenged=True), LogScore(choices, frac)
        logits = cells.private("logits", (steps, choices), -reach, reach, _given)
        tokens = cells.check(cells.private("tokens", (steps,), 0, choices - 1, _given))
        hot = pointer(cells, "tokens", tokens, 0, choices)
        scores = log_score(cells, "s", score, logits, hot)
        cells.close()
        return Scored(cells, scores, score)

    def run(self, logits: IntArray, tokens: IntArray, lies: Mapping[str, Lie] | None = None) -> CellValues:
        """The values of all cells."""
        return self.cells.evaluate({"logits": logits, "tokens": tokens}, lies, alpha=ALPHA)

    def equal(self, logits: IntArray, tokens: IntArray) -> None:
        """Asserts that the specification gives the same scores, and that the witness holds."""
        values = self.run(logits, tokens)
        assert values.get(self.scores).tolist() == self.score(logits, tokens).tolist()
        assert holds(self.cells, values)


STEPS = 3


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from([2, 3, 11]),
    st.sampled_from([0, 3, 5, 6, 9]),
    st.sampled_from([12, 14]),
    st.sampled_from([0.05, 1.0, 1000.0]),
    st.integers(0, 2**32 - 1),
)
def test_gadget_is_the_specification(choices: int, frac: int, k: int, spread: float, seed: int) -> None:
    reach = min(15 << frac, 400 << max(frac - 5, 0))
    random = np.random.default_rng(seed)
    drawn = np.rint(random.normal(0, spread * 2**frac, (STEPS, choices)))
    logits = np.clip(drawn, -reach, reach).astype(np.int64)
    Scored.of(STEPS, choices, frac, reach, k).equal(logits, random.integers(0, choices, STEPS))


@pytest.mark.parametrize("choices", [2, 96])
@pytest.mark.parametrize("frac", [4, 5, 8])
def test_gadget_is_the_specification_at_the_ends(choices: int, frac: int) -> None:
    """All logits at one end, one alone at the other, remainders at both ends of their window."""
    reach = 10 << frac
    rows = [np.full(choices, reach), np.full(choices, -reach), np.zeros(choices)]
    for sign in (1, -1):
        rows += [sign * reach * (2 * np.eye(1, choices)[0] - 1), sign * np.arange(choices) % (1 << frac)]
        rows += [np.full(choices, sign * (1 << max(frac - 6, 0)) + offset) for offset in (-1, 0, 1)]
    logits = np.clip(np.stack(rows), -reach, reach).astype(np.int64)
    tokens = np.arange(len(rows)) % choices
    Scored.of(len(rows), choices, frac, reach, 12).equal(logits, tokens)


def test_logits_wider_than_the_table_ask_for_more_rows() -> None:
    with pytest.raises(CircuitTooNarrow):
        Scored.of(1, 2, 5, 1 << 12, 12)
    with pytest.raises(CircuitTooNarrow):
        Scored.of(1, 2, 15, 1 << 12, 12)


@pytest.mark.parametrize("frac", [4, 8])
def test_no_private_cell_of_a_score_can_be_another(frac: int) -> None:
    """Alone, and with all that comes after it made from the lie; as an integer and as a field fraction."""
    steps, choices = 2, 3
    scored = Scored.of(steps, choices, frac, 10 << frac, 12)
    random = np.random.default_rng(1)
    logits, tokens = random.integers(-(3 << frac), 3 << frac, (steps, choices)), np.array([2, 0])
    honest = scored.run(logits, tokens)
    assert holds(scored.cells, honest)
    kept: dict[str, Lie] = {}
    for base in scored.cells.bases:
        if base.op == "private" and base.name not in ("logits", "tokens"):
            true = honest.get(np.arange(base.first, base.first + base.size)).astype(object)
            kept[base.name] = lambda values, true=true: true.copy().reshape(values.shape)
    read = {int(cell) for base in scored.cells.bases for ids in base.operands for cell in np.unique(ids)}
    tried = 0
    for base in scored.cells.bases:
        if base.name not in kept or base.name == "tokens.one_hot":
            continue
        # Of the table of some four hundred, those near the ends and one that is read.
        places = [i for i in range(base.size) if base.first + i in read]
        if len(places) > 20:
            places = [places[0], places[len(places) // 2], places[-1], *_counted(honest, base.first, places)]
        for index in places:
            for delta in (1, -1, 1 << 12, pow(2, -1, FIELD)):
                lie = add_at((index, delta))
                alone = kept | {base.name: lambda v, lie=lie, name=base.name: lie(kept[name](v))}
                for lies in (alone, {base.name: lie}):
                    tried += 1
                    assert not holds(scored.cells, scored.run(logits, tokens, lies)), (
                        base.name,
                        index,
                        delta,
                    )
    assert tried > 100


def _counted(values: CellValues, first: int, places: list[int]) -> list[int]:
    """Of multiplicities, one that is not 0."""
    found = [i for i in places if values.get(np.array([first + i]))[0]]
    return found[:1]


def test_neighbour_of_the_normaliser_has_no_limbs_even_modulo_the_field() -> None:
    """The equation that ties the sums to r could be solved by a limb that is a field element."""
    scored = Scored.of(1, 2, 4, 100, 12)
    logits, tokens = np.array([[40, 10]]), np.array([0])
    limbs = [base.name for base in scored.cells.bases if base.name.startswith(("s.t", "s.p"))]
    assert len(limbs) >= 2
    for delta in (1, -1):
        shifted = scored.run(logits, tokens, {"s.normaliser": add_at((0, delta))})
        claim = scored.cells.claims[-1]
        left = int(shifted.get(claim)[0]) % FIELD
        assert left
        for name in limbs:
            unit = scored.run(logits, tokens, {"s.normaliser": add_at((0, delta)), name: add_at((0, 1))})
            slope = (int(unit.get(claim)[0]) - left) % FIELD
            solved = -left * pow(slope, -1, FIELD) % FIELD if slope else 1
            lies = {"s.normaliser": add_at((0, delta)), name: add_at((0, solved))}
            assert not holds(scored.cells, scored.run(logits, tokens, lies)), name


ENTRIES = [5, -7, 1 << 70, 5, 0]


def looked_up(x: IntArray, lies: Mapping[str, Lie] | None = None) -> tuple[bool, list[int]]:
    """Whether a witness of a lookup holds, and its answers."""
    cells = Cells(8, challenged=True)
    places = cells.private("x", x.shape, 0, len(ENTRIES) - 1, _given)
    answers = look_up(cells, "t", places, ENTRIES)
    cells.close()
    values = cells.evaluate({"x": x}, lies, alpha=ALPHA)
    return holds(cells, values), [int(v) for v in values.get(answers)]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, len(ENTRIES) - 1), min_size=1, max_size=9))
def test_lookup_gives_the_entries(x: list[int]) -> None:
    assert looked_up(np.array(x)) == (True, [ENTRIES[i] for i in x])


@pytest.mark.parametrize("beyond", [-1, len(ENTRIES), 100])
def test_place_beyond_the_table_has_no_answer(beyond: int) -> None:
    assert not looked_up(np.array([1, beyond, 2]))[0]


def test_answers_of_others_are_refused() -> None:
    """Another entry, answers that are exchanged or of the same sum, the multiplicities changed to fit."""
    x = np.array([0, 1, 1, 4])
    assert looked_up(x)[0]
    lies: list[dict[str, Lie]] = [
        {"t.looked_up": add_at((0, -12))},
        {"t.looked_up": add_at((0, -12), (1, 12))},
        {"t.looked_up": add_at((1, 1), (2, -1))},
        {"t.looked_up": add_at((1, 12)), "t.multiplicities": add_at((1, -1), (0, 1))},
        {"t.looked_up": add_at((0, -5)), "t.multiplicities": add_at((0, -1), (4, 1))},
        {"t.multiplicities": add_at((0, 1))},
        {"t.multiplicities": add_at((0, -1), (3, 1))},
        {"t.multiplicities": add_at((2, FIELD // 2))},
    ]
    for lie in lies:
        assert not looked_up(x, lie)[0]


def test_equal_entries_at_two_places_are_not_confused() -> None:
    """Entry 0 and entry 3 are the same number: the place counts too."""
    assert looked_up(np.array([0, 3]))[0]
    assert not looked_up(np.array([0, 3]), {"t.multiplicities": add_at((0, 1), (3, -1))})[0]
