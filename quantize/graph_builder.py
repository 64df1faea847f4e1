"""Nodes of an integer graph, one after the other, each with its proven interval at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mamba_int.errors import MambaintError
from mamba_int.graph import Graph, Node, TensorType
from mamba_int.operations import OPERATIONS
from mamba_int.passes import optimize


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
            MambaintError: if it can exceed ``max_bits``.
        """
        held = {key: np.array(value, np.int64) for key, value in (constants or {}).items()}
        node = Node(name, op, inputs, attributes, held, frac)
        tensor = OPERATIONS[op].infer(node, [self.types[source] for source in inputs], self.seq_len)
        if tensor.peak > 1 << self.max_bits:
            raise MambaintError(
                f"'{name}' can reach {tensor.peak}, beyond {self.max_bits} bits",
                "lower the bits of activations, weights or the scan",
            )
        self.nodes.append(node)
        self.types[name] = tensor
        self.frac[name] = frac
        return name

    def shift(self, name: str, source: str, frac: int) -> str:
        """Round to ``frac`` places; the source itself if it has them."""
        places = self.frac[source] - frac
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
