"""Where the rows of a circuit go: every part's cells, by layer and by operation of the integer graph."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from circuits.lowering import LoweredCircuit
from mamba_int.graph import Graph, Node

OUTSIDE = "outside"
"""The layer of whatever belongs to none: input, embedding, head, public values."""
PUBLIC = "public values"
_FREE = ("input", "slice", "concat")
"""Operations that only say which cells are meant."""


@dataclass(frozen=True)
class Share:
    """What one part of the model costs.

    Attributes:
        part: name the cells are booked under: a node's, or one of its steps'.
        layer: ``layer0``, ``layer1``, ...; ``outside`` for what belongs to none.
        operation: the node's operation, after those it absorbed: a shift of a product is ``linear+shift``.
        rows: share of the circuit's rows; two cells make one.
    """

    part: str
    layer: str
    operation: str
    rows: float


def breakdown(graph: Graph, lowered: LoweredCircuit) -> tuple[Share, ...]:
    """Shares of all parts, in the order of the graph; they add up to the circuit's rows."""
    position = {node.name: index for index, node in enumerate(graph.nodes)}
    owners = {part: owner_of(part, position) for part in lowered.cost}
    paid = set(owners.values())
    shares = []
    for part in sorted(owners, key=lambda part: position.get(owners[part] or "", len(position))):
        owner = owners[part]
        operation = part if owner is None else _operation(graph, graph.by_name[owner], paid)
        layer = re.match(r"layer\d+(?=\.)", part)
        rows = sum(lowered.cost[part].values()) / 2
        shares.append(Share(part, layer.group() if layer else OUTSIDE, operation, rows))
    instances = sum(tensor.size for tensor in lowered.circuit.public)
    return (*shares, Share(PUBLIC, OUTSIDE, PUBLIC, instances / 2))


def totals(pairs: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Rows by name, in the order of first appearance."""
    rows: dict[str, float] = {}
    for name, share in pairs:
        rows[name] = rows.get(name, 0) + share
    return rows


def owner_of(part: str, names: dict[str, int]) -> str | None:
    """The node whose name is the longest prefix of the part's."""
    pieces = part.split(".")
    prefixes = (".".join(pieces[:count]) for count in range(len(pieces), 0, -1))
    return next((prefix for prefix in prefixes if prefix in names), None)


def _operation(graph: Graph, node: Node, paid: set[str | None]) -> str:
    """The node's operation and, before it, those of producers that have no cells of their own."""
    chain = [node.op]
    while len(node.inputs) == 1:
        node = graph.by_name[node.inputs[0]]
        if node.name in paid:
            break
        if node.op not in _FREE:
            chain.append(node.op)
    return "+".join(reversed(chain))
