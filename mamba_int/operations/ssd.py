"""``ssd``: the chunked integer selective scan, its specification and its relational range rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, sqrt
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mamba_int.graph import IntArray, Node, TensorType
from mamba_int.operations.base import (
    Memory,
    Operation,
    Record,
    check,
    nobody,
    rounding_shift,
    shift_peak,
    shifted,
)

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
        fA, P = node.integer("A_bits"), node.integer("headdim")
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
            row = np.concatenate(self._decay(node, row, N[:, :, t, :, None]), -1)
            A[..., t, : t + 2] = row
        G = self._G(node, np.einsum("bctn,bcsn->bcts", Ch, Bh)) * np.tri(Q, dtype=np.int64)
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
    def _decay(node: Node, row: IntArray, n: IntArray) -> tuple[IntArray, IntArray]:
        """The entries of A[t-1, .] decayed by n_t, and the one that enters, A[t, t]."""
        k = node.integer("decay_bits")
        return rounding_shift(row * n, k), ((1 << k) - n) << (node.integer("A_bits") - k)

    @staticmethod
    def _G(node: Node, products: IntArray) -> IntArray:
        limit = node.integer("G_limit")
        return np.clip(rounding_shift(products, node.integer("G_shift")), -limit, limit)

    @staticmethod
    def _u(node: Node, reads: IntArray) -> IntArray:
        return rounding_shift(reads, node.integer("u_shift"))

    @staticmethod
    def _A_u(node: Node, across: IntArray) -> IntArray:
        return rounding_shift(across, node.integer("A_bits") - node.integer("A_u_bits"))

    @staticmethod
    def _boundary(
        node: Node, last: IntArray, X: IntArray, B_next: IntArray
    ) -> tuple[IntArray, IntArray, IntArray, IntArray]:
        """What a chunk hands on, from A[Q-1, .] [..., H, Q + 1], x [..., H, Q, P] and B' [..., Q, N].

        Returns:
            beta [..., H, Q, N], kappa and sigma [..., H, N/2], (sum_s x_s beta_s) << c [..., H, P, N].
        """
        beta = rounding_shift(last[..., 1:, None] * B_next[..., None, :, :], node.integer("beta_shift"))
        inflow = np.einsum("...sp,...sn->...pn", X, beta) << node.integer("H_align")
        kappa, sigma = (
            rounding_shift(last[..., :1] * node.constants[name], node.integer("rotation_frac"))
            for name in ("cos_Q", "sin_Q")
        )
        return beta, kappa, sigma, inflow

    @staticmethod
    def _next_H(node: Node, H: IntArray, kappa: IntArray, sigma: IntArray, inflow: IntArray) -> IntArray:
        """H' [..., P, N]."""
        half = kappa.shape[-1]
        H1, H2, kap, sig = H[..., :half], H[..., half:], kappa[..., None, :], sigma[..., None, :]
        turned = np.concatenate([kap * H1 - sig * H2, sig * H1 + kap * H2], -1)
        return rounding_shift(turned + inflow, node.integer("A_bits"))

    def _carry(
        self, node: Node, A: IntArray, X: IntArray, Ch: IntArray, Bn: IntArray, record: Record
    ) -> IntArray:
        """What earlier chunks contribute to y, [batch, chunks, Q, heads, P]."""
        batch, chunks, _, heads, P = X.shape
        beta, kappa, sigma, inflow = self._boundary(node, A[..., -1, :], X.swapaxes(2, 3), Bn)
        H = np.zeros((batch, chunks, heads, P, Bn.shape[-1]), np.int64)
        for i in range(chunks - 1):
            H[:, i + 1] = self._next_H(node, H[:, i], kappa[:, i], sigma[:, i], inflow[:, i])
        u = self._u(node, np.einsum("bchpn,bctn->bchpt", H, Ch))
        A_u = self._A_u(node, A[..., 0])
        for name, value in (
            ("beta", beta),
            ("kappa", kappa),
            ("sigma", sigma),
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

    # -- one step at a time -------------------------------------------------------------------------------
    #
    # The memory is H, the row A[t, .], and of the open chunk x_s, B^_s and B'_s. What the chunk has not
    # reached yet is zero, so it adds nothing to the sums over s, and equal pasts have equal memories.

    def initial_memory(self, node: Node, inputs: Sequence[TensorType]) -> dict[str, IntArray]:
        state, heads = inputs[1].shape[-1], inputs[3].shape[-1]
        Q, P = node.integer("chunk_size"), node.integer("headdim")
        shapes = {"A": (heads, Q + 1), "x": (heads, Q, P), "B_hat": (Q, state)}
        if len(inputs) == 5:
            shapes |= {"B_next": (Q, state), "H": (heads, P, state)}
        memory = {name: np.zeros(shape, np.int64) for name, shape in shapes.items()}
        memory["A"][:, 0] = 1 << node.integer("A_bits")
        return memory

    def chunk(self, node: Node) -> int | None:
        return node.integer("chunk_size") if len(node.inputs) == 5 else None

    def longest(self, node: Node) -> int | None:
        return None if len(node.inputs) == 5 else node.integer("chunk_size")

    def evaluate_step(
        self, node: Node, inputs: Sequence[IntArray], memory: Memory, position: IntArray, record: Record
    ) -> IntArray:
        x, B_hat, C_hat, n = (operand[:, 0] for operand in inputs[:4])
        rows, t = np.arange(len(x)), position % node.integer("chunk_size")
        X = x.reshape(len(x), n.shape[-1], node.integer("headdim"))
        A, entering = self._decay(node, memory["A"], n[..., None])
        A[rows, :, t + 1] = entering[..., 0]
        memory["A"][:] = A
        memory["x"][rows, :, t] = X
        memory["B_hat"][rows, t] = B_hat
        G = self._G(node, np.einsum("bn,bsn->bs", C_hat, memory["B_hat"]))
        M = rounding_shift(A[..., 1:] * G[:, None], node.integer("M_shift"))
        record("A", A)
        record("G", G)
        record("M", M)
        y = np.einsum("bhs,bhsp->bhp", M, memory["x"]) << node.integer("M_align")
        y = y + (X * node.constants["D"][:, None] << node.integer("D_align"))
        if "H" in memory:
            memory["B_next"][rows, t] = inputs[4][:, 0]
            u = self._u(node, np.einsum("bhpn,bn->bhp", memory["H"], C_hat))
            A_u = self._A_u(node, A[..., 0])
            record("u", u)
            record("A_u", A_u)
            y = y + (A_u[..., None] * u << node.integer("u_align"))
        result: IntArray = y.reshape(len(x), 1, -1)
        return result

    def evaluate_chunk_end(
        self, node: Node, memory: Memory, ended: NDArray[np.bool_], record: Record
    ) -> None:
        beta, kappa, sigma, inflow = self._boundary(node, memory["A"], memory["x"], memory["B_next"])
        H = self._next_H(node, memory["H"], kappa, sigma, inflow)
        for name, value in (("beta", beta), ("kappa", kappa), ("sigma", sigma), ("H", H)):
            record(name, value)
        memory["H"][ended] = H[ended]
        for name in ("A", "x", "B_hat", "B_next"):
            memory[name][ended] = 0
        memory["A"][ended, :, 0] = 1 << node.integer("A_bits")

    def execute_step(
        self, node: Node, inputs: Sequence[Tensor], memory: Memory, position: Tensor, record: Record
    ) -> Tensor:
        import torch

        from triton_kernels.ssd import SsdScales
        from triton_kernels.ssd_step import ssd_step

        x, B_hat, C_hat, n = (operand[:, 0] for operand in inputs[:4])
        operands = (
            x,
            B_hat,
            C_hat,
            n,
            node.constants["D"],
            SsdScales.from_attributes(node.attributes),
            memory,
            position % node.integer("chunk_size"),
            inputs[4][:, 0] if "H" in memory else None,
        )
        if x.is_cuda and x.dtype == torch.float32 and record is nobody:
            from triton_kernels.fused_ssd_step import fused_ssd_step

            return fused_ssd_step(*operands)[:, None]
        y, internals = ssd_step(*operands)
        for name, value in internals.items():
            record(name, value)
        return y[:, None]

    def execute_chunk_end(self, node: Node, memory: Memory, ended: Tensor, record: Record) -> None:
        from triton_kernels.ssd import SsdScales
        from triton_kernels.ssd_step import end_chunk

        scales = SsdScales.from_attributes(node.attributes)
        internals = end_chunk(memory, ended, scales, node.constants["cos_Q"], node.constants["sin_Q"])
        for name, value in internals.items():
            record(name, value)

    def memorize(
        self,
        node: Node,
        inputs: Sequence[Any],
        internals: Mapping[str, Any],
        source: Any,
        length: int,
        memory: Memory,
        rows: Any,
    ) -> None:
        # The last chunk stays open, full or not: what follows a full one is for evaluate_chunk_end to say.
        chunks, t = divmod(length - 1, node.integer("chunk_size"))
        kept, used = slice(length - 1 - t, length), t + 1
        heads, P = inputs[3].shape[-1], node.integer("headdim")
        memory["A"][rows, :, : used + 1] = internals["A"][:, chunks, :, t, : used + 1][source]
        X = inputs[0][:, kept][source].reshape(-1, used, heads, P)
        memory["x"][rows, :, :used] = X.swapaxes(1, 2)
        memory["B_hat"][rows, :used] = inputs[1][:, kept][source]
        if "H" in memory:
            memory["B_next"][rows, :used] = inputs[4][:, kept][source]
            if chunks:
                memory["H"][rows] = internals["H"][:, chunks - 1][source]
