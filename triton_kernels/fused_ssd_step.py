"""One step of the integer scan in one kernel, a program a head of a sequence, for decoding on a GPU."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_kernels.rounding import half_unit, rounded
from triton_kernels.ssd import SsdScales


@triton.jit
def _step_kernel(
    x, B_hat, C_hat, decay, D, offset, B_next, A_memory, x_memory, B_memory, N_memory, H_memory, y,
    heads, one_k, k_factor, e_factor, g_factor, g_half, G_limit, m_factor, m_half, M_scale, D_scale,
    u_factor, u_half, A_u_factor, A_u_half, u_scale,
    Q: tl.constexpr, P: tl.constexpr, N: tl.constexpr, STATE: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    b, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    q, p, n = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    t = tl.load(offset + b)
    n_t = tl.load(decay + b * heads + h)
    # The row A[t, .] of the open chunk: column 0 is the incoming state's.
    A_at = A_memory + (b * heads + h) * (Q + 1)
    across = rounded(tl.load(A_at) * n_t, k_factor, 0.5)
    row = rounded(tl.load(A_at + 1 + q, mask=q < Q, other=0.0) * n_t, k_factor, 0.5)
    row = tl.where(q == t, (one_k - n_t) * e_factor, row)
    # All threads have read A before one of them writes.
    tl.debug_barrier()
    tl.store(A_at, across)
    tl.store(A_at + 1 + q, row, mask=q < Q)
    # Every head computes with this step's B and x; the first one, and every one of its own, store them.
    held, square = (q < Q)[:, None] & (n < N)[None, :], q[:, None] * N + n[None, :]
    C = tl.load(C_hat + b * N + n, mask=n < N, other=0.0)
    B = tl.load(B_hat + b * N + n, mask=n < N, other=0.0)
    earlier = tl.load(B_memory + b * Q * N + square, mask=held & (q != t)[:, None], other=0.0)
    G = tl.sum(tl.where((q == t)[:, None], B[None, :], earlier) * C[None, :], 1)
    G = rounded(G, g_factor, g_half)
    G = tl.minimum(tl.maximum(G, -G_limit), G_limit)
    M = rounded(row * G, m_factor, m_half)
    first = (n < N) & (n * 0 + h == 0)
    tl.store(B_memory + b * Q * N + t * N + n, B, mask=first)
    X = tl.load(x + (b * heads + h) * P + p, mask=p < P, other=0.0)
    x_at = x_memory + (b * heads + h) * Q * P
    before = ((q < Q) & (q != t))[:, None] & (p < P)[None, :]
    past = tl.load(x_at + q[:, None] * P + p[None, :], mask=before, other=0.0)
    total = tl.sum(tl.where((q == t)[:, None], X[None, :], past) * M[:, None], 0) * M_scale
    tl.store(x_at + t * P + p, X, mask=p < P)
    total += X * tl.load(D + h) * D_scale
    if STATE:
        following = tl.load(B_next + b * N + n, mask=n < N, other=0.0)
        tl.store(N_memory + b * Q * N + t * N + n, following, mask=first)
        H_at = H_memory + (b * heads + h) * P * N
        H = tl.load(H_at + p[:, None] * N + n[None, :], mask=(p < P)[:, None] & (n < N)[None, :], other=0.0)
        u = rounded(tl.sum(H * C[None, :], 1), u_factor, u_half)
        total += rounded(across, A_u_factor, A_u_half) * u * u_scale
    tl.store(y + (b * heads + h) * P + p, total, mask=p < P)


def fused_ssd_step(
    x: Tensor,
    B_hat: Tensor,
    C_hat: Tensor,
    decay: Tensor,
    D: Tensor,
    scales: SsdScales,
    memory: Mapping[str, Tensor],
    offset: Tensor,
    B_next: Tensor | None = None,
) -> Tensor:
    """``triton_kernels.ssd_step.ssd_step`` without its intermediates; float32, whose sums stay within 2^24.

    Args:
        x, B_hat, C_hat, decay, D, scales, memory, offset, B_next: as there. Memory is changed in place.

    Returns:
        The accumulator [batch, H*P].
    """
    s = scales
    (batch, heads), N = decay.shape, B_hat.shape[-1]
    x, B_hat, C_hat, decay = x.contiguous(), B_hat.contiguous(), C_hat.contiguous(), decay.contiguous()
    B_next = B_next.contiguous() if B_next is not None else None
    narrowing, k = s.A_bits - s.A_u_bits, s.decay_bits
    y = torch.empty_like(x)
    _step_kernel[(batch, heads)](
        x, B_hat, C_hat, decay, D, offset, B_next, memory["A"], memory["x"], memory["B_hat"],
        memory.get("B_next"), memory.get("H"), y, heads,
        2.0**k, 2.0**-k, 2.0 ** (s.A_bits - k), 2.0**-s.G_shift, half_unit(s.G_shift), float(s.G_limit),
        2.0**-s.M_shift, half_unit(s.M_shift), 2.0**s.M_align, 2.0**s.D_align,
        2.0**-s.u_shift, half_unit(s.u_shift),
        2.0**-narrowing, half_unit(narrowing), 2.0**s.u_align,
        Q=s.chunk_size, P=s.headdim, N=N, STATE="H" in memory,
        BLOCK_Q=triton.next_power_of_2(s.chunk_size), BLOCK_P=triton.next_power_of_2(s.headdim),
        BLOCK_N=triton.next_power_of_2(N),
    )  # fmt: skip
    return y
