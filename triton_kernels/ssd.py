"""The chunked integer selective scan (SSD form) with straight-through gradients.

Integer version of the state-space duality scan (Dao & Gu 2024, arXiv 2405.21060, section 6) whose roundings
are part of the model; see ``mamba_int/operations/ssd.py`` for the specification.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from triton_kernels.clamp import saturate
from triton_kernels.shift import shift


@dataclass(frozen=True)
class SsdScales:
    """Static shifts of the scan; letters as in the specification.

    Attributes:
        chunk_size: Q. headdim: P.
        decay_bits: k; decays are n / 2^k. A_bits: fA, binary places of the decay products.
        G_shift: g. G_limit: G saturates there. M_shift: m.
        A_u_bits: binary places of A where it meets u. u_shift: h.
        beta_shift: m'. H_align: c. rotation_frac: fR.
        M_align, u_align, D_align: left shifts a, a', b that bring the three sums to one scale.
    """

    chunk_size: int
    headdim: int
    decay_bits: int
    A_bits: int
    G_shift: int
    G_limit: int
    M_shift: int
    A_u_bits: int
    u_shift: int
    beta_shift: int
    H_align: int
    rotation_frac: int
    M_align: int
    u_align: int
    D_align: int

    @classmethod
    def from_attributes(cls, attributes: Mapping[str, Any]) -> Self:
        """Read the scales from a node's attributes (extra ones are ignored)."""
        return cls(**{name: int(attributes[name]) for name in cls.__dataclass_fields__})


class _DecayProducts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, n: Tensor, k: int, e: int, rounding: bool) -> Tensor:
        *lead, length = n.shape
        products = n.new_zeros(*lead, length, length + 1)
        factor = 2.0**-k
        row = n.new_full((*lead, 1), 2.0 ** (k + e))
        for t in range(length):
            decayed = row * (n[..., t, None] * factor)
            if rounding:
                decayed = torch.floor_(decayed + 0.5)
            row = torch.cat([decayed, (2.0**k - n[..., t, None]) * 2.0**e], -1)
            products[..., t, : t + 2] = row
        ctx.save_for_backward(n, products)
        ctx.k, ctx.e = k, e
        return products

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        n, products = ctx.saved_tensors
        g = gradients[0].clone()
        gn = torch.empty_like(n)
        factor = 2.0**-ctx.k
        for t in range(n.shape[-1] - 1, 0, -1):
            gt = g[..., t, : t + 1] * factor
            gn[..., t] = (gt * products[..., t - 1, : t + 1]).sum(-1) - g[..., t, t + 1] * 2.0**ctx.e
            g[..., t - 1, : t + 1] += gt * n[..., t, None]
        gn[..., 0] = (g[..., 0, 0] - g[..., 0, 1]) * 2.0**ctx.e
        return gn, None, None, None


def decay_products(n: Tensor, decay_bits: int, A_bits: int, rounding: bool = True) -> Tensor:
    """Products of decays inside a chunk, each rounded: A[t, s] = shift(A[t-1, s] * n_t, k).

    Args:
        n: decays, integers 0..2^k - 1, [..., Q].
        decay_bits: k.
        A_bits: fA; A[-1, -1] = 2^fA and A[t, t] = (2^k - n_t) << (fA - k).

    Returns:
        [..., Q, Q + 1]; column 0 is s = -1 (the incoming state), column 1 + s the token s; zero above.
        Gradient: dA[t-1,s] += dA[t,s] n_t / 2^k and dn_t += sum_s dA[t,s] A[t-1,s] / 2^k, with the rounded
        values as factors, so nothing is ever divided by a decay.
    """
    result: Tensor = _DecayProducts.apply(n, decay_bits, A_bits - decay_bits, rounding)
    return result


