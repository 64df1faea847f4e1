"""``ssd`` as ONNX nodes: the offsets inside a chunk and the chunks of the state are unrolled.

Letters and layouts as in ``mamba_int/operations/ssd.py``. Products of matrices are in floats where the bounds
of the scan prove them exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from circuits.runtime.builder import Builder
from circuits.runtime.clock import Clock
from mamba_int.graph import Node
from mamba_int.operations.ssd import node_bounds


@dataclass(frozen=True)
class _Chunks:
    """How a sequence divides: ``count`` chunks of ``size`` steps, the last one padded with zeros."""

    length: int
    size: int

    @property
    def count(self) -> int:
        return -(-self.length // self.size)

    def split(self, b: Builder, x: str, *last: int) -> str:
        """[batch, T, ...] to [batch, count, size, *last]."""
        padded = b.pad(x, 3, 1, 0, self.count * self.size - self.length)
        return b.reshape(padded, 0, self.count, self.size, *last)


@dataclass(frozen=True)
class _Bounds:
    """Proven bounds of the sums of the magnitudes of the terms of the products of matrices, and of their
    operands: C^ . B^, M x, x beta and H C^."""

    G: int
    y: int
    inflow: int
    u: int

    @classmethod
    def of(cls, b: Builder, node: Node) -> _Bounds:
        types = [b.graph.types[name] for name in node.inputs]
        x, B, C = (tensor.magnitude for tensor in types[:3])
        s = node_bounds(node, types)
        return cls(max(s.G_pre, B, C), max(s.Mx, s.M, x), max(s.H_pre, s.beta, x), max(s.u_pre, s.H, C))


def ssd(b: Builder, node: Node, inputs: Sequence[str]) -> str:
    """The chunked scan of a whole sequence.

    Args:
        b: receives the nodes. node: the scan.
        inputs: x [batch, T, H P], B^ and C^ [batch, T, N], n [batch, T, H] and possibly B' [batch, T, N].
    """
    types = [b.graph.types[name] for name in node.inputs]
    bounds = _Bounds.of(b, node)
    length, state = types[1].shape
    heads, P = types[3].shape[-1], node.integer("headdim")
    chunks = _Chunks(length, min(node.integer("chunk_size"), length))
    Q = chunks.size

    # [batch, chunks, heads, Q, P]
    X = b.transpose(chunks.split(b, inputs[0], heads, P), 0, 1, 3, 2, 4)
    Bh, Ch = (chunks.split(b, name, state) for name in inputs[1:3])
    n = b.transpose(chunks.split(b, inputs[3], heads), 0, 1, 3, 2)

    A = b.call(_decay_products(b, node, n, Q), f"{node.name}.A")
    G = _G(b, node, b.matmul(Ch, b.transpose(Bh, 0, 1, 3, 2), bounds.G))
    G = b.call(b.mul(G, b.constant(np.tri(Q, dtype=np.int64))), f"{node.name}.G")
    AG = b.mul(b.slice(A, 1, Q + 1), b.unsqueeze(G, 2))
    M = b.call(b.shift(AG, node.integer("M_shift")), f"{node.name}.M")
    y = _inside(b, node, M, X, X, bounds.y)
    if chunks.count > 1:
        y = b.add(y, _carry(b, node, A, X, Ch, chunks.split(b, inputs[4], state), chunks, bounds))
    y = b.reshape(b.transpose(y, 0, 1, 3, 2, 4), 0, chunks.count * Q, heads * P)
    return b.slice(y, 0, length, axis=1) if chunks.count * Q > length else y


def _decay(b: Builder, node: Node, A: str, n: str) -> str:
    """The entries of A[t-1, .] decayed by n_t."""
    # Neither is ever negative.
    return b.shift(b.mul(A, n), node.integer("decay_bits"), 0)


def _entering(b: Builder, node: Node, n: str) -> str:
    """A[t, t]."""
    k = node.integer("decay_bits")
    return b.scale(b.sub(b.constant(1 << k), n), node.integer("A_bits") - k)


def _decay_products(b: Builder, node: Node, n: str, Q: int) -> str:
    """A [batch, chunks, heads, Q, Q + 1] from the decays n [batch, chunks, heads, Q]."""
    gate = _entering(b, node, n)
    row = b.constant([1 << node.integer("A_bits")])
    rows = []
    for t in range(Q):
        decayed = _decay(b, node, row, b.slice(n, t, t + 1))
        row = b.concat([decayed, b.slice(gate, t, t + 1)], -1)
        rows.append(b.unsqueeze(b.pad(row, 4, -1, 0, Q - 1 - t), 3))
    return b.concat(rows, 3)


def _G(b: Builder, node: Node, products: str) -> str:
    limit = node.integer("G_limit")
    return b.clip(b.shift(products, node.integer("G_shift")), -limit, limit)


def _inside(b: Builder, node: Node, M: str, x: str, X: str, bound: int) -> str:
    """What the open chunk contributes to y, M x + D X: M [..., t, s], x [..., s, P], X [..., t, P]."""
    D = np.asarray(node.constants["D"])[:, None, None]
    y = b.scale(b.matmul(M, x, bound), node.integer("M_align"))
    return b.add(y, b.mul(X, b.constant(D << node.integer("D_align")))) if D.any() else y


def _boundary(b: Builder, node: Node, last: str, X: str, Bn: str, axes: int) -> tuple[str, str, str]:
    """What a chunk hands on, from A[Q-1, .] [..., H, 1, Q + 1], x [..., H, Q, P] and B' [..., 1, Q, N].

    Returns:
        kappa and sigma [..., H, 1, N/2], (sum_s x_s beta_s) << c [..., H, P, N], all of ``axes`` axes.
    """
    Q, name = node.integer("chunk_size"), node.name
    swapped = [*range(axes - 2), axes - 1, axes - 2]
    weights = b.transpose(b.slice(last, 1, Q + 1), *swapped)
    beta = b.call(b.shift(b.mul(weights, Bn), node.integer("beta_shift")), f"{name}.beta")
    bound = _Bounds.of(b, node).inflow
    turned = b.transpose(b.cast(X, b.real(bound)), *swapped)
    inflow = b.scale(b.matmul(b.typed(turned, b.real(bound)), beta, bound), node.integer("H_align"))
    across = b.slice(last, 0, 1)
    products = (b.mul(across, b.constant(node.constants[key])) for key in ("cos_Q", "sin_Q"))
    kappa, sigma = (b.shift(value, node.integer("rotation_frac")) for value in products)
    return kappa, sigma, inflow


def _next_H(b: Builder, node: Node, H: str, kappa: str, sigma: str, inflow: str) -> str:
    """H' [..., P, N]."""
    half = len(node.constants["cos_Q"])
    if node.constants["sin_Q"].any():
        H1, H2 = b.slice(H, 0, half), b.slice(H, half, 2 * half)
        first = b.sub(b.mul(kappa, H1), b.mul(sigma, H2))
        second = b.add(b.mul(sigma, H1), b.mul(kappa, H2))
        turned = b.concat([first, second], -1)
    else:
        # Nothing turns, and sigma is zero.
        alike = (node.constants["cos_Q"] == node.constants["cos_Q"][0]).all()
        turned = b.mul(H, b.slice(kappa, 0, 1) if alike else b.concat([kappa, kappa], -1))
    return b.shift(b.add(turned, inflow), node.integer("A_bits"))


