"""``ssd`` as ONNX nodes: the offsets inside a chunk and the chunks of the state are unrolled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from circuits.runtime.builder import Builder
from mamba_int.graph import Node


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


def ssd(b: Builder, node: Node, inputs: Sequence[str]) -> str:
    """The chunked scan; letters and layouts as in ``mamba_int/operations/ssd.py``.

    Args:
        b: receives the nodes. node: the scan.
        inputs: x [batch, T, H P], B^ and C^ [batch, T, N], n [batch, T, H] and possibly B' [batch, T, N].
    """
    types = [b.graph.types[name] for name in node.inputs]
    length, state = types[1].shape
    heads, P = types[3].shape[-1], node.integer("headdim")
    chunks = _Chunks(length, min(node.integer("chunk_size"), length))
    Q = chunks.size

    # [batch, chunks, heads, Q, P]
    X = b.transpose(chunks.split(b, inputs[0], heads, P), 0, 1, 3, 2, 4)
    Bh, Ch = (chunks.split(b, name, state) for name in inputs[1:3])
    n = b.transpose(chunks.split(b, inputs[3], heads), 0, 1, 3, 2)

    A = b.call(_decay_products(b, node, n, Q), f"{node.name}.A")
    limit = node.integer("G_limit")
    G = b.op("MatMul", Ch, b.transpose(Bh, 0, 1, 3, 2))
    G = b.clip(b.shift(G, node.integer("G_shift")), -limit, limit)
    G = b.call(b.mul(G, b.constant(np.tri(Q, dtype=np.int64))), f"{node.name}.G")
    AG = b.mul(b.slice(A, 1, Q + 1), b.unsqueeze(G, 2))
    M = b.call(b.shift(AG, node.integer("M_shift")), f"{node.name}.M")

    D = np.asarray(node.constants["D"])[:, None, None] << node.integer("D_align")
    y = b.scale(b.op("MatMul", M, X), node.integer("M_align"))
    y = b.add(y, b.mul(X, b.constant(D)))
    if chunks.count > 1:
        y = b.add(y, _carry(b, node, A, X, Ch, chunks.split(b, inputs[4], state), chunks))
    y = b.reshape(b.transpose(y, 0, 1, 3, 2, 4), 0, chunks.count * Q, heads * P)
    return b.slice(y, 0, length, axis=1) if chunks.count * Q > length else y


def _decay_products(b: Builder, node: Node, n: str, Q: int) -> str:
    """A [batch, chunks, heads, Q, Q + 1] from the decays n [batch, chunks, heads, Q]."""
    k, fA = node.integer("decay_bits"), node.integer("A_bits")
    gate = b.scale(b.sub(b.constant(1 << k), n), fA - k)
    row = b.constant([1 << fA])
    rows = []
    for t in range(Q):
        decayed = b.shift(b.mul(row, b.slice(n, t, t + 1)), k)
        row = b.concat([decayed, b.slice(gate, t, t + 1)], -1)
        rows.append(b.unsqueeze(b.pad(row, 4, -1, 0, Q - 1 - t), 3))
    return b.concat(rows, 3)


def _carry(b: Builder, node: Node, A: str, X: str, Ch: str, Bn: str, chunks: _Chunks) -> str:
    """What earlier chunks contribute to y, [batch, chunks, heads, Q, P]."""
    fA, fR, Q = node.integer("A_bits"), node.integer("rotation_frac"), chunks.size
    half = len(node.constants["cos_Q"])
    last = b.slice(A, Q - 1, Q, axis=3)
    weights = b.transpose(b.slice(last, 1, Q + 1), 0, 1, 2, 4, 3)
    beta = b.shift(b.mul(weights, b.unsqueeze(Bn, 2)), node.integer("beta_shift"))
    beta = b.call(beta, f"{node.name}.beta")
    inflow = b.scale(b.op("MatMul", b.transpose(X, 0, 1, 2, 4, 3), beta), node.integer("H_align"))
    across = b.op("Squeeze", b.slice(last, 0, 1), b.sizes(3))
    kappa, sigma = (
        b.call(b.shift(b.mul(across, b.constant(node.constants[key])), fR), f"{node.name}.{name}")
        for key, name in (("cos_Q", "kappa"), ("sin_Q", "sigma"))
    )
    # The state before the first chunk is zero.
    H = b.shift(b.slice(inflow, 0, 1, axis=1), fA)
    states = [H]
    for i in range(1, chunks.count - 1):
        H1, H2 = b.slice(H, 0, half), b.slice(H, half, 2 * half)
        kap, sig = (b.unsqueeze(b.slice(name, i, i + 1, axis=1), 3) for name in (kappa, sigma))
        first = b.sub(b.mul(kap, H1), b.mul(sig, H2))
        second = b.add(b.mul(sig, H1), b.mul(kap, H2))
        turned = b.concat([first, second], -1)
        H = b.shift(b.add(turned, b.slice(inflow, i, i + 1, axis=1)), fA)
        states.append(H)
    states_named = b.call(b.concat(states, 1), f"{node.name}.H")
    incoming = b.pad(states_named, 5, 1, 1, 0)
    u = b.op("MatMul", incoming, b.unsqueeze(b.transpose(Ch, 0, 1, 3, 2), 2))
    u = b.call(b.shift(u, node.integer("u_shift")), f"{node.name}.u")
    A_in = b.op("Squeeze", b.slice(A, 0, 1), b.sizes(4))
    A_u = b.call(b.shift(A_in, fA - node.integer("A_u_bits")), f"{node.name}.A_u")
    carried = b.mul(b.unsqueeze(A_u, 4), b.transpose(u, 0, 1, 2, 4, 3))
    return b.scale(carried, node.integer("u_align"))
