"""How long segments should be: as many steps as fill 2^k rows, at the k that makes the chain cheapest."""

from __future__ import annotations

from collections.abc import Callable

from circuits.cells import CircuitTooNarrow
from circuits.circuit import LARGEST_LOGROWS, SMALLEST_LOGROWS
from circuits.lowering import MARGIN_ROWS, lower
from circuits.segment import Segment, check_steps, reduction, step_unit
from mamba_int.errors import MambaintError
from mamba_int.graph import Graph
from zk.calibration import stored_calibration
from zk.estimate import Size, available_memory

BYTES_PER_ROW = 11_000
"""Of a proving process, measured at 2^16 rows; for machines that ``mambaint estimate`` has not measured."""
SMALLER = 4
"""Sizes below the largest that memory allows which are tried."""


def largest_logrows(memory: int) -> int:
    """The most rows (log2) that can be proved with so many bytes."""
    calibration = stored_calibration()
    for k in range(LARGEST_LOGROWS, SMALLEST_LOGROWS, -1):
        needed = BYTES_PER_ROW << k
        if calibration is not None:
            # Full, with all private values committed to.
            needed = calibration.predict(Size(k, 1 << k, 1 << 10, 1 << 12, 2)).peak_bytes
        if needed <= memory:
            return k
    return SMALLEST_LOGROWS


def pick_steps(
    graph: Graph,
    length: int,
    hidden: bool,
    memory: int | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> int:
    """Steps of a segment for which a chain of ``length`` steps takes the fewest rows, with those of padding.

    What a proof costs grows with 2^k, filled or not. Of equal costs the smaller circuit is taken: it needs
    less memory.

    Args:
        graph: the model.
        length: steps of the sequence.
        hidden: whether states are committed to.
        memory: bytes that a prover may use; default: what is free.
        say: told what is being done.

    Raises:
        MambaintError: if no segment of the model fits that memory.
    """
    free = available_memory() if memory is None else memory
    most = LARGEST_LOGROWS if free is None else largest_logrows(free)
    unit, ends = step_unit(graph), reduction(graph) is not None
    best: tuple[int, int, int] | None = None
    for k in range(max(SMALLEST_LOGROWS, most - SMALLER), most + 1):
        say(f"looking for the length of segments, 2^{k} rows")
        steps = _longest(graph, unit, length, k, hidden)
        if ends:
            # Of a fixed length, which whole segments have to make up.
            parts = [n for n in range(unit, steps + 1, unit) if length % n == 0 and n < length]
            steps = max(parts, default=0)
        if steps:
            cost = -(-length // steps) << k
            best = min(best, (cost, k, steps)) if best else (cost, k, steps)
    if best is None:
        raise MambaintError(
            f"no segment of the model fits 2^{most} rows, the most that the memory allows",
            "give more memory (--ram), or use a smaller model",
        )
    return best[2]


def _longest(graph: Graph, unit: int, length: int, logrows: int, hidden: bool) -> int:
    """The most steps, a multiple of the unit, whose circuit has at most 2^logrows rows; 0 if none has."""
    most = -(-length // unit)

    def rows(units: int) -> int | None:
        segment = Segment(units * unit, hidden=hidden)
        try:
            check_steps(graph, segment)
            return lower(graph, logrows, False, True, segment=segment).circuit.rows
        except (CircuitTooNarrow, MambaintError):
            return None

    def fits(units: int) -> bool:
        found = rows(units)
        return found is not None and found + MARGIN_ROWS <= 1 << logrows

    low, high = 0, 1
    while high <= most and fits(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * unit
