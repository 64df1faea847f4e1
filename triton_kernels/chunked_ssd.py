"""The integer scan of ``mamba_int.operations.ssd`` as Triton kernels, with the requantization of y behind it.

Forward: one kernel multiplies out the decays of every chunk; one walks over the chunks of a head with the
state in registers. Products of integers wider than 8 bits are split into a high and a low part, each exact
in bf16, and added up exactly. Backward: one kernel walks back over the chunks with the gradient of the
state; one takes a chunk at a time, all heads in turn, so that what heads share (B, C, G) is summed in
registers and always in the same order; one walks back through the products of decays.

The straight-through gradients are those of ``triton_kernels.ssd``, the reference: rounded factors, no
division by a decay.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_kernels.narrow import dot_dtype, narrow_dtype
from triton_kernels.rounding import clamp_gradient, half_unit, rounded
from triton_kernels.ssd import SsdScales

# Split integers are 64 * high + low with low in 0..63.
SPLIT = tl.constexpr(64.0)


@triton.jit
def _dot_split(wide, narrow, DOT: tl.constexpr):
    """wide @ narrow for integers ``wide`` up to 2^14, exact."""
    high = tl.floor(wide * (1.0 / SPLIT))
    low = wide - high * SPLIT
    return tl.dot(high.to(DOT), narrow) * SPLIT + tl.dot(low.to(DOT), narrow)


@triton.jit
def _decay_kernel(
    n, A, across, T, H, chunks, stride_b, stride_t, one_k, factor, e_factor, one_A,
    Q: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """A[t, s] and A[t, -1] of one chunk, for a block of heads."""
    b, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    s = tl.arange(0, BLOCK_Q)
    row = tl.zeros((BLOCK_H, BLOCK_Q), tl.float32)
    state = tl.zeros((BLOCK_H,), tl.float32) + one_A
    to = (tl.program_id(0).to(tl.int64) * H + h) * Q
    for t in range(Q):
        # A vector of one step, so that masks are made of vectors alone.
        time = chunk * Q + t + tl.zeros_like(h)
        present = (h < H) & (time < T)
        n_t = tl.load(n + b.to(tl.int64) * stride_b + time * stride_t + h, mask=present, other=0.0)
        n_t = n_t.to(tl.float32)
        row = rounded(row * n_t[:, None], factor, 0.5)
        row = tl.where((s == t)[None, :], ((one_k - n_t) * e_factor)[:, None], row)
        state = rounded(state * n_t, factor, 0.5)
        inside = (h < H)[:, None] & (s < Q)[None, :]
        tl.store(A + (to + t)[:, None] * Q + s[None, :], row.to(tl.int16), mask=inside)
        tl.store(across + to + t, state.to(tl.int16), mask=h < H)


@triton.jit
def _decay_gradient_kernel(
    n, A, across, d_A, d_across, d_n, T, H, chunks, stride_b, stride_t, factor, e_factor, one_A,
    Q: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    b, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    s = tl.arange(0, BLOCK_Q)
    carried = tl.zeros((BLOCK_H, BLOCK_Q), tl.float32)
    carried_state = tl.zeros((BLOCK_H,), tl.float32)
    base = (tl.program_id(0).to(tl.int64) * H + h) * Q
    for back in range(Q):
        t = Q - 1 - back
        time = chunk * Q + t + tl.zeros_like(h)
        present = (h < H) & (time < T)
        n_t = tl.load(n + b.to(tl.int64) * stride_b + time * stride_t + h, mask=present, other=0.0)
        n_t = n_t.to(tl.float32)
        inside = (h < H)[:, None] & (s <= t)[None, :]
        g = (
            tl.load(d_A + (base + t)[:, None] * Q + s[None, :], mask=inside, other=0.0).to(tl.float32)
            + carried
        )
        g_state = tl.load(d_across + base + t, mask=h < H, other=0.0) + carried_state
        earlier = (h < H)[:, None] & (s < t)[None, :]
        previous = tl.load(A + (base + t - 1)[:, None] * Q + s[None, :], mask=earlier, other=0).to(tl.float32)
        state = tl.load(across + base + t - 1, mask=(h < H) & (tl.zeros_like(h) + t > 0), other=0).to(
            tl.float32
        )
        state = tl.where(tl.zeros_like(h) + t > 0, state, one_A)
        diagonal = tl.sum(tl.where((s == t)[None, :], g, 0.0), 1)
        d = (tl.sum(g * previous, 1) + g_state * state) * factor - diagonal * e_factor
        to = (b.to(tl.int64) * T + time) * H + h
        tl.store(d_n + to, d.to(d_n.dtype.element_ty), mask=present)
        carried = tl.where((s < t)[None, :], g * (n_t * factor)[:, None], 0.0)
        carried_state = g_state * n_t * factor


@triton.jit
def _pair(pointer, time, T, N, n, HALF_N):
    """Both halves of rows ``time`` of [T, N]."""
    mask = (time < T)[:, None] & (n < HALF_N)[None, :]
    at = pointer + time[:, None] * N + n[None, :]
    return tl.load(at, mask=mask, other=0.0), tl.load(at + HALF_N, mask=mask, other=0.0)


@triton.jit
def _scan_kernel(
    x, B_hat, C_hat, B_next, A, across, D, cos_Q, sin_Q, states, out,
    T, H, chunks,
    g_factor, g_half, G_limit, m_factor, m_half, M_scale, D_scale, u_factor, u_half, A_u_factor, A_u_half,
    u_scale, beta_factor, beta_half, H_scale, r_factor, H_factor, y_factor, y_half, low, high,
    P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr,
    CARRY: tl.constexpr, KEEP: tl.constexpr, WIDE_M: tl.constexpr, DOT: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    b, h = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    HALF_N: tl.constexpr = N // 2
    q, n = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_N)
    p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    H1 = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    H2 = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    cos = tl.load(cos_Q + n, mask=n < HALF_N, other=0.0) if CARRY else tl.zeros((BLOCK_N,), tl.float32)
    sin = tl.load(sin_Q + n, mask=n < HALF_N, other=0.0) if CARRY else tl.zeros((BLOCK_N,), tl.float32)
    skip = tl.load(D + h) * D_scale
    # Scalar bases of 64 bits, offsets of 32: half the registers of 64-bit offsets.
    C_hat += b * T * N
    B_hat += b * T * N
    if CARRY:
        B_next += b * T * N
    x += b * T * H * P + h * P
    out += b * T * H * P + h * P
    square = (q < Q)[:, None] & (q < Q)[None, :]
    in_square = q[:, None] * Q + q[None, :]
    kept = (p < P)[:, None] & (n < HALF_N)[None, :]
    in_state = p[:, None] * N + n[None, :]
    for chunk in range(chunks):
        time = tl.where(q < Q, chunk * Q + q, T)
        C1, C2 = _pair(C_hat, time, T, N, n, HALF_N)
        B1, B2 = _pair(B_hat, time, T, N, n, HALF_N)
        C1, C2 = C1.to(DOT), C2.to(DOT)
        G = tl.dot(C1, tl.trans(B1.to(DOT))) + tl.dot(C2, tl.trans(B2.to(DOT)))
        G = rounded(G, g_factor, g_half)
        G = tl.minimum(tl.maximum(G, -G_limit), G_limit)
        decays = ((b * chunks + chunk) * H + h) * Q
        A_ts = tl.load(A + decays * Q + in_square, mask=square, other=0).to(tl.float32)
        M = rounded(A_ts * G, m_factor, m_half)
        in_x = (time < T)[:, None] & (p < P)[None, :]
        x_at = time[:, None] * (H * P) + p[None, :]
        X = tl.load(x + x_at, mask=in_x, other=0.0)
        X_dot = X.to(DOT)
        if WIDE_M:
            y = _dot_split(M, X_dot, DOT) * M_scale
        else:
            y = tl.dot(M.to(DOT), X_dot) * M_scale
        y += X.to(tl.float32) * skip
        if CARRY:
            H1_high, H2_high = tl.floor(H1 * (1.0 / SPLIT)), tl.floor(H2 * (1.0 / SPLIT))
            H1_low, H2_low = H1 - H1_high * SPLIT, H2 - H2_high * SPLIT
            u = tl.dot(C1, tl.trans(H1_high.to(DOT))) + tl.dot(C2, tl.trans(H2_high.to(DOT)))
            u = u * SPLIT + (tl.dot(C1, tl.trans(H1_low.to(DOT))) + tl.dot(C2, tl.trans(H2_low.to(DOT))))
            u = rounded(u, u_factor, u_half)
            a = tl.load(across + decays + q, mask=q < Q, other=0).to(tl.float32)
            y += rounded(a, A_u_factor, A_u_half)[:, None] * u * u_scale
            if chunk + 1 < chunks:
                N1, N2 = _pair(B_next, time, T, N, n, HALF_N)
                last = tl.load(A + (decays + Q - 1) * Q + q, mask=q < Q, other=0).to(tl.float32)[:, None]
                beta1 = rounded(last * N1.to(tl.float32), beta_factor, beta_half)
                beta2 = rounded(last * N2.to(tl.float32), beta_factor, beta_half)
                through = tl.load(across + decays + Q - 1).to(tl.float32)
                kappa = rounded(through * cos, r_factor, 0.5)[None, :]
                sigma = rounded(through * sin, r_factor, 0.5)[None, :]
                X_t = tl.trans(X_dot)
                beta1_high, beta2_high = tl.floor(beta1 * (1.0 / SPLIT)), tl.floor(beta2 * (1.0 / SPLIT))
                beta1_low, beta2_low = beta1 - beta1_high * SPLIT, beta2 - beta2_high * SPLIT
                in1 = tl.dot(X_t, beta1_high.to(DOT)) * SPLIT + tl.dot(X_t, beta1_low.to(DOT))
                in2 = tl.dot(X_t, beta2_high.to(DOT)) * SPLIT + tl.dot(X_t, beta2_low.to(DOT))
                turned1 = kappa * H1 - sigma * H2 + in1 * H_scale
                turned2 = sigma * H1 + kappa * H2 + in2 * H_scale
                H1, H2 = rounded(turned1, H_factor, 0.5), rounded(turned2, H_factor, 0.5)
                if KEEP:
                    to = states + ((b * H + h) * (chunks - 1) + chunk) * P * N
                    tl.store(to + in_state, H1.to(states.dtype.element_ty), mask=kept)
                    tl.store(to + in_state + HALF_N, H2.to(states.dtype.element_ty), mask=kept)
        y = rounded(y, y_factor, y_half)
        y = tl.minimum(tl.maximum(y, low), high)
        tl.store(out + x_at, y.to(out.dtype.element_ty), mask=in_x)


@triton.jit
def _sum_gradient(gradient, out, at, mask, low, high, factor):
    """Gradient of y before its shift and clamp."""
    g = tl.load(gradient + at, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(out + at, mask=mask, other=0.0).to(tl.float32)
    return clamp_gradient(y, g, low, high) * factor


@triton.jit
def _state_gradient_kernel(
    gradient, out, C_hat, across, cos_Q, sin_Q, states, d_states, d_through, d_cos, d_sin, T, H, chunks,
    u_factor, A_u_factor, A_u_half, u_scale, r_factor, H_factor, y_factor, low, high,
    P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, DOT: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradients of the state that enters chunks 1, 2, ..., last first, and of the turns between them."""
    b, h = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    HALF_N: tl.constexpr = N // 2
    q, n = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_N)
    p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    cos = tl.load(cos_Q + n, mask=n < HALF_N, other=0.0)
    sin = tl.load(sin_Q + n, mask=n < HALF_N, other=0.0)
    d_H1 = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    d_H2 = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    d_cos_sum = tl.zeros((BLOCK_N,), tl.float32)
    d_sin_sum = tl.zeros((BLOCK_N,), tl.float32)
    kept = (p < P)[:, None] & (n < HALF_N)[None, :]
    in_state = p[:, None] * N + n[None, :]
    C_hat += b * T * N
    gradient += b * T * H * P + h * P
    out += b * T * H * P + h * P
    for back in range(chunks - 1):
        chunk = chunks - 1 - back
        time = tl.where(q < Q, chunk * Q + q, T)
        decays = ((b * chunks + chunk) * H + h) * Q
        through = tl.load(across + decays + Q - 1).to(tl.float32)
        kappa = rounded(through * cos, r_factor, 0.5)[None, :] * H_factor
        sigma = rounded(through * sin, r_factor, 0.5)[None, :] * H_factor
        at = ((b * H + h) * (chunks - 1) + chunk - 1) * P * N
        H1 = tl.load(states + at + in_state, mask=kept, other=0.0).to(tl.float32)
        H2 = tl.load(states + at + in_state + HALF_N, mask=kept, other=0.0).to(tl.float32)
        d_kappa = tl.sum(d_H1 * H1 + d_H2 * H2, 0) * (H_factor * r_factor)
        d_sigma = tl.sum(d_H2 * H1 - d_H1 * H2, 0) * (H_factor * r_factor)
        d_cos_sum += d_kappa * through
        d_sin_sum += d_sigma * through
        part = tl.program_id(1) * tl.num_programs(0) * chunks
        tl.store(d_through + part + (b * H + h) * chunks + chunk, tl.sum(d_kappa * cos + d_sigma * sin))
        turned1 = kappa * d_H1 + sigma * d_H2
        turned2 = kappa * d_H2 - sigma * d_H1
        C1, C2 = _pair(C_hat, time, T, N, n, HALF_N)
        in_x = (time < T)[:, None] & (p < P)[None, :]
        x_at = time[:, None] * (H * P) + p[None, :]
        d_y = _sum_gradient(gradient, out, x_at, in_x, low, high, y_factor)
        a = tl.load(across + decays + q, mask=q < Q, other=0).to(tl.float32)
        A_u = rounded(a, A_u_factor, A_u_half)[:, None]
        d_u = tl.trans((d_y * A_u * (u_scale * u_factor)).to(DOT))
        d_H1 = turned1 + tl.dot(d_u, C1.to(DOT))
        d_H2 = turned2 + tl.dot(d_u, C2.to(DOT))
        tl.store(d_states + at + in_state, d_H1.to(d_states.dtype.element_ty), mask=kept)
        tl.store(d_states + at + in_state + HALF_N, d_H2.to(d_states.dtype.element_ty), mask=kept)
    part = (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)) * HALF_N + n
    tl.store(d_cos + part, d_cos_sum, mask=n < HALF_N)
    tl.store(d_sin + part, d_sin_sum, mask=n < HALF_N)


