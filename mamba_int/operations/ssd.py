"""``ssd``: the chunked integer selective scan, its specification and its relational range rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, sqrt
from typing import TYPE_CHECKING, Any

import numpy as np

from mamba_int.graph import IntArray, Node, TensorType
from mamba_int.operations.base import Operation, Record, check, rounding_shift, shift_peak, shifted

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class SsdBounds:
    """Proven magnitudes of everything inside the scan; ``pre`` means before the shift that follows.

    The incoming-state terms are zero for a scan of one chunk.
    """

    row_sum: int
    G_pre: int
    G: int
    M_pre: int
    M: int
    Mx: int
    beta: int
    H_pre: int
    H: int
    u_pre: int
    u: int
    A_u_times_u: int
    Dx: int

    @property
    def y(self) -> int:
        """Magnitude of the accumulator."""
        return self.Mx + self.A_u_times_u + self.Dx


def ssd_bounds(
    s: Mapping[str, Any],
    x: TensorType,
    B_hat: TensorType,
    C_hat: TensorType,
    B_next: TensorType | None,
    D: int,
    rotation_norm: float,
) -> SsdBounds:
    """Bounds of the scan from the bounds of its inputs.

    The input gate makes every row of A sum to at most 2^fA plus its roundings (convexity): A[t, t] starts
    at 2^k - n_t, so sum_s A[t, s] <= max(sum_s A[t-1, s], 2^fA) + (t + 1)/2. Pairs of the state turn by
    (kappa, sigma), whose norm is at most alpha r + sqrt(1/2), so their norm has a fixpoint.

    Args:
        s: the node's attributes. x, B_hat, C_hat, B_next: types of the inputs.
        D: largest |D|. rotation_norm: largest |(cos Q w, sin Q w)| as a real number.
    """
    Q, k, fA = int(s["chunk_size"]), int(s["decay_bits"]), int(s["A_bits"])
    one = 1 << fA
    row_sum = one + ceil(sum(t + 1 for t in range(1, Q)) / 2)
    state = B_hat.shape[-1]
    X = x.magnitude
    pair_B, pair_C = B_hat.pair_bound, C_hat.pair_bound
    G_pre = min(state * B_hat.magnitude * C_hat.magnitude, state // 2 * pair_B * pair_C)
    G = min(shifted(G_pre, int(s["G_shift"])), int(s["G_limit"]))
    m = int(s["M_shift"])
    M_pre, M = one * G, shifted(one * G, m)
    Mx = (ceil(row_sum * G / 2**m + Q / 2) * X) << int(s["M_align"])
    Dx = D * X << int(s["D_align"])
    if B_next is None:
        return SsdBounds(row_sum, G_pre, G, M_pre, M, Mx, 0, 0, 0, 0, 0, 0, Dx)

    alpha = one
    for _ in range(Q):
        alpha = shifted(alpha * ((1 << k) - 1), k)
    mb, c = int(s["beta_shift"]), int(s["H_align"])
    beta = shifted(one * B_next.magnitude, mb)
    H = 0
    H_pre = 0
    for a in (0, alpha):
        inflow = X * ((row_sum - a) * B_next.pair_bound / 2**mb + Q * sqrt(0.5)) * 2**c
        turn = a * rotation_norm + sqrt(0.5)
        check(turn < one, "the rotation amplifies: its constants exceed the unit circle")
        H = max(H, ceil((inflow / one + sqrt(0.5)) / (1 - turn / one) + 1e-6))
    for a in (0, alpha):
        element = X * ((row_sum - a) * B_next.magnitude / 2**mb + Q / 2) * 2**c
        H_pre = max(H_pre, ceil((a * rotation_norm + sqrt(0.5)) * H + element))
    u_pre = state // 2 * H * pair_C
    u = shifted(u_pre, int(s["u_shift"]))
    A_u = shifted(one, fA - int(s["A_u_bits"]))
    return SsdBounds(
        row_sum, G_pre, G, M_pre, M, Mx, beta, H_pre, H, u_pre, u, A_u * u << int(s["u_align"]), Dx
    )


def node_bounds(node: Node, inputs: Sequence[TensorType]) -> SsdBounds:
    """:func:`ssd_bounds` of an ``ssd`` node with its own constants, for inputs of these types."""
    x, B_hat, C_hat = inputs[:3]
    B_next, rotation_norm = None, 0.0
    if len(inputs) == 5:
        B_next = inputs[4]
        cos, sin = node.constants["cos_Q"], node.constants["sin_Q"]
        check(cos.shape == sin.shape == (B_hat.shape[-1] // 2,), "cos_Q, sin_Q do not fit")
        rotation_norm = float(np.sqrt((cos**2 + sin**2).max())) / (1 << node.integer("rotation_frac"))
    D = int(np.abs(node.constants["D"]).max())
    return ssd_bounds(node.attributes, x, B_hat, C_hat, B_next, D, rotation_norm)


class Ssd(Operation):
    """Per head, with in-chunk offsets t, s = 0..Q-1, -1 the incoming state, and e = fA - k::

        A[-1,-1] = 2^fA    A[t,t] = (2^k - n_t) << e    A[t,s] = shift(A[t-1,s] n_t, k)   for -1 <= s < t
        G[t,s] = sat(shift(C^_t . B^_s, g))             M[t,s] = shift(A[t,s] G[t,s], m)
        y_t = (sum_s M[t,s] x_s) << a  +  (A_u[t] u_t) << a'  +  (D x_t) << b
              with u_t = shift(H . C^_t, h), A_u[t] = shift(A[t,-1], fA - fAu)
        H'  = shift((kappa, sigma) on the pairs of H + (sum_s x_s beta_s) << c, fA)   at the end of a chunk
              with beta_s = shift(A[Q-1,s] B'_s, m'), (kappa, sigma) = shift(A[Q-1,-1] (cos Qw, sin Qw), fR)

    Meaning: h_t = a_t R(w) h_{t-1} + (1 - a_t) x_t B_t^T, y = C h + D x, in the SSD form of Mamba-2
    (arXiv 2405.21060). Inputs: x [T, H P], B^ and C^ [T, N] rotated into the chunk's frame, n [T, H] and,
    unless T <= Q always, B' [T, N] rotated into the next chunk's frame. Constants: ``D`` [H] and, with B',
    ``cos_Q``, ``sin_Q`` [N/2]. Result: y before its shift, [T, H P].
    """

    name = "ssd"

    def infer(self, node: Node, inputs: Sequence[TensorType], seq_len: int) -> TensorType:
        x, B_hat, C_hat, n = inputs[:4]
        B_next = inputs[4] if len(inputs) == 5 else None
        a = node.attributes
        k, P = node.integer("decay_bits"), node.integer("headdim")
        heads = n.shape[-1]
        check(all(int(a[key]) >= 0 for key in a), "negative attribute")
        check(1 <= node.integer("chunk_size") <= 1 << 12, "chunk_size is not inside 1..4096")
        shifts = a.keys() - {"chunk_size", "headdim", "G_limit"}
        check(all(int(a[key]) <= 48 for key in shifts), "a shift or width exceeds 48 bits")
        check(x.shape[-1] == heads * P, "x does not fit heads * headdim")
        check(C_hat.shape == B_hat.shape and (B_next is None or B_next.shape == B_hat.shape), "B, C differ")
        check(n.low >= 0 and n.high < 1 << k, "decays are not inside 0..2^k - 1")
        check(node.integer("A_bits") >= max(k, node.integer("A_u_bits")), "A_bits is too small")
        check(node.constants["D"].shape == (heads,), "D does not fit the heads")
        if B_next is None and seq_len > node.integer("chunk_size"):
            raise ValueError("more than one chunk, but no B'")
        b = node_bounds(node, inputs)
        fA = node.integer("A_bits")
        peak = max(
            shift_peak((1 << fA) * ((1 << k) - 1), k),
            shift_peak(b.G_pre, node.integer("G_shift")),
            shift_peak(b.M_pre, node.integer("M_shift")),
            shift_peak((1 << fA) * (B_next.magnitude if B_next else 0), node.integer("beta_shift")),
            shift_peak(b.H_pre, fA),
            shift_peak(b.u_pre, node.integer("u_shift")),
            b.y,
        )
        return TensorType(x.shape, -b.y, b.y, peak)

    def evaluate(self, node: Node, inputs: Sequence[IntArray], record: Record) -> IntArray:
        x, B_hat, C_hat, n = inputs[:4]
        k, fA, P = (node.integer(name) for name in ("decay_bits", "A_bits", "headdim"))
        batch, length, channels = x.shape
        heads = n.shape[-1]
        Q = min(node.integer("chunk_size"), length)
        chunks = -(-length // Q)

        def chunked(v: IntArray) -> IntArray:
            padded = np.pad(v, ((0, 0), (0, chunks * Q - length), (0, 0)))
            return padded.reshape(batch, chunks, Q, v.shape[-1])

        X = chunked(x).reshape(batch, chunks, Q, heads, P)
        Bh, Ch, N = chunked(B_hat), chunked(C_hat), chunked(n)
        A = np.zeros((batch, chunks, heads, Q, Q + 1), np.int64)
        row = np.full((batch, chunks, heads, 1), 1 << fA, np.int64)
        for t in range(Q):
            n_t = N[:, :, t, :, None]
            row = np.concatenate([rounding_shift(row * n_t, k), ((1 << k) - n_t) << (fA - k)], -1)
            A[..., t, : t + 2] = row
        limit = node.integer("G_limit")
        G = rounding_shift(np.einsum("bctn,bcsn->bcts", Ch, Bh), node.integer("G_shift"))
        G = np.clip(G, -limit, limit) * np.tri(Q, dtype=np.int64)
        M = rounding_shift(A[..., 1:] * G[:, :, None], node.integer("M_shift"))
        record("A", A)
        record("G", G)
        record("M", M)
        D = node.constants["D"]
        y = np.einsum("bchts,bcshp->bcthp", M, X) << node.integer("M_align")
        y = y + (X * D[:, None] << node.integer("D_align"))
        if chunks > 1:
            y = y + self._carry(node, A, X, Ch, chunked(inputs[4]), record)
        whole: IntArray = y.reshape(batch, chunks * Q, channels)
        return whole[:, :length]

    @staticmethod
    def _carry(node: Node, A: IntArray, X: IntArray, Ch: IntArray, Bn: IntArray, record: Record) -> IntArray:
        """What earlier chunks contribute to y, [batch, chunks, Q, heads, P]."""
        fA, fR = node.integer("A_bits"), node.integer("rotation_frac")
        batch, chunks, _, heads, P = X.shape
        half = Bn.shape[-1] // 2
        beta = rounding_shift(A[..., -1, 1:, None] * Bn[:, :, None], node.integer("beta_shift"))
        inflow = np.einsum("bcshp,bchsn->bchpn", X, beta) << node.integer("H_align")
        across = A[..., -1, :1]
        kappa = rounding_shift(across * node.constants["cos_Q"], fR)[:, :, :, None]
        sigma = rounding_shift(across * node.constants["sin_Q"], fR)[:, :, :, None]
        H = np.zeros((batch, chunks, heads, P, 2 * half), np.int64)
        for i in range(chunks - 1):
            H1, H2, kap, sig = H[:, i, ..., :half], H[:, i, ..., half:], kappa[:, i], sigma[:, i]
            turned = np.concatenate([kap * H1 - sig * H2, sig * H1 + kap * H2], -1)
            H[:, i + 1] = rounding_shift(turned + inflow[:, i], fA)
        u = rounding_shift(np.einsum("bchpn,bctn->bchpt", H, Ch), node.integer("u_shift"))
        A_u = rounding_shift(A[..., 0], fA - node.integer("A_u_bits"))
        for name, value in (
            ("beta", beta),
            ("kappa", kappa[:, :, :, 0]),
            ("sigma", sigma[:, :, :, 0]),
            ("H", H[:, 1:]),
            ("u", u),
            ("A_u", A_u),
        ):
            record(name, value)
        carried: IntArray = np.einsum("bcht,bchpt->bcthp", A_u, u) << node.integer("u_align")
        return carried

    def execute(self, node: Node, inputs: Sequence[Tensor], record: Record, rounding: bool) -> Tensor:
        from triton_kernels.ssd import SsdScales, ssd

        x, B_hat, C_hat, n = inputs[:4]
        y, internals = ssd(
            x,
            B_hat,
            C_hat,
            n,
            node.constants["D"],
            SsdScales.from_attributes(node.attributes),
            inputs[4] if len(inputs) == 5 else None,
            node.constants.get("cos_Q"),
            node.constants.get("sin_Q"),
            rounding,
        )
        for name, value in internals.items():
            record(name, value)
        return y
