"""Passes: the same model with fewer nodes. Each returns a graph that is verified whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from mamba_int.graph import Graph, Node, TensorType

Pass = Callable[[Graph], Graph]


def _resolve(name: str, alias: dict[str, str]) -> str:
    while name in alias:
        name = alias[name]
    return name


def _rewired(graph: Graph, alias: dict[str, str]) -> Graph:
    """Drop the nodes in ``alias`` and let their readers read what they stand for."""
    nodes = [
        replace(node, inputs=tuple(_resolve(name, alias) for name in node.inputs))
        for node in graph.nodes
        if node.name not in alias
    ]
    return replace(graph, nodes=tuple(nodes), output=_resolve(graph.output, alias))


def _changes_nothing(node: Node, source: TensorType) -> bool:
    if node.op == "clamp":
        return node.integer("low") <= source.low and source.high <= node.integer("high")
    if node.op == "relu":
        return source.low >= 0
    return node.op == "shift" and node.integer("places") == 0


def _identities(graph: Graph) -> dict[str, str]:
    """Nodes that change nothing, and what they stand for; an output that bears another scale stays."""
    alias = {
        node.name: node.inputs[0]
        for node in graph.nodes
        if node.inputs and _changes_nothing(node, graph.types[node.inputs[0]])
    }
    if graph.by_name[_resolve(graph.output, alias)].frac != graph.by_name[graph.output].frac:
        del alias[graph.output]
    return alias


def eliminate_identities(graph: Graph) -> Graph:
    """Remove clamps whose argument is proven inside their range, relus of what is never negative, and
    shifts by nothing, until none is left: a product becomes a square, and so tighter, as they go."""
    while alias := _identities(graph):
        graph = _rewired(graph, alias)
    return graph


def eliminate_dead(graph: Graph) -> Graph:
    """Remove nodes that the output does not depend on; the input stays."""
    keep = {graph.output, graph.input.name}
    for node in reversed(graph.nodes):
        if node.name in keep:
            keep.update(node.inputs)
    return graph.with_nodes([node for node in graph.nodes if node.name in keep])


PASSES: tuple[Pass, ...] = (eliminate_identities, eliminate_dead)


def optimize(graph: Graph, max_bits: int = 53) -> Graph:
    """Run all passes; every intermediate graph is verified."""
    graph.verify(max_bits)
    for run in PASSES:
        graph = run(graph).verify(max_bits)
    return graph