@triton.jit
def _chunk_gradient_kernel(
    gradient, out, x, B_hat, C_hat, B_next, A, across, D, states, d_states,
    d_x, d_B, d_C, d_N, d_A, d_across, d_D,
    T, H, chunks,
    g_factor, g_half, G_limit, m_factor, m_half, M_scale, D_scale, u_factor, u_half, A_u_factor, A_u_half,
    u_scale, beta_factor, beta_half, H_scale, H_factor, y_factor, low, high,
    P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, CARRY: tl.constexpr, DOT: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """All gradients of one chunk but those of the decays and of the state that comes in."""
    b, chunk = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks
    q, n, p = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_P)
    time = tl.where(q < Q, chunk * Q + q, T)
    rows = (time < T)[:, None] & (n < N)[None, :]
    row_at = time[:, None] * N + n[None, :]
    # Scalar bases of 64 bits, offsets of 32: half the registers of 64-bit offsets.
    rows_before = b * T * N
    channels_before = b * T * H * P
    C_hat += rows_before
    B_hat += rows_before
    gradient += channels_before
    out += channels_before
    x += channels_before
    d_x += channels_before
    C = tl.load(C_hat + row_at, mask=rows, other=0.0).to(DOT)
    B = tl.load(B_hat + row_at, mask=rows, other=0.0).to(DOT)
    G = rounded(tl.dot(C, tl.trans(B)), g_factor, g_half)
    G = tl.minimum(tl.maximum(G, -G_limit), G_limit)
    causal = (q[:, None] >= q[None, :]) & (q < Q)[:, None]
    d_G = tl.zeros((BLOCK_Q, BLOCK_Q), tl.float32)
    d_C_sum = tl.zeros((BLOCK_Q, BLOCK_N), tl.float32)
    d_N_sum = tl.zeros((BLOCK_Q, BLOCK_N), tl.float32)
    state_mask = (p < P)[:, None] & (n < N)[None, :]
    # A vector, so that masks are made of vectors alone.
    position = chunk + tl.zeros_like(n)[None, :]
    entered = state_mask & (position > 0)
    left = state_mask & (position + 1 < chunks)
    in_x = (time < T)[:, None] & (p < P)[None, :]
    square = (q < Q)[:, None] & (q < Q)[None, :]
    in_square = q[:, None] * Q + q[None, :]
    in_state = p[:, None] * N + n[None, :]
    for h in range(H):
        x_at = time[:, None] * (H * P) + h * P + p[None, :]
        X = tl.load(x + x_at, mask=in_x, other=0.0).to(DOT)
        d_y = _sum_gradient(gradient, out, x_at, in_x, low, high, y_factor)
        d_y_dot = d_y.to(DOT)
        decays = ((b * chunks + chunk) * H + h) * Q
        A_ts = tl.load(A + decays * Q + in_square, mask=square, other=0).to(tl.float32)
        M = rounded(A_ts * G, m_factor, m_half)
        d_M = tl.dot(d_y_dot, tl.trans(X)) * (M_scale * m_factor)
        d_G += d_M * A_ts
        d_A_ts = tl.where(causal, d_M * G, 0.0)
        skip = tl.load(D + h) * D_scale
        d_X = tl.dot(tl.trans(M.to(DOT)), d_y_dot) * M_scale + d_y * skip
        tl.store(d_D + tl.program_id(0) * H + h, tl.sum(d_y * X.to(tl.float32)) * D_scale)
        d_a = tl.zeros((BLOCK_Q,), tl.float32)
        if CARRY:
            a = tl.load(across + decays + q, mask=q < Q, other=0).to(tl.float32)
            state_at = ((b * H + h) * (chunks - 1) + chunk) * P * N
            H_dot = tl.load(states + (state_at - P * N) + in_state, mask=entered, other=0.0).to(DOT)
            u = rounded(tl.dot(C, tl.trans(H_dot)), u_factor, u_half)
            d_a += tl.sum(d_y * u, 1) * (u_scale * A_u_factor)
            A_u = rounded(a, A_u_factor, A_u_half)[:, None]
            d_u = (d_y * A_u * (u_scale * u_factor)).to(DOT)
            d_C_sum += tl.dot(d_u, H_dot)
            d_T = tl.load(d_states + state_at + in_state, mask=left, other=0.0).to(DOT)
            next_B = tl.load(B_next + rows_before + row_at, mask=rows, other=0.0).to(tl.float32)
            last = tl.load(A + (decays + Q - 1) * Q + q, mask=q < Q, other=0).to(tl.float32)[:, None]
            beta = rounded(last * next_B, beta_factor, beta_half).to(DOT)
            scale = H_scale * H_factor
            d_X += tl.dot(beta, tl.trans(d_T)) * scale
            d_beta = tl.dot(X, d_T) * (scale * beta_factor)
            d_N_sum += d_beta * last
            d_last = tl.sum(d_beta * next_B, 1)
            d_A_ts += tl.where((q == Q - 1)[:, None], d_last[None, :], 0.0)
        tl.store(d_x + x_at, d_X.to(d_x.dtype.element_ty), mask=in_x)
        tl.store(d_A + decays * Q + in_square, d_A_ts.to(d_A.dtype.element_ty), mask=square)
        tl.store(d_across + decays + q, d_a, mask=q < Q)
    d_G = clamp_gradient(G, d_G, -G_limit, G_limit) * g_factor
    d_G = tl.where(q[:, None] < q[None, :], 0.0, d_G).to(DOT)
    tl.store(d_B + rows_before + row_at, tl.dot(tl.trans(d_G), C).to(d_B.dtype.element_ty), mask=rows)
    tl.store(d_C + rows_before + row_at, (d_C_sum + tl.dot(d_G, B)).to(d_C.dtype.element_ty), mask=rows)
    if CARRY:
        tl.store(d_N + rows_before + row_at, d_N_sum.to(d_N.dtype.element_ty), mask=rows)


