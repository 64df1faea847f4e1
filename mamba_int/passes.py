"""Passes: the same model with fewer nodes. Each returns a graph that is verified whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from mamba_int.graph import Graph, Node, TensorType
from mamba_int.operations import OPERATIONS

Pass = Callable[[Graph], Graph]


def _changes_nothing(node: Node, source: TensorType) -> bool:
    if node.op == "clamp":
        return node.integer("low") <= source.low and source.high <= node.integer("high")
    if node.op == "relu":
        return source.low >= 0
    return node.op == "shift" and node.integer("places") == 0


def eliminate_identities(graph: Graph) -> Graph:
    """Remove clamps whose argument is proven inside their range, relus of what is never negative, and shifts
    by nothing, in one walk: what is removed makes those after it tighter, for a product becomes a square.

    An output that bears another scale than what it stands for stays.
    """
    alias: dict[str, str] = {}
    types: dict[str, TensorType] = {}
    nodes: list[Node] = []
    frac = {node.name: node.frac for node in graph.nodes}
    for node in graph.nodes:
        node = replace(node, inputs=tuple(alias.get(name, name) for name in node.inputs))
        source = node.inputs[0] if node.inputs else ""
        rescaled = node.name == graph.output and frac[source or node.name] != node.frac
        if source and _changes_nothing(node, types[source]) and not rescaled:
            alias[node.name] = source
            continue
        operation = OPERATIONS[node.op]
        types[node.name] = operation.infer(node, [types[name] for name in node.inputs], graph.seq_len)
        nodes.append(node)
    return replace(graph, nodes=tuple(nodes), output=alias.get(graph.output, graph.output))


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
