"""Some valid input of a model, to try its circuit and keys with."""

from __future__ import annotations

import numpy as np

from mamba_int.graph import Graph, IntArray


def sample_input(graph: Graph) -> IntArray:
    """The smallest input value everywhere; int64 without batch axis."""
    low = graph.input.integer("low")
    return np.full(graph.types[graph.input.name].shape, low, dtype=np.int64)
