"""Cutting a model by layers: stages of consecutive nodes, each a circuit of its own.

Like pipeline stages in training (Huang et al. 2019, arXiv 1811.06965): a stage takes the activations of the
stage before and hands its own on. Between two blocks only the residual stream crosses.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from circuits.breakdown import owner_of
from circuits.circuit import LARGEST_LOGROWS
from circuits.lowering import lower
from circuits.segment import CARRYING, Segment, crossing, reduction, smallest_steps
from mamba_int.errors import MambaintError
from mamba_int.graph import Graph

CELLS_OF_LINK = 4
"""What an activation that crosses costs: it enters, and leaves as a copy that is claimed to be equal, by two
cells."""


def cut_points(graph: Graph, greedy: bool = False) -> list[int]:
    """Nodes before which the model can be cut: nothing crosses there but one tensor with a time axis, and the
    tokens that greedy steps are compared with."""
    ends = reduction(graph)
    names = [node.name for node in graph.nodes]
    last = len(names) - 1 if ends is None else names.index(ends.name)
    crossed = {i: set(crossing(graph, i, greedy)) - {graph.input.name} for i in range(1, last + 1)}
    return [i for i, tensors in crossed.items() if len(tensors) == 1]


def cut_stages(graph: Graph, count: int, greedy: bool = False) -> tuple[range, ...]:
    """The nodes of every stage, cut so that the dearest is as cheap as can be.

    Args:
        graph: the model.
        count: of stages; 1 for the whole model in one.
        greedy: as in :class:`circuits.segment.Segment`.

    Raises:
        MambaintError: if the model has fewer places to cut.
    """
    if count == 1:
        return (range(len(graph.nodes)),)
    found = all_cuts(graph, greedy)
    if count not in found:
        raise MambaintError(
            f"the model cannot be cut into {count} stages",
            f"choose at most {max(found)}: every stage needs a block of its own",
        )
    return found[count]


def chain_forms(graph: Graph, parts: tuple[range, ...], form: Segment) -> list[Segment]:
    """What the circuits of a chain prove: every stage, and the head of the last segment where there is one.

    Args:
        graph: the model.
        parts: the nodes of every stage.
        form: of the segments, without nodes.
    """
    stages = [replace(form, nodes=nodes) for nodes in parts]
    return stages if reduction(graph) is None else [*stages, replace(stages[-1], head=True)]


def all_cuts(graph: Graph, greedy: bool = False) -> Mapping[int, tuple[range, ...]]:
    """The best cut into every possible number of stages; see :func:`cut_stages`.

    Every stage has a memory, so that its place in the chain is bound to the states beside it.
    """
    size, ends = len(graph.nodes), reduction(graph)
    remembers = [node.op in CARRYING or node is ends for node in graph.nodes]
    # The next token of greedy decoding is remembered too.
    remembers[-1] |= greedy
    memories = np.cumsum([0, *remembers])
    places = [0, *cut_points(graph, greedy), size]
    cells = _cells_before(graph)
    linked = {
        i: sum(math.prod(graph.types[name].shape[1:]) for name in crossing(graph, i, greedy)) * CELLS_OF_LINK
        for i in places[1:-1]
    } | {0: 0, size: 0}

    def cost(start: int, stop: int) -> float:
        return float(cells[stop] - cells[start]) + linked[start] + linked[stop]

    # By the place where they stop: the cheapest cuts into as many stages as there were rounds.
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, (0,))}
    found: dict[int, tuple[range, ...]] = {}
    while best:
        following: dict[int, tuple[float, tuple[int, ...]]] = {}
        for stop in places[1:]:
            choices = [
                (max(dearest, cost(edges[-1], stop)), (*edges, stop))
                for dearest, edges in best.values()
                if edges[-1] < stop and memories[edges[-1]] < memories[stop]
            ]
            if choices:
                following[stop] = min(choices)
        best = following
        if size in best:
            edges = best[size][1]
            found[len(edges) - 1] = tuple(range(a, b) for a, b in pairwise(edges))
    return found


def _cells_before(graph: Graph) -> NDArray[np.float64]:
    """Cells a step of all nodes before each, measured on the shortest segment."""
    steps = smallest_steps(graph)
    lowered = lower(graph, LARGEST_LOGROWS, False, True, segment=Segment(steps))
    position = {node.name: i for i, node in enumerate(graph.nodes)}
    cells = np.zeros(len(graph.nodes) + 1)
    for part, kinds in lowered.cost.items():
        owner = owner_of(part, position)
        cells[1 + (position[owner] if owner else 0)] += sum(kinds.values()) / steps
    return np.cumsum(cells)
