"""The PyTorch executor: the same graph on integer-valued floats, on any device, with gradients.

Training runs it too, with constants that are still being learned; see ``mamba_int.model``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mamba_int.graph import Graph, Node
from mamba_int.operations import OPERATIONS


def execute_nodes(
    nodes: Iterable[Node],
    inputs: Tensor,
    trace: dict[str, Tensor] | None = None,
    rounding: bool = True,
) -> dict[str, Tensor]:
    """Run nodes whose constants are float tensors; return every tensor by node name.

    Args:
        nodes: in order of use.
        inputs: integer-valued floats [batch, T, ...].
        trace: if given, receives the intermediates inside operations as ``node.intermediate``.
        rounding: False for the float twin.
    """
    values: dict[str, Tensor] = {}
    for node in nodes:

        def record(name: str, value: Any, prefix: str = node.name) -> None:
            if trace is not None:
                trace[f"{prefix}.{name}"] = value

        operands = [inputs] if node.op == "input" else [values[name] for name in node.inputs]
        values[node.name] = OPERATIONS[node.op].execute(node, operands, record, rounding)
    if trace is not None:
        trace.update(values)
    return values


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
    def __call__(self, inputs: Tensor, trace: dict[str, Tensor] | None = None) -> Tensor:
        """Logits int64 [batch, ...] of integer inputs [batch, T, ...]; ``trace`` as in the interpreter."""
        values = execute_nodes(self.nodes, inputs.to(self.device, self.dtype), trace)
        return values[self.graph.output].long()
