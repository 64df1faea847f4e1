"""A stretch of a sequence as a circuit of its own: what it takes from the steps before it and hands on.

The state between two stretches is what decoding remembers at the end of a chunk
(``mamba_int.decoding_state``): of every scan its H, of every convolution the last K - 1 steps, and of a
reduction over time what it has come to. A stretch can be cut once more, into stages of some nodes each
(``circuits.stages``): then the activations that later nodes read cross as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from circuits.cells import Cells, Get, Ids, Values
from mamba_int.errors import MambaintError
from mamba_int.graph import Graph, IntArray, Node, TensorType
from mamba_int.operations import OPERATIONS

FLAGS = "flags"
"""Name of the private tensor that says which steps are greedy."""
NEXT_TOKEN = "token:next"
"""The part of the state that says which token greedy decoding gives next."""
PLACE = "place"
"""Name of the private tensor that holds a segment's place in its chain."""


CARRYING = ("conv", "scan", "ssd")
"""Operations whose memory :class:`Carried` hands on."""


@dataclass(frozen=True)
class Segment:
    """Which stretch a circuit proves.

    Attributes:
        steps: of the stretch.
        head: it ends sequences of ``graph.seq_len`` steps: what follows the sum or maximum over time is
            computed, and nothing handed on. Other graphs have no head: every stretch gives its logits.
        hidden: the states are not shown, but committed to: each proof begins with a point for the state that
            enters, and one for the state that leaves.
        greedy: instead of the logits, which steps are greedy: each has the token of the largest logit, the
            first of equal ones, of the step before. Which token comes next is a part of the state.
        nodes: of the graph that it computes: its stage; None for all.
    """

    steps: int
    head: bool = False
    hidden: bool = False
    greedy: bool = False
    nodes: range | None = None

    def first_stage(self) -> bool:
        """Whether it reads the model input."""
        return self.nodes is None or self.nodes.start == 0

    def last_stage(self, graph: Graph) -> bool:
        """Whether it computes the output."""
        return self.nodes is None or self.nodes.stop == len(graph.nodes)


def reduction(graph: Graph) -> Node | None:
    """The sum or maximum over time, if the graph has one. The last step is no such thing: what follows it has
    a value at the end of every stretch."""
    found = (node for node in graph.nodes if node.op == "reduce" and node.attributes["kind"] != "last")
    return next(found, None)


def step_unit(graph: Graph) -> int:
    """Stretches are multiples of so many steps: whole chunks, and whole periods of the rotations.

    Raises:
        MambaintError: if the graph cannot be cut.
    """
    periods = []
    for node in graph.nodes:
        inputs = [graph.types[name] for name in node.inputs]
        if node.op not in CARRYING and OPERATIONS[node.op].initial_memory(node, inputs):
            raise MambaintError(
                f"the state of '{node.name}' ({node.op}) is not carried from segment to segment",
                "prove this model in one piece",
            )
        if node.op == "rotate":
            periods.append(node.integer("period"))
        elif node.op == "ssd":
            if OPERATIONS[node.op].chunk(node) is None:
                raise MambaintError(
                    f"the model has one chunk of {node.integer('chunk_size')} steps, whose state is not "
                    "carried further",
                    "give a model exported with more than one chunk",
                )
            periods.append(node.integer("chunk_size"))
    return math.lcm(*periods) if periods else 1


def check_greedy(graph: Graph) -> None:
    """Refuse a model that does not give the logits of a next token at every step.

    Raises:
        MambaintError: saying so.
    """
    tokens, logits = graph.types[graph.input.name], graph.types[graph.output]
    if len(tokens.shape) != 1 or len(logits.shape) != 2 or logits.shape[0] != graph.seq_len or tokens.low:
        raise MambaintError("the model is no language model", "prove its logits instead")


def check_steps(graph: Graph, segment: Segment) -> None:
    """Refuse a stretch that does not begin and end where the state is what :class:`Carried` holds.

    Raises:
        MambaintError: naming the unit.
    """
    unit, least = step_unit(graph), smallest_steps(graph)
    if segment.steps % unit or segment.steps < least:
        raise MambaintError(
            f"the model cannot be cut into segments of {segment.steps} steps",
            f"choose a multiple of {unit}" + (f", at least {least}" if least > unit else ""),
        )


