"""Graphs of one operation, random native models of every form, and the scan once more, step by step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from mamba_int.graph import Graph, IntArray, Node
from mamba_int.interpreter import evaluate
from quantize.equality import compare, torch_tracer
from tests.circuits_runtime.models import features, graph_of

torch.set_num_threads(1)

FORMS: dict[str, dict[str, Any]] = {
    "default": {},
    "squareplus_algebraic_shear": {"gate": "algebraic", "activation": "squareplus", "rotation": "shear"},
    "hard_sigmoid_unrotated": {"gate": "hard_sigmoid", "rotation": "none", "pooling": "last"},
    "int8_unnormed": {"weights": "int8", "gate": "algebraic", "pooling": "last", "final_norm": False},
    "int8_unbiased": {"weights": "int8", "gate": "hard_sigmoid", "conv_bias": False, "activate_BC": True},
    "ternary_input": {"input_weights": "ternary", "final_norm": False, "input_low": -127, "input_high": 127},
    "one_step": {"seq_len": 1, "chunk_size": 1},
    "chunks_of_one": {"seq_len": 5, "chunk_size": 1, "rotation": "shear"},
    "two_layers_ragged": {"seq_len": 19, "n_layer": 2, "chunk_size": 4},
    "wide_conv": {"seq_len": 9, "chunk_size": 2, "d_conv": 12},
    "language_model": {"task": "language_model", "vocab_size": 11, "seq_len": 13, "chunk_size": 4},
}
"""What each model changes in ``tests.circuits_runtime.models.SMALL``."""


def node(
    name: str,
    op: str,
    *inputs: str,
    constants: Mapping[str, Any] | None = None,
    frac: int = 0,
    **attributes: Any,
) -> Node:
    """A node with int64 constants."""
    held = {key: np.asarray(value, dtype=np.int64) for key, value in (constants or {}).items()}
    return Node(name, op, inputs, attributes, held, frac)


def chain(*nodes: Node, width: int, low: int, high: int, seq_len: int = 1) -> Graph:
    """input [seq_len, width] in low..high -> the nodes; the last is the output."""
    return graph_of(features(low, high, width), *nodes, seq_len=seq_len)


def traced(graph: Graph, inputs: IntArray) -> dict[str, IntArray]:
    """Every tensor of the specification."""
    trace: dict[str, IntArray] = {}
    evaluate(graph, inputs, trace)
    return trace


def assert_equal(graph: Graph, inputs: IntArray) -> None:
    """PyTorch computes every tensor of the specification."""
    equality = compare(graph, inputs, {"torch": torch_tracer(graph)})
    assert equality.first is None
    assert equality.equal


def random_batch(graph: Graph, seed: int = 0, count: int = 3, seq_len: int | None = None) -> IntArray:
    """All lowest, all highest, random extremes, random values."""
    random = np.random.default_rng(seed)
    tensor = graph.types[graph.input.name]
    shape = (seq_len or graph.seq_len, *tensor.shape[1:])
    low, high = np.full(shape, tensor.low), np.full(shape, tensor.high)
    picked = np.where(random.integers(0, 2, (count, *shape)) > 0, tensor.high, tensor.low)
    values = random.integers(tensor.low, tensor.high + 1, (count, *shape))
    return np.concatenate([low[None], high[None], picked, values]).astype(np.int64)


# -- the scan -------------------------------------------------------------------------------------------

RECOMMENDED: dict[str, int] = {
    "decay_bits": 8,
    "A_bits": 12,
    "G_shift": 2,
    "G_limit": 4094,
    "M_shift": 16,
    "A_u_bits": 10,
    "u_shift": 8,
    "beta_shift": 9,
    "H_align": 5,
    "rotation_frac": 10,
    "M_align": 4,
    "u_align": 0,
    "D_align": 6,
}
"""The bit budget of integer-training.md, section 3, for N = 16 (M 8, beta 11, H 11, u 13 bits)."""


def scan_graph(
    seq_len: int,
    chunk_size: int,
    headdim: int = 2,
    heads: int = 2,
    state: int = 4,
    angles: Any = (0.3, 1.3),
    D: Any = (127, -128),
    **attributes: Any,
) -> Graph:
    """One ``ssd`` whose operands are slices of an int8 input; B, C and n are what they would be rotated.

    The decay is the sum of two slices, clamped, so that the input reaches both 0 and 2^k - 1.
    """
    settings = RECOMMENDED | attributes
    angle = np.resize(np.asarray(angles, float), state // 2) * chunk_size
    one = 1 << settings["rotation_frac"]
    cut: dict[str, int] = {"x": heads * headdim, "B": state, "C": state, "B_next": state, "n_low": heads}
    nodes, start = [], 0
    for name, width in cut.items():
        nodes.append(node(name, "slice", "input", start=start, stop=start + width))
        start += width
    nodes += [
        node("n_wide", "add", "n_low", constants={"value": 128}),
        node("n", "clamp", "n_wide", low=0, high=(1 << settings["decay_bits"]) - 1, saturation=False),
    ]
    constants: dict[str, Any] = {
        "D": np.resize(np.asarray(D), heads),
        "cos_Q": np.trunc(np.cos(angle) * one),
        "sin_Q": np.trunc(np.sin(angle) * one),
    }
    operands = ["x", "B", "C", "n", "B_next"]
    nodes.append(
        node(
            "y",
            "ssd",
            *operands,
            constants=constants,
            chunk_size=chunk_size,
            headdim=headdim,
            **settings,
        )
    )
    return chain(*nodes, width=start, low=-128, high=127, seq_len=seq_len)


def rounded(value: Any, k: int) -> Any:
    """floor((x + 2^(k-1)) / 2^k) by exact floor division: not how the package does it."""
    return value * 2**-k if k <= 0 else (value + 2 ** (k - 1)) // 2**k


class Decoder:
    """integer-training.md, section 1, one token and one head at a time.

    Between tokens it holds only what generation holds: H, the row A[t, .], and of the open chunk x_s,
    B^_s and B'_s.
    """

    def __init__(self, graph: Graph, name: str, head: int) -> None:
        self.ssd = graph.by_name[name]
        self.a: dict[str, int] = {key: int(value) for key, value in self.ssd.attributes.items()}  # type: ignore[arg-type]
        self.head = head
        half = len(self.ssd.constants["cos_Q"])
        self.H = np.zeros((self.a["headdim"], 2 * half), np.int64)
        self.open()

    def open(self) -> None:
        """Begin a chunk."""
        self.row = [2 ** self.a["A_bits"]]
        self.kept: list[tuple[IntArray, IntArray, IntArray]] = []

    def step(self, x: IntArray, B: IntArray, C: IntArray, n: int, B_next: IntArray) -> dict[str, Any]:
        """Consume one token; return y before its shift, and the scalars that made it."""
        a, k = self.a, self.a["decay_bits"]
        self.row = [rounded(entry * n, k) for entry in self.row]
        self.row.append((2**k - n) * 2 ** (a["A_bits"] - k))
        self.kept.append((x, B, B_next))
        limit = a["G_limit"]
        G = [max(-limit, min(limit, rounded(int(C @ b), a["G_shift"]))) for _, b, _ in self.kept]
        M = [rounded(entry * g, a["M_shift"]) for entry, g in zip(self.row[1:], G, strict=True)]
        u = rounded(self.H @ C, a["u_shift"])
        A_u = rounded(self.row[0], a["A_bits"] - a["A_u_bits"])
        y = sum(m * kept[0] for m, kept in zip(M, self.kept, strict=True)) * 2 ** a["M_align"]
        y = y + A_u * u * 2 ** a["u_align"] + int(self.ssd.constants["D"][self.head]) * x * 2 ** a["D_align"]
        result = {"y": y, "A": list(self.row), "G": G, "M": M, "u": u, "A_u": A_u}
        if len(self.kept) == a["chunk_size"]:
            self.close()
            result["H"] = self.H
        return result

    def close(self) -> None:
        """End the chunk: one rounding per state element, rotation included."""
        a, half = self.a, self.H.shape[1] // 2
        across = self.row[0]
        kappa = rounded(across * self.ssd.constants["cos_Q"], a["rotation_frac"])
        sigma = rounded(across * self.ssd.constants["sin_Q"], a["rotation_frac"])
        inflow = np.zeros_like(self.H)
        for entry, (x, _, B_next) in zip(self.row[1:], self.kept, strict=True):
            inflow += np.outer(x, rounded(entry * B_next, a["beta_shift"]))
        inflow = inflow * 2 ** a["H_align"]
        H1, H2 = self.H[:, :half], self.H[:, half:]
        first = rounded(kappa * H1 - sigma * H2 + inflow[:, :half], a["A_bits"])
        second = rounded(sigma * H1 + kappa * H2 + inflow[:, half:], a["A_bits"])
        self.H = np.concatenate([first, second], 1)
        self.open()


def decode(graph: Graph, trace: Mapping[str, IntArray], name: str = "y") -> list[list[list[dict[str, Any]]]]:
    """Token by token, from the traced operands of the scan: [batch][head][t]."""
    ssd = graph.by_name[name]
    x, B, C, n, B_next = (trace[source] for source in ssd.inputs)
    P = int(ssd.attributes["headdim"])
    result = []
    for i in range(len(x)):
        heads = []
        for head in range(n.shape[-1]):
            decoder = Decoder(graph, name, head)
            channels = slice(head * P, (head + 1) * P)
            heads.append(
                [
                    decoder.step(x[i, t, channels], B[i, t], C[i, t], int(n[i, t, head]), B_next[i, t])
                    for t in range(x.shape[1])
                ]
            )
        result.append(heads)
    return result
