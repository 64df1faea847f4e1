"""Which form a curve takes: a table or straight lines, the cheapest that is near enough."""

from __future__ import annotations

import dataclasses

from quantize.conversion_config import AUTOMATIC, ConversionConfig
from quantize.fits import (
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

MOST_PIECES = 16


def table_cells(entries: int, tables: int = 1) -> int:
    """Cells of a circuit for one element: a private row of zeros and a one, looked up, two dots with lookups
    that prove it, and a dot for each of the tables that share it; see ``circuits.gadgets.choice``."""
    even = entries + entries % 2
    proof = entries + 1 + (entries + 1) % 2
    return 2 * entries + 2 * (proof + 1) + tables * even


def lines_cells(pieces: int, sums: int = 1) -> int:
    """Cells of a circuit for one element: difference and lookup of every line, and for each sum of two lines
    or more a dot, its shift and its clamp."""
    return 2 * pieces + sums * (pieces + pieces % 2 + 12)


def choose_form(
    curve: Curve,
    low: int,
    high: int,
    index_frac: int,
    frac: int,
    limit: int,
    config: ConversionConfig,
    floor: float = 0.0,
) -> TableFit | PiecewiseFit:
    """The cheapest form whose error exceeds that of the table by at most ``config.error_steps`` units of the
    result's last place, saturation aside. The table's own error is what rounding index and result costs.

    A runtime gathers from a table in one operation, whatever its length. In a circuit every element pays for
    every entry, and for every line.

    Args:
        low, high, index_frac, frac, limit: as in ``quantize.fits.fit_table``.
        config: ``target``, ``pieces`` and ``error_steps`` decide.
        floor: if positive, errors are shares of the function, or of this where it is less, and the form's may
            be twice the table's: rounding the index costs a step size no less.
    """
    saturated = curve.saturated(limit * 2.0**-frac)
    scale = curve.sizes(low, high, index_frac, floor) if floor > 0 else None

    def lines(pieces: int) -> PiecewiseFit:
        return fit_piecewise(saturated, low, high, index_frac, frac, limit, pieces, scale)

    def error(table: TableFit) -> float:
        return table.error if scale is None else saturated.error(table, index_frac, frac, scale)

    table = fit_table(saturated, low, high, index_frac, frac, limit)
    chosen: PiecewiseFit | None = None
    if config.pieces > 0:
        chosen = lines(config.pieces)
    elif config.pieces == AUTOMATIC and config.target == "circuit":
        cells, own = table_cells(high - low + 1), error(table)
        tolerance = own + config.error_steps * 2.0**-frac if scale is None else 2 * own
        cheaper = (lines(pieces) for pieces in range(1, MOST_PIECES + 1) if lines_cells(pieces) < cells)
        chosen = next((fit for fit in cheaper if error(fit.table) <= tolerance), None)
    if chosen is None:
        return dataclasses.replace(table, error=curve.error(table, index_frac, frac))
    exact = curve.error(chosen.table, index_frac, frac)
    return dataclasses.replace(chosen, table=dataclasses.replace(chosen.table, error=exact))


def choose_decay_form(
    low: int, high: int, index_frac: int, config: ConversionConfig
) -> DecayFit | DecayLines:
    """The cheapest form of decay and gain that falsifies no step size by more than ``config.step_error``
    beyond what the rounding of the index does; tables if none does.

    Args:
        low, high, index_frac: as in ``quantize.fits.fit_decay``.
    """
    c = config
    if c.pieces > 0:
        return fit_decay_lines(low, high, index_frac, c.decay_bits, c.gain_bits, c.pieces)
    tables = fit_decay(low, high, index_frac, c.decay_bits, c.gain_bits)
    if c.pieces == AUTOMATIC and c.target == "circuit":
        cells = table_cells(high - low + 1, 2)
        for pieces in range(2, MOST_PIECES + 1):
            if lines_cells(pieces, 2) >= cells:
                break
            lines = fit_decay_lines(low, high, index_frac, c.decay_bits, c.gain_bits, pieces)
            if lines.fit.step_error <= tables.step_error + c.step_error:
                return lines
    return tables