def _carry(
    b: Builder,
    node: Node,
    A: str,
    X: str,
    Ch: str,
    Bn: str,
    chunks: _Chunks,
    bounds: _Bounds,
) -> str:
    """What earlier chunks contribute to y, [batch, chunks, heads, Q, P]."""
    fA, Q = node.integer("A_bits"), chunks.size
    last = b.slice(A, Q - 1, Q, axis=3)
    kappa, sigma, inflow = _boundary(b, node, last, X, b.unsqueeze(Bn, 2), 5)
    for name, value in (("kappa", kappa), ("sigma", sigma)):
        b.call(b.op("Squeeze", value, b.sizes(3)), f"{node.name}.{name}")
    # The state before the first chunk is zero.
    H = b.shift(b.slice(inflow, 0, 1, axis=1), fA)
    states = [H]
    for i in range(1, chunks.count - 1):
        here = (b.slice(value, i, i + 1, axis=1) for value in (kappa, sigma, inflow))
        H = _next_H(b, node, H, *here)
        states.append(H)
    states_named = b.call(b.concat(states, 1), f"{node.name}.H")
    incoming = b.pad(states_named, 5, 1, 1, 0)
    u = b.matmul(incoming, b.unsqueeze(b.transpose(Ch, 0, 1, 3, 2), 2), bounds.u)
    u = b.call(b.shift(u, node.integer("u_shift")), f"{node.name}.u")
    A_in = b.op("Squeeze", b.slice(A, 0, 1), b.sizes(4))
    A_u = b.call(b.shift(A_in, fA - node.integer("A_u_bits")), f"{node.name}.A_u")
    carried = b.mul(b.unsqueeze(A_u, 4), b.transpose(u, 0, 1, 2, 4, 3))
    return b.scale(carried, node.integer("u_align"))


