"""How to cut: segments of as many steps as fill 2^k rows, at the k that makes the chain cheapest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from circuits.cells import CircuitTooNarrow
from circuits.circuit import LARGEST_LOGROWS, SMALLEST_LOGROWS
from circuits.lowering import MARGIN_ROWS, lower
from circuits.segment import Segment, check_steps, reduction, step_unit
from circuits.stages import all_cuts, chain_forms, cut_stages
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


@dataclass(frozen=True)
class Cut:
    """How a sequence and a model are cut.

    Attributes:
        steps: of a segment.
        stages: of the model.
    """

    steps: int
    stages: int


def pick_cut(
    graph: Graph,
    length: int,
    form: Segment,
    *,
    public_input: bool = False,
    stages: int | None = None,
    memory: int | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Cut:
    """The cut for which a chain of ``length`` steps takes the fewest rows, with those of padding.

    What a proof costs grows with 2^k, filled or not. Of equal costs the smaller circuit is taken: it needs
    less memory. The model is cut into as few stages as fit, since activations that cross cost rows.

    Args:
        graph: the model.
        length: steps of the sequence.
        form: of its segments; ``steps`` and ``nodes`` do not matter.
        public_input: whether proofs show the input.
        stages: as many; default: the fewest that fit.
        memory: bytes that a prover may use; default: what is free.
        say: told what is being done.

    Raises:
        MambaintError: if no segment of the model fits that memory.
    """
    free = available_memory() if memory is None else memory
    most = LARGEST_LOGROWS if free is None else largest_logrows(free)
    if stages is not None:
        cuts = [cut_stages(graph, stages, form.greedy)]
    else:
        cuts = [parts for _, parts in sorted(all_cuts(graph, form.greedy).items())]
    for parts in cuts:
        best: tuple[int, int, int] | None = None
        for k in range(max(SMALLEST_LOGROWS, most - SMALLER), most + 1):
            say(f"looking for the length of segments, {len(parts)} stages of 2^{k} rows")
            steps = _longest(graph, parts, length, k, form, public_input)
            if steps:
                cost = -(-length // steps) << k
                best = min(best, (cost, k, steps)) if best else (cost, k, steps)
        if best is not None:
            return Cut(best[2], len(parts))
    raise MambaintError(
        f"no segment of the model fits 2^{most} rows, the most that the memory allows",
        "give more memory (--ram), or use a smaller model",
    )


def _longest(
    graph: Graph, parts: tuple[range, ...], length: int, logrows: int, form: Segment, public_input: bool
) -> int:
    """The most steps whose circuits all have at most 2^logrows rows; 0 if there are none."""
    unit, ends = step_unit(graph), reduction(graph) is not None
    most = -(-length // unit)

    def fits(units: int) -> bool:
        try:
            forms = chain_forms(graph, parts, replace(form, steps=units * unit))
            check_steps(graph, forms[0])
            # The last stage first: it is the dearest as often as not, with the end of the model in it.
            return all(
                lower(graph, logrows, public_input, True, segment=own).circuit.rows + MARGIN_ROWS
                <= 1 << logrows
                for own in reversed(forms)
            )
        except (CircuitTooNarrow, MambaintError):
            return False

    low, high = 0, 1
    while high <= most and fits(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    if not ends:
        return low * unit
    # Of a fixed length, which whole segments have to make up.
    return max((n for n in range(unit, low * unit + 1, unit) if length % n == 0 and n < length), default=0)
