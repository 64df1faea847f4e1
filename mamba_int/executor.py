"""The PyTorch executor: the same graph on integer-valued floats, on any device, with gradients.

Training runs it too, with constants that are still being learned; see ``mamba_int.model``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mamba_int.graph import Graph, Node
from mamba_int.operations import OPERATIONS
from mamba_int.operations.base import Trace, recorder

Values = dict[str, Tensor]
Run = Callable[[Values, dict[str, Node]], None]


@dataclass(frozen=True)
class Step:
    """One kernel, or one node by itself.

    Attributes:
        nodes: names of the nodes it computes, in order.
        run: reads and writes the values by name; gets the nodes by name, for their constants.
    """

    nodes: tuple[str, ...]
    run: Run


def execute_plan(
    steps: Iterable[Step], nodes: Sequence[Node], inputs: Tensor, gradient_checkpointing: bool = False
) -> Values:
    """Run a plan; return the values that it wrote, by node name.

    Args:
        steps: computing nodes with these names and attributes, in order.
        nodes: with the constants to use: float tensors, weights narrow.
        inputs: integers [batch, T, ...], as floats.
        gradient_checkpointing: the steps of each layer (nodes ``layer.name``) keep for the backward pass only
            what they read of others, and run once more in it (Chen et al. 2016, arXiv 1604.06174). Of the
            values inside a layer only those that others read are returned.
    """
    by_name = {node.name: node for node in nodes}
    values: Values = {node.name: inputs for node in nodes if node.op == "input"}
    if gradient_checkpointing:
        _execute_layers(steps, by_name, values)
    else:
        for step in steps:
            step.run(values, by_name)
    return values


def _execute_layers(steps: Iterable[Step], by_name: dict[str, Node], values: Values) -> None:
    """Run the steps of each layer as one function of the values it reads; enter those that others read."""
    groups = [(layer, list(group)) for layer, group in groupby(steps, _layer)]
    place = {name: i for i, (_, group) in enumerate(groups) for step in group for name in step.nodes}
    crossing = {
        source for name, node in by_name.items() for source in node.inputs if place[source] != place[name]
    }
    for i, (layer, group) in enumerate(groups):
        if not layer:
            for step in group:
                step.run(values, by_name)
            continue
        inside = [name for step in group for name in step.nodes]
        read = dict.fromkeys(
            source for name in inside for source in by_name[name].inputs if place[source] != i
        )
        results = [name for name in inside if name in crossing]
        run = partial(_run_layer, group, by_name, list(read), results)
        operands = [values[source] for source in read]
        # Nothing in a graph is random.
        found = checkpoint(run, *operands, use_reentrant=False, preserve_rng_state=False)
        values.update(zip(results, found, strict=True))


def _run_layer(
    steps: list[Step], by_name: dict[str, Node], sources: list[str], results: list[str], *operands: Tensor
) -> list[Tensor]:
    """The values ``results`` from those of ``sources``."""
    values = dict(zip(sources, operands, strict=True))
    for step in steps:
        step.run(values, by_name)
    return [values[name] for name in results]


def _layer(step: Step) -> str:
    layer, dot, _ = step.nodes[0].partition(".")
    return layer if dot else ""


def execute_nodes(
    nodes: Sequence[Node],
    inputs: Tensor,
    trace: Trace | None = None,
    rounding: bool = True,
    observe: Callable[[str, Tensor], None] | None = None,
    gradient_checkpointing: bool = False,
) -> Values:
    """Run nodes one by one; return their tensors by node name.

    Args:
        nodes: in order of use; their constants are float tensors.
        inputs: integer-valued floats [batch, T, ...].
        trace: if given, receives the tensors that are returned, and the intermediates inside operations as
            ``node.intermediate``.
        rounding: False for the float twin.
        observe: if given, told every tensor by node name when it is computed, also in the backward pass.
        gradient_checkpointing: as in :func:`execute_plan`.
    """

    def step(node: Node) -> Step:
        def run(values: Values, by_name: dict[str, Node]) -> None:
            operands = [values[name] for name in (node.inputs or (node.name,))]
            value = OPERATIONS[node.op].execute(node, operands, recorder(node, trace), rounding)
            values[node.name] = value
            if observe is not None:
                observe(node.name, value)

        return Step((node.name,), run)

    values = execute_plan([step(node) for node in nodes], nodes, inputs, gradient_checkpointing)
    if trace is not None:
        for name, value in values.items():
            trace[name] = value
    return values


class GraphPredictor:
    """A finished graph that gives real-valued logits, for scoring it like any other model.

    Args:
        graph: the model. device: where to run.
    """

    def __init__(self, graph: Graph, device: torch.device) -> None:
        self._executor = Executor(graph, device)
        self._unit = 2.0 ** -graph.by_name[graph.output].frac

    def __call__(self, inputs: Tensor) -> Tensor:
        """float32 logits [batch, ...] of integer inputs [batch, T, ...]."""
        return self._executor(inputs).float() * self._unit

    def eval(self) -> None:
        """A finished graph has no other mode."""


class Executor:
    """A finished graph loaded on a device.

    Args:
        graph: the model. Up to 24 bits it runs in float32, beyond in float64: exact either way.
        device: where to run.
    """

    def __init__(self, graph: Graph, device: torch.device | str = "cpu") -> None:
        self.graph = graph
        self.device = torch.device(device)
        self.dtype = torch.float32 if graph.max_bits <= 24 else torch.float64
        self.nodes = [
            replace(
                node,
                constants={
                    key: torch.as_tensor(value, dtype=self.dtype, device=self.device)
                    for key, value in node.constants.items()
                },
            )
            for node in graph.nodes
        ]

    @torch.inference_mode()
    def __call__(self, inputs: Tensor, trace: Trace | None = None) -> Tensor:
        """Logits int64 [batch, ...] of integer inputs [batch, T, ...]; ``trace`` as in the interpreter."""
        values: Values = {}
        for node in self.nodes:
            operands = [values[name] for name in node.inputs]
            if node.op == "input":
                operands = [inputs.to(self.device, self.dtype)]
            value = OPERATIONS[node.op].execute(node, operands, recorder(node, trace), True)
            values[node.name] = value
            if trace is not None:
                trace[node.name] = value
            for name in set(node.inputs):
                if self.graph.last_reader[name] == node.name:
                    del values[name]
        return values[self.graph.output].long()