# -- one step at a time -----------------------------------------------------------------------------------


def state_types(b: Builder, node: Node) -> dict[str, int]:
    """What of the memory is held in floats, those of the products that read it at every step."""
    bounds = _Bounds.of(b, node)
    return {"x": b.real(bounds.y), "H": b.real(bounds.u)}


def ssd_step(
    b: Builder, node: Node, inputs: Sequence[str], memory: Mapping[str, str], clock: Clock
) -> tuple[str, dict[str, str]]:
    """One step of the scan.

    What the chunk has not reached yet is zero, so a step enters its place of the open chunk by an addition.

    Args:
        b: receives the nodes. node: the scan.
        inputs: as :func:`ssd`, of one step.
        memory: A [batch, H, Q + 1], x [batch, H, Q, P], B_hat and possibly B_next [batch, Q, N] and
            H [batch, H, P, N].
        clock: tells the step's place in its chunk.

    Returns:
        y [batch, 1, H P], and what of the memory changes.
    """
    types = [b.graph.types[name] for name in node.inputs]
    bounds, held = _Bounds.of(b, node), state_types(b, node)
    heads, P, state = types[3].shape[-1], node.integer("headdim"), types[1].shape[-1]
    Q = node.integer("chunk_size")
    X, n = b.reshape(inputs[0], 0, heads, 1, P), b.reshape(inputs[3], 0, heads, 1)
    C = b.reshape(inputs[2], 0, state, 1)
    place, row = clock.place(Q), clock.row(Q)

    A = b.add(_decay(b, node, memory["A"], n), b.mul(row, _entering(b, node, n)))
    A = b.call(A, f"{node.name}.A")
    kind = held["x"]
    entering = b.mul(b.unsqueeze(b.cast(place, kind), 1), b.cast(X, kind))
    x = b.typed(b.add(b.typed(memory["x"], kind), entering), kind)
    B = b.add(memory["B_hat"], b.mul(place, inputs[1]))
    G = _G(b, node, b.reshape(b.matmul(B, C, bounds.G), 0, 1, Q))
    b.call(b.reshape(G, 0, Q), f"{node.name}.G")
    M = b.call(b.shift(b.mul(b.slice(A, 1, Q + 1), G), node.integer("M_shift")), f"{node.name}.M")
    y = b.reshape(_inside(b, node, b.unsqueeze(M, 2), x, X, bounds.y), 0, heads, P)
    changed = {"A": A, "x": x, "B_hat": B}
    if "H" in memory:
        same = node.inputs[4] == node.inputs[1]
        changed["B_next"] = B if same else b.add(memory["B_next"], b.mul(place, inputs[4]))
        u = b.matmul(b.typed(memory["H"], held["H"]), b.unsqueeze(C, 1), bounds.u)
        u = b.shift(b.reshape(u, 0, heads, P), node.integer("u_shift"))
        u = b.call(u, f"{node.name}.u")
        A_u = b.shift(b.slice(A, 0, 1), node.integer("A_bits") - node.integer("A_u_bits"), 0)
        b.call(b.op("Squeeze", A_u, b.sizes(2)), f"{node.name}.A_u")
        y = b.add(y, b.scale(b.mul(A_u, u), node.integer("u_align")))
    return b.reshape(y, 0, 1, heads * P), changed


def ssd_chunk_end(b: Builder, node: Node, memory: Mapping[str, str]) -> str:
    """H' [batch, H, P, N] after a full chunk, from the memory of :func:`ssd_step` and in its type."""
    held = state_types(b, node)
    last, Bn = b.unsqueeze(memory["A"], 2), b.unsqueeze(memory["B_next"], 1)
    kappa, sigma, inflow = _boundary(b, node, last, b.typed(memory["x"], held["x"]), Bn, 4)
    H = b.own(b.typed(memory["H"], held["H"]))
    return b.cast(_next_H(b, node, H, kappa, sigma, inflow), held["H"])