def _block(size: int) -> int:
    return max(16, int(triton.next_power_of_2(size)))


class _Scalars:
    """The shifts as factors, in the order of the kernels' arguments."""

    def __init__(self, s: SsdScales, places: int, low: int, high: int) -> None:
        narrowing = s.A_bits - s.A_u_bits
        self.g = (2.0**-s.G_shift, half_unit(s.G_shift), float(s.G_limit))
        self.m = (2.0**-s.M_shift, half_unit(s.M_shift), 2.0**s.M_align, 2.0**s.D_align)
        self.u = (2.0**-s.u_shift, half_unit(s.u_shift))
        self.A_u = (2.0**-narrowing, half_unit(narrowing), 2.0**s.u_align)
        self.beta = (2.0**-s.beta_shift, half_unit(s.beta_shift), 2.0**s.H_align)
        self.turn = (2.0**-s.rotation_frac, 2.0**-s.A_bits)
        self.y = (2.0**-places, half_unit(places))
        self.clamp = (float(low), float(high))


GRADIENT_WARPS = 4


class _ChunkedSsd(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        B_hat: Tensor,
        C_hat: Tensor,
        decay: Tensor,
        D: Tensor,
        B_next: Tensor | None,
        cos_Q: Tensor | None,
        sin_Q: Tensor | None,
        scales: SsdScales,
        places: int,
        low: int,
        high: int,
    ) -> Tensor:
        x, B_hat, C_hat = x.contiguous(), B_hat.contiguous(), C_hat.contiguous()
        B_next = B_next.contiguous() if B_next is not None else None
        if decay.stride(-1) != 1:
            decay = decay.contiguous()
        batch, T, _ = x.shape
        N, H, P, Q = B_hat.shape[-1], decay.shape[-1], scales.headdim, scales.chunk_size
        chunks = triton.cdiv(T, Q)
        carry = chunks > 1
        if carry and (B_next is None or cos_Q is None or sin_Q is None):
            raise ValueError(f"a sequence of {T} steps needs B_next, cos_Q and sin_Q")
        A = torch.empty(batch, chunks, H, Q, Q, dtype=torch.int16, device=x.device)
        across = torch.empty(batch, chunks, H, Q, dtype=torch.int16, device=x.device)
        k = scales.decay_bits
        ctx.decay_scalars = (2.0**-k, 2.0 ** (scales.A_bits - k), 2.0**scales.A_bits)
        block_h = 32 if x.is_cuda else 4
        _decay_kernel[(batch * chunks, triton.cdiv(H, block_h))](
            decay, A, across, T, H, chunks, decay.stride(0), decay.stride(1), 2.0**k, *ctx.decay_scalars,
            Q=Q, BLOCK_Q=triton.next_power_of_2(Q), BLOCK_H=block_h,
        )  # fmt: skip
        keep = carry and any(ctx.needs_input_grad)
        states = None
        if keep:
            # Only gradients read them: 8 significant bits are as good as in every factor of a gradient.
            states = torch.empty(batch, H, chunks - 1, P, N, dtype=narrow_dtype(x.device), device=x.device)
        y = torch.empty_like(x, dtype=narrow_dtype(x.device))
        v = _Scalars(scales, places, low, high)
        # A program a head and a part of it: enough of them to fill a GPU.
        block_p = _block(P)
        while x.is_cuda and block_p > 16 and batch * H * triton.cdiv(P, block_p) < 512:
            block_p //= 2
        _scan_kernel[(batch * H, triton.cdiv(P, block_p))](
            x, B_hat, C_hat, B_next, A, across, D, cos_Q, sin_Q, states, y, T, H, chunks,
            *v.g, *v.m, *v.u, *v.A_u, *v.beta, *v.turn, *v.y, *v.clamp,
            P=P, N=N, Q=Q, CARRY=carry, KEEP=keep, WIDE_M=scales.A_bits + scales.G_limit.bit_length()
            - scales.M_shift > 8, DOT=dot_dtype(x),
            BLOCK_Q=_block(Q), BLOCK_P=block_p, BLOCK_N=_block(N // 2), num_warps=4,
        )  # fmt: skip
        ctx.save_for_backward(x, B_hat, C_hat, decay, D, B_next, cos_Q, sin_Q, A, across, states, y)
        ctx.scalars, ctx.sizes, ctx.block_p = v, (batch, T, H, P, N, Q, chunks), block_p
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, B_hat, C_hat, decay, D, B_next, cos_Q, sin_Q, A, across, states, y = ctx.saved_tensors
        batch, T, H, P, N, Q, chunks = ctx.sizes
        v: _Scalars = ctx.scalars
        gradient = gradients[0].contiguous()
        narrow, dot, device = narrow_dtype(x.device), dot_dtype(x), x.device
        carry = chunks > 1
        blocks = {"BLOCK_Q": _block(Q), "BLOCK_N": _block(N // 2)}
        d_states, d_through, d_turn = None, None, None
        if carry:
            parts = triton.cdiv(P, ctx.block_p)
            d_states = torch.empty_like(states)
            d_through = torch.zeros(parts, batch, H, chunks, device=device)
            d_turn = torch.empty(2, parts, batch * H, N // 2, device=device)
            _state_gradient_kernel[(batch * H, parts)](
                gradient, y, C_hat, across, cos_Q, sin_Q, states, d_states, d_through, d_turn[0], d_turn[1],
                T, H, chunks,
                v.u[0], *v.A_u, *v.turn, v.y[0], *v.clamp,
                P=P, N=N, Q=Q, DOT=dot, BLOCK_P=ctx.block_p, **blocks, num_warps=4,
            )  # fmt: skip
        d_x = torch.empty_like(x)
        d_B, d_C, d_N = torch.empty_like(B_hat), torch.empty_like(C_hat), torch.empty_like(B_hat)
        d_A = torch.empty(A.shape, dtype=narrow, device=device)
        d_across = torch.empty(across.shape, device=device)
        d_D = torch.empty(batch * chunks, H, device=device)
        _chunk_gradient_kernel[(batch * chunks,)](
            gradient, y, x, B_hat, C_hat, B_next, A, across, D, states, d_states,
            d_x, d_B, d_C, d_N, d_A, d_across, d_D, T, H, chunks,
            *v.g, *v.m, *v.u, *v.A_u, *v.beta, v.turn[1], v.y[0], *v.clamp,
            P=P, N=N, Q=Q, CARRY=carry, DOT=dot, BLOCK_Q=_block(Q), BLOCK_P=_block(P), BLOCK_N=_block(N),
            num_warps=GRADIENT_WARPS,
        )  # fmt: skip
        if d_through is not None:
            d_across[..., Q - 1] += d_through.sum(0).transpose(1, 2)
        d_n = torch.empty(batch, T, H, dtype=decay.dtype, device=device)
        block_h = 32 if x.is_cuda else 4
        _decay_gradient_kernel[(batch * chunks, triton.cdiv(H, block_h))](
            decay, A, across, d_A, d_across, d_n, T, H, chunks, decay.stride(0), decay.stride(1),
            *ctx.decay_scalars, Q=Q, BLOCK_Q=triton.next_power_of_2(Q), BLOCK_H=block_h,
        )  # fmt: skip
        turns = d_turn.sum((1, 2)) if d_turn is not None else (None, None)
        return d_x, d_B, d_C, d_n, d_D.sum(0), d_N if carry else None, *turns, None, None, None, None


def ssd_requantize(
    x: Tensor,
    B_hat: Tensor,
    C_hat: Tensor,
    decay: Tensor,
    D: Tensor,
    scales: SsdScales,
    places: int,
    low: int,
    high: int,
    B_next: Tensor | None = None,
    cos_Q: Tensor | None = None,
    sin_Q: Tensor | None = None,
) -> Tensor:
    """clamp(shift(ssd(...), places), low, high): ``ssd`` of the integer graph and what requantizes y.

    Args:
        x: narrow integers [batch, T, H*P]. B_hat, C_hat, B_next: [batch, T, N]. decay: [batch, T, H].
        D: integers, float32 [H]. cos_Q, sin_Q: integers, float32 [N/2].
        scales: static shifts. places, low, high: of the shift and the clamp behind the scan.

    Returns:
        Narrow integers [batch, T, H*P]; gradients as of ``triton_kernels.ssd.ssd``.
    """
    result: Tensor = _ChunkedSsd.apply(
        x, B_hat, C_hat, decay, D, B_next, cos_Q, sin_Q, scales, places, low, high
    )
    return result
