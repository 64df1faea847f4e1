"""Passes: the same model with fewer nodes. Each returns a graph that is verified whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from mamba_int.graph import Graph

Pass = Callable[[Graph], Graph]


def _rewired(graph: Graph, alias: dict[str, str]) -> Graph:
    """Drop the nodes in ``alias`` and let their readers read what they stand for."""

    def resolve(name: str) -> str:
        while name in alias:
            name = alias[name]
        return name

    nodes = [
        replace(node, inputs=tuple(resolve(name) for name in node.inputs))
        for node in graph.nodes
        if node.name not in alias
    ]
    return replace(graph, nodes=tuple(nodes), output=resolve(graph.output))


def eliminate_identities(graph: Graph) -> Graph:
    """Remove clamps whose argument is proven inside their range, relus of what is never negative, and
    shifts by nothing."""
    alias: dict[str, str] = {}
    for node in graph.nodes:
        if node.op not in ("clamp", "relu", "shift"):
            continue
        source = graph.types[node.inputs[0]]
        inside = {
            "clamp": lambda n, s: n.integer("low") <= s.low and s.high <= n.integer("high"),
            "relu": lambda n, s: s.low >= 0,
            "shift": lambda n, s: n.integer("places") == 0,
        }[node.op]
        if inside(node, source):
            alias[node.name] = node.inputs[0]
    return _rewired(graph, alias)


def eliminate_dead(graph: Graph) -> Graph:
    """Remove nodes that the output does not depend on; the input stays."""
    keep = {graph.output, graph.input.name}
    for node in reversed(graph.nodes):
        if node.name in keep:
            keep.update(node.inputs)
    return graph.with_nodes([node for node in graph.nodes if node.name in keep])


PASSES: tuple[Pass, ...] = (eliminate_identities, eliminate_dead)


def optimize(graph: Graph, max_bits: int = 53) -> Graph:
    """Run all passes; every intermediate graph is verified.

    Intervals only shrink when a clamp that changed nothing goes, so one round reaches the fixpoint.
    """
    graph.verify(max_bits)
    for run in PASSES:
        graph = run(graph).verify(max_bits)
    return graph