def smallest_steps(graph: Graph) -> int:
    """Of the shortest stretch: whole units, and what a convolution remembers."""
    unit = step_unit(graph)
    windows = [node.constants["taps"].shape[1] - 1 for node in graph.nodes if node.op == "conv"]
    most: int = max([1, *windows])
    return -(-most // unit) * unit


def types_of(graph: Graph, segment: Segment) -> dict[str, TensorType]:
    """Types of the tensors of a stretch: those with a time axis have its steps, the others the bounds of the
    whole."""
    whole, own = graph.types, replace(graph, seq_len=segment.steps).types
    timeless: set[str] = set()
    for node in graph.nodes:
        if node.op == "reduce" or (node.inputs and all(name in timeless for name in node.inputs)):
            timeless.add(node.name)
    return {name: whole[name] if name in timeless else own[name] for name in own}


def crossing(graph: Graph, start: int, greedy: bool) -> list[str]:
    """Names of the tensors made before the node at ``start`` that it or later nodes read, in order; greedy
    steps are checked at the end, and read the tokens."""
    made = {node.name for node in graph.nodes[:start]}
    read = {name for node in graph.nodes[start:] for name in node.inputs}
    if greedy:
        read.add(graph.input.name)
    return [node.name for node in graph.nodes if node.name in made & read]


@dataclass
class Carried:
    """What enters and leaves a circuit: the state, in the order of the graph's nodes, and activations.

    Attributes:
        cells: receives the cells that enter.
        shapes: of the parts of the state, by name: ``node:what``.
        first: what these parts are before the first step.
        activations_in: shapes of the activations that enter, by name: ``node:activation``.
        activations_out: shapes of those that leave.
    """

    cells: Cells
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    first: dict[str, int] = field(default_factory=dict)
    activations_in: dict[str, tuple[int, ...]] = field(default_factory=dict)
    activations_out: dict[str, tuple[int, ...]] = field(default_factory=dict)
    _entered: dict[str, Ids] = field(default_factory=dict)
    _leaving: dict[str, Callable[[], Ids]] = field(default_factory=dict)

    def enter(self, name: str, shape: tuple[int, ...], low: int, high: int, first: int = 0) -> Ids:
        """A part of the state as cells.

        Nothing here proves the bounds: the stretch before does, whose cells these are equal to, and that the
        first state is what it has to be is for the verifier to see.
        """
        self.shapes[name], self.first[name] = shape, first
        self._entered[name] = self.cells.private(name, shape, low, high, _given)
        return self._entered[name]

    def enter_activation(self, node: str, tensor: TensorType) -> Ids:
        """A tensor of the stage before as cells, within bounds that are proved there."""
        name = activation(node)
        self.activations_in[name] = tensor.shape
        self._entered[name] = self.cells.private(name, tensor.shape, tensor.low, tensor.high, _given)
        return self._entered[name]

    def leave(self, name: str, make: Callable[[], Ids]) -> None:
        """Say how the part's cells for the next stretch are made."""
        self._leaving[name] = make

    def leave_activation(self, node: str, ids: Ids) -> None:
        """Hand a tensor on to the next stage."""
        self.activations_out[activation(node)] = ids.shape
        self._leaving[activation(node)] = lambda: ids

    def entered(self, names: Iterable[str]) -> Ids:
        """Cells that enter under these names, flat."""
        return _flat([self._entered[name] for name in names])

    def left(self, names: Iterable[str]) -> Ids:
        """Cells that leave under these names, flat."""
        return _flat([self._leaving[name]() for name in names])

    def copied(self, names: Iterable[str]) -> tuple[Ids, Ids]:
        """Cells that leave under these names, flat, and as many private ones that must be equal to them."""
        parts = {name: self._leaving[name]() for name in names}
        return _flat(list(parts.values())), _flat([self._copy(name, ids) for name, ids in parts.items()])

    def _copy(self, name: str, cells: Ids) -> Ids:
        # What leaves as a state has the bounds of what enters as one.
        low, high = self.cells.bounds(self._entered[name] if name in self.shapes else cells)
        shape = self.shapes.get(name, cells.shape)
        return self.cells.private(leaving(name), shape, low, high, lambda get: get(cells))


def activation(node: str) -> str:
    """Name of a node's tensor where it crosses from stage to stage."""
    return f"{node}:activation"


def leaving(name: str) -> str:
    """Name of the private copy of what leaves."""
    return f"{name}.next"


def _flat(parts: list[Ids]) -> Ids:
    return np.concatenate([part.ravel() for part in parts]) if parts else np.zeros(0, np.int64)


def _given(get: Get) -> Values:
    raise ValueError("the state was not given")


def initial_state(shapes: Mapping[str, tuple[int, ...]], first: Mapping[str, int]) -> IntArray:
    """The state before the first step, flat."""
    parts = [np.full(math.prod(shape), first[name], np.int64) for name, shape in shapes.items()]
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def by_name(shapes: Mapping[str, tuple[int, ...]], flat: IntArray) -> dict[str, IntArray]:
    """The parts of a flat state, or of flat activations, by name."""
    sizes = [math.prod(shape) for shape in shapes.values()]
    parts = np.split(flat, np.cumsum(sizes)[:-1]) if sizes else []
    return {name: part.reshape(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
