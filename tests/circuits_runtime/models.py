"""Models for the tests: random native ones of every form, and graphs written out by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from mamba_int.config import MambaIntConfig
from mamba_int.graph import Graph, IntArray, Node
from mamba_int.model import MambaInt
from mamba_int.native import build_nodes
from mamba_int.passes import optimize

SMALL: dict[str, Any] = {
    "d_model": 8,
    "headdim": 4,
    "d_state": 4,
    "n_features": 3,
    "n_classes": 5,
    "seq_len": 8,
    "chunk_size": 8,
}
NARROW: dict[str, Any] = {
    "gate": "hard_sigmoid",
    "final_norm": False,
    "conv_bias": False,
    "activate_BC": True,
    "d_conv": 2,
    "norm_frac": 4,
    "norm_shift": 0,
    "norm_input_bits": 10,
    "residual_frac": 5,
    "activation_bits": 4,
    "y_bits": 5,
    "conv_frac": 6,
    "decay_bits": 6,
    "A_bits": 8,
    "G_headroom": 0,
    "G_limit": 30,
    "M_bits": 12,
}
"""Forms for 2^12 rows, where a proof takes half a second."""


def random_inputs(config: MambaIntConfig, count: int, seed: int = 0) -> IntArray:
    """Random inputs, preceded by the two extreme ones."""
    random = np.random.default_rng(seed)
    shape: tuple[int, ...] = (config.seq_len,)
    low, high = 0, config.vocab_size - 1
    if config.task == "classification":
        shape, low, high = (config.seq_len, config.n_features), config.input_low, config.input_high
    values = random.integers(low, high + 1, (count, *shape))
    extremes = np.stack([np.full(shape, low), np.full(shape, high)])
    return np.concatenate([extremes, values]).astype(np.int64)


def frozen_model(config: MambaIntConfig, seed: int = 0) -> MambaInt:
    """A random model, as if trained."""
    torch.set_num_threads(1)
    model = MambaInt(config, seed)
    model.observe(torch.from_numpy(random_inputs(config, 16, seed)))
    model.freeze_scales()
    return model.eval()


def random_graph(seed: int = 0, **forms: Any) -> tuple[Graph, IntArray]:
    """The graph of a random small model, and inputs for it."""
    config = MambaIntConfig(**(SMALL | forms))
    model = frozen_model(config, seed)
    integers = model.frozen_integers()
    built = build_nodes(config, model.scales(), lambda name, frac: integers[name].numpy())
    graph = optimize(Graph(tuple(built.nodes), built.output, config.seq_len))
    return graph, random_inputs(config, 6, seed + 1)


def features(low: int, high: int, count: int) -> Node:
    """An input of ``count`` features."""
    return Node("input", "input", attributes={"low": low, "high": high, "features": count})


def graph_of(*nodes: Node, seq_len: int = 1) -> Graph:
    """A graph whose last node is the output."""
    return Graph(nodes, nodes[-1].name, seq_len).verify()
