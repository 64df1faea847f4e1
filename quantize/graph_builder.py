"""Nodes of an integer graph, one after the other, each with its proven interval at once."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from mamba_int.errors import MambaintError
from mamba_int.graph import Graph, Node, TensorType
from mamba_int.operations import OPERATIONS
from mamba_int.passes import optimize

LOWER = {
    "linear": "weight_bits or activation_bits",
    "conv": "internal_bits",
    "embedding": "residual_bits",
    "mul": "internal_bits or activation_bits",
    "add": "residual_bits or internal_bits",
    "ssd": "A_bits, decay_bits, scan_bits, activation_bits or chunk_size",
    "reduce": "activation_bits",
}
"""What keeps an operation's intermediates smaller, where one setting does."""


def located(name: str, op: str) -> str:
    """A node, its operation and its layer in words."""
    layer = re.match(r"layer(\d+)\.", name)
    return f"'{name}' ({op}) " + (f"of layer {layer.group(1)}" if layer else "outside the layers")


def exceeded(name: str, op: str, peak: int, max_bits: int) -> MambaintError:
    """The error of a node that does not fit the budget: where, by how much, and what to lower.

    Args:
        name: of the node. op: its operation. peak: largest intermediate. max_bits: of the budget.
    """
    lower = LOWER.get(op, "internal_bits, activation_bits or weight_bits")
    wider = " or raise max_bits (29 is what runs in int32)" if max_bits < 29 else ""
    return MambaintError(
        f"{located(name, op)} can reach {peak}, {peak.bit_length()} bits, beyond {max_bits}",
        f"lower {lower}{wider}",
    )


class GraphBuilder:
    """A graph in the making.

    Args:
        seq_len: of the graph.
        max_bits: no intermediate may exceed 2**max_bits.
    """

    def __init__(self, seq_len: int, max_bits: int) -> None:
        self.seq_len = seq_len
        self.max_bits = max_bits
        self.nodes: list[Node] = []
        self.types: dict[str, TensorType] = {}
        self.frac: dict[str, int] = {}
        self.by_name: dict[str, Node] = {}

    def add(
        self,
        name: str,
        op: str,
        *inputs: str,
        frac: int,
        constants: Mapping[str, Any] | None = None,
        **attributes: Any,
    ) -> str:
        """Append a node; return its name.

        Raises:
            MambaintError: if it can exceed ``max_bits``, or has constants that the operation does not take.
        """
        held = {key: np.array(value, np.int64) for key, value in (constants or {}).items()}
        node = Node(name, op, inputs, attributes, held, frac)
        try:
            tensor = OPERATIONS[op].infer(node, [self.types[source] for source in inputs], self.seq_len)
        except ValueError as error:
            raise MambaintError(
                f"{located(name, op)} has no integer form: {error}", "calibrate with data as it comes in use"
            ) from error
        if tensor.peak > 1 << self.max_bits:
            raise exceeded(name, op, tensor.peak, self.max_bits)
        self.nodes.append(node)
        self.by_name[name] = node
        self.types[name] = tensor
        self.frac[name] = frac
        return name

    def shift(self, name: str, source: str, frac: int) -> str:
        """Round to ``frac`` places; the source itself if it has them."""
        # More places than these leave as little: nothing.
        places = min(self.frac[source] - frac, self.types[source].magnitude.bit_length() + 1)
        return self.add(name, "shift", source, frac=frac, places=places) if places else source

    def saturate(self, name: str, source: str, low: int, high: int) -> str:
        """Keep within low..high."""
        return self.add(name, "clamp", source, frac=self.frac[source], low=low, high=high, saturation=True)

    def requantize(self, name: str, source: str, frac: int, limit: int) -> str:
        """Round to ``frac`` places and saturate at +-limit."""
        return self.saturate(name, self.shift(f"{name}_wide", source, frac), -limit, limit)

    def finish(self, output: str, card: Mapping[str, Any]) -> Graph:
        """The optimized graph, verified whole."""
        return optimize(Graph(tuple(self.nodes), output, self.seq_len, card), self.max_bits)
