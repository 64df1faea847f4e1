"""The form of a curve: its cost is what a circuit pays, its error allowed, and no other is cheaper."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from circuits.lowering import build_circuit
from mamba_int.errors import MambaintError
from mamba_int.graph import Graph
from quantize.conversion_config import AUTOMATIC, PROVABLE, ConversionConfig
from quantize.fits import (
    ACTIVATIONS,
    SMALL_STEP,
    Curve,
    DecayFit,
    DecayLines,
    PiecewiseFit,
    TableFit,
    fit_decay,
    fit_decay_lines,
    fit_piecewise,
    fit_table,
)
from quantize.forms import choose_decay_form, choose_form, lines_cells, table_cells
from tests.mamba_int.graphs import chain, node

SILU = ACTIVATIONS["silu"]
RANGE = (-128, 127, 4, 5, 127)
"""low, high, index_frac, frac, limit."""


def cells(graph: Graph) -> int:
    """Of everything but the input and the anchor."""
    cost = build_circuit(graph, logrows=12, challenged=False).cost
    return sum(sum(kinds.values()) for part, kinds in cost.items() if part not in ("input", "anchor"))


@pytest.mark.parametrize("entries", [5, 16, 33])
def test_a_table_costs_what_its_circuit_has(entries: int) -> None:
    values = {"values": np.arange(entries) % 7}
    first = node("a", "table", "input", constants=values, low=0)
    second = node("b", "table", "input", constants=values, low=0)
    both = [first, second, node("j", "concat", "a", "b")]
    shape: dict[str, Any] = {"width": 6, "low": 0, "high": entries - 1, "seq_len": 4}
    assert cells(chain(first, **shape)) == 24 * table_cells(entries)
    assert cells(chain(*both, **shape)) == 24 * table_cells(entries, 2)


@pytest.mark.parametrize("pieces", [2, 5, 9])
def test_lines_cost_what_their_circuit_has(pieces: int) -> None:
    nodes, total = [], ""
    for i in range(pieces):
        nodes += [
            node(f"from{i}", "sub", "input", constants={"value": 3 * i - 20}),
            node(f"above{i}", "relu", f"from{i}"),
            node(f"line{i}", "mul", f"above{i}", constants={"value": 3 + 5 * i}),
        ]
        if total:
            nodes.append(node(f"sum{i}", "add", total, f"line{i}"))
        total = nodes[-1].name
    nodes += [
        node("lines", "add", total, constants={"value": 9}),
        node("wide", "shift", "lines", places=4),
        node("out", "clamp", "wide", low=-20, high=20, saturation=True),
    ]
    assert cells(chain(*nodes, width=6, low=-20, high=20, seq_len=4)) == 24 * lines_cells(pieces)


def test_a_runtime_gathers_and_a_circuit_takes_the_fewest_lines_that_are_near_enough() -> None:
    runtime = ConversionConfig(error_steps=1.0)
    assert isinstance(choose_form(SILU, *RANGE, runtime), TableFit)
    lines = choose_form(SILU, *RANGE, dataclasses.replace(runtime, target="circuit"))
    assert isinstance(lines, PiecewiseFit)
    saturated = SILU.saturated(127 / 32)
    table = fit_table(saturated, *RANGE)
    tolerance = table.error + 1.0 / 32
    assert fit_piecewise(saturated, *RANGE, lines.table.pieces).table.error <= tolerance
    assert fit_piecewise(saturated, *RANGE, lines.table.pieces - 1).table.error > tolerance
    assert lines_cells(lines.table.pieces) < table_cells(256) / 10


def test_a_curve_of_many_turns_is_a_table_in_a_circuit_too() -> None:
    waves = Curve(lambda x: np.sin(8 * x), tuple((i + 0.5) * math.pi / 8 for i in range(-30, 30)))
    form = choose_form(waves, *RANGE, ConversionConfig(target="circuit"))
    assert isinstance(form, TableFit) and form.pieces == 0


def test_a_form_asked_for_is_taken_whatever_it_costs() -> None:
    for target in ("runtime", "circuit"):
        for pieces in (0, 3):
            config = ConversionConfig(target=target, pieces=pieces)  # type: ignore[arg-type]
            form = choose_form(SILU, *RANGE, config)
            table = form if isinstance(form, TableFit) else form.table
            assert table.pieces == pieces
            decay = choose_decay_form(-60, 10, 4, config)
            assert (decay if isinstance(decay, DecayFit) else decay.fit).pieces == pieces


def test_the_error_on_record_counts_what_saturates() -> None:
    form = choose_form(SILU, *RANGE, PROVABLE)
    assert isinstance(form, PiecewiseFit)
    assert form.table.error >= float(SILU.evaluate(np.array([127.5 / 16]))[0]) - 127 / 32


def test_decays_are_lines_in_a_circuit_only_if_steps_stay_near_enough() -> None:
    loose = choose_decay_form(-160, 40, 5, PROVABLE)
    assert isinstance(loose, DecayLines)
    table = fit_decay(-160, 40, 5, PROVABLE.decay_bits, PROVABLE.gain_bits)
    assert loose.fit.step_error <= table.step_error + PROVABLE.step_error
    strict = choose_decay_form(-160, 40, 5, dataclasses.replace(PROVABLE, step_error=1e-4))
    assert isinstance(strict, DecayFit)
    assert isinstance(choose_decay_form(-160, 40, 5, ConversionConfig()), DecayFit)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(2, 5),
    st.integers(6, 14),
    st.integers(-8, -1),
    st.floats(0, 1),
    st.integers(1, 6),
    st.integers(1, 9),
)
def test_lines_of_decay_and_gain_stay_within_their_errors(
    index_frac: int, decay_bits: int, lowest: int, place: float, span: int, pieces: int
) -> None:
    low = lowest << index_frac
    high = low + (span << index_frac)
    lines = fit_decay_lines(low, high, index_frac, decay_bits, 8, pieces)
    fit, one = lines.fit, 1 << decay_bits
    x = np.arange(low, high + 1)
    for part, values, frac, most in (
        (lines.decay, fit.decay, decay_bits, one - 1),
        (lines.gain, fit.gain, fit.gain_frac, 255),
    ):
        above = np.maximum(x[:, None] - np.array(part.knots), 0)
        total = part.offset + above @ np.array(part.slopes)
        rounded = np.floor(total / 2.0 ** (part.slope_frac - frac) + 0.5)
        np.testing.assert_array_equal(values, np.clip(rounded, 0, most))
        assert np.abs(total).max() <= part.reach(low, high)
    v = (low - 0.5 + place * (high - low + 1 - 1e-9)) * 2.0**-index_frac
    i = math.floor(v * 2.0**index_frac + 0.5) - low
    assert abs(fit.decay[i] / one - math.exp(-math.exp(v))) <= fit.decay_error
    entered = (1 - fit.decay[i] / one) * fit.gain[i] * 2.0**-fit.gain_frac
    u = math.exp(v)
    assert abs(entered - u) <= fit.step_error * max(u, SMALL_STEP)


def test_lines_are_nearest_and_not_chords() -> None:
    # Of a parabola chords are off by h^2 / 8 times the curvature, the nearest lines by half of that.
    index = np.arange(65)
    exact = (index - 32.0) ** 2 / 1024
    square = dataclasses.replace(SILU, evaluate=lambda x: np.square(x * 4 - 32) / 1024, turning_points=(8.0,))
    fit = fit_piecewise(square, 0, 64, 2, 16, 1 << 20, 4)
    error = np.abs(fit.table.values / 2.0**16 - exact).max()
    assert error < 0.6 * (16.0**2 / 8 * 2 / 1024)


@pytest.mark.parametrize(
    ("field", "value"),
    [("target", "gpu"), ("pieces", AUTOMATIC - 1), ("error_steps", 0.0), ("step_error", -1.0), ("M_bits", 3)],
)
def test_a_setting_without_meaning_is_named(field: str, value: Any) -> None:
    with pytest.raises(MambaintError, match=field):
        ConversionConfig(**{field: value})