def boundary(
    last: Tensor,
    X: Tensor,
    B_next: Tensor,
    scales: SsdScales,
    cos_Q: Tensor,
    sin_Q: Tensor,
    rounding: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What a chunk hands on to the state.

    Args:
        last: A[Q-1, .], [..., H, Q + 1]. X: x by head, [..., H, Q, P]. B_next: [..., Q, N].
        scales: static shifts. cos_Q, sin_Q: rotation over a whole chunk [N/2].
        rounding: False for the float twin.

    Returns:
        beta [..., H, Q, N], kappa and sigma [..., H, N/2], and the aligned sum_s x_s beta_s [..., H, P, N].
    """
    beta = shift(last[..., 1:, None] * B_next[..., None, :, :], scales.beta_shift, rounding)
    inflow = X.transpose(-1, -2) @ beta * 2.0**scales.H_align
    kappa = shift(last[..., :1] * cos_Q, scales.rotation_frac, rounding)
    sigma = shift(last[..., :1] * sin_Q, scales.rotation_frac, rounding)
    return beta, kappa, sigma, inflow


def next_state(
    H: Tensor, kappa: Tensor, sigma: Tensor, inflow: Tensor, scales: SsdScales, rounding: bool = True
) -> Tensor:
    """The state after a chunk, [..., P, N], from the one before it and what :func:`boundary` returns."""
    half = kappa.shape[-1]
    H1, H2, kap, sig = H[..., :half], H[..., half:], kappa[..., None, :], sigma[..., None, :]
    turned = torch.cat([kap * H1 - sig * H2, sig * H1 + kap * H2], -1)
    return shift(turned + inflow, scales.A_bits, rounding)


def ssd(
    x: Tensor,
    B_hat: Tensor,
    C_hat: Tensor,
    decay: Tensor,
    D: Tensor,
    scales: SsdScales,
    B_next: Tensor | None = None,
    cos_Q: Tensor | None = None,
    sin_Q: Tensor | None = None,
    rounding: bool = True,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Scan a sequence in chunks of Q; all values are integers held in floats.

    Args:
        x: [batch, T, H*P]. B_hat, C_hat: rotated into the chunk's frame, [batch, T, N].
        decay: n, [batch, T, H]. D: skip weights [H].
        scales: static shifts.
        B_next: B rotated into the next chunk's frame [batch, T, N], needed if T > Q.
        cos_Q, sin_Q: rotation over a whole chunk [N/2], needed if T > Q.
        rounding: False for the float twin.

    Returns:
        The accumulator [batch, T, H*P] and the intermediates by name (A, G, M and, if T > Q, u, A_u, beta,
        kappa, sigma, H), padded to whole chunks.
    """
    q = scales
    batch, length, channels = x.shape
    state, heads = B_hat.shape[-1], decay.shape[-1]
    chunk = min(q.chunk_size, length)
    chunks = -(-length // chunk)
    pad = chunks * chunk - length

    def chunked(v: Tensor) -> Tensor:
        return (F.pad(v, (0, 0, 0, pad)) if pad else v).reshape(batch, chunks, chunk, v.shape[-1])

    X = chunked(x).reshape(batch, chunks, chunk, heads, q.headdim).transpose(2, 3)
    Bh, Ch = chunked(B_hat), chunked(C_hat)
    A = decay_products(chunked(decay).transpose(2, 3), q.decay_bits, q.A_bits, rounding)
    G = shift(Ch @ Bh.transpose(-1, -2), q.G_shift, rounding)
    if rounding:
        G = saturate(G, -q.G_limit, q.G_limit)
    causal = torch.ones(chunk, chunk, dtype=x.dtype, device=x.device).tril_()
    G = G * causal
    M = shift(A[..., 1:] * G[:, :, None], q.M_shift, rounding)
    accumulator = (M @ X) * 2.0**q.M_align + X * (D * 2.0**q.D_align)[:, None, None]
    internals = {"A": A, "G": G, "M": M}
    if chunks > 1:
        if B_next is None or cos_Q is None or sin_Q is None:
            raise ValueError(f"a sequence of {length} steps needs B_next, cos_Q and sin_Q")
        beta, kappa, sigma, inflow = boundary(A[..., -1, :], X, chunked(B_next), q, cos_Q, sin_Q, rounding)
        H = x.new_zeros(batch, heads, q.headdim, state)
        reads, states = [], []
        for i in range(chunks):
            reads.append(H @ Ch[:, i, None].transpose(-1, -2))
            if i + 1 < chunks:
                H = next_state(H, kappa[:, i], sigma[:, i], inflow[:, i], q, rounding)
                states.append(H)
        u = shift(torch.stack(reads, 1), q.u_shift, rounding)
        A_u = shift(A[..., 0], q.A_bits - q.A_u_bits, rounding)
        accumulator = accumulator + (A_u[..., None, :] * u).transpose(-1, -2) * 2.0**q.u_align
        internals |= {
            "beta": beta,
            "kappa": kappa,
            "sigma": sigma,
            "u": u,
            "A_u": A_u,
            "H": torch.stack(states, 1),
        }
    y = accumulator.transpose(2, 3).reshape(batch, chunks * chunk, channels)[:, :length]
    return y, internals
