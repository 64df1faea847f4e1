"""The quaternion scan with read-out, where the channels of a group share q, B and C, as matrix products.

    h_t,pk = q_t,k h_{t-1},pk + B_t,k S_t,p            y_t,p = sum_k C_t,k h_t,pk + D_p S_t,p

for a group of P real channels S and N states k: the state is [P, N] quaternions, all products are Hamilton's
and from the left. Any q is allowed: it may change its axis from step to step, so that the q of one state do
not commute, and may be zero; it should not be longer than one.

A chunk has Q steps. With P_t = q_t ... q_1 from the chunk's start and H the state before the chunk,

    y_t = sum_{s<=t} K_ts S_s + C_t P_t H       K_ts = sum_k C_t q_t ... q_{s+1} B_s, a quaternion

K belongs to the group, not to its channels. With q = |q| q^, U_t = q^_t ... q^_1 and l_t = sum log2 |q|,
q_t ... q_{s+1} = 2^(l_t - l_s) U_t U*_s. Rotations are undone exactly, being of length one, and leave C^ =
C U and B^ = U* B; magnitudes must not be undone, 2^(-l_s) would overflow. So K is summed in log2 Q levels:
steps t and s that part at a block of 2m steps, t in its right half and s in its left, meet at the boundary
b, where 2^(l_t - l_b) and 2^(l_b - l_s) are at most one, and a level is one masked product of matrices.
(Sub-blocks for vector decays: Yang et al. 2024, arXiv 2312.06635, section 4.3; here down to single steps,
and with rotations.)

What it costs, with D = G P channels, for 8192 tokens, D 1536, G 2, N 64, half precision: S and y are 10 D
bytes a token, q, B and C 32 G N; in all 159 MB, 0.04 ms of copying at 4.2 TB/s. Operations a token: reading
the state 32 N D, updating it 8 N D, K S 8 Q D; in all 39 GFLOP, 0.06 ms at 700 TFLOP/s, and 8 more for K
itself. So the scan is bound by operations, and by what is written between its kernels, of which the states
before the chunks are the most, 8 N D / Q bytes a token:

1. ``_prefix_kernel``: U, l, C^, B^, and what is made of them.
2. ``_kernel_kernel``: K.
3. ``_state_kernel``: the state before each chunk, H' = U_Q (2^l_Q H + sum_s 2^(l_Q - l_s) B^_s S_s).
4. ``_output_kernel``: [K | C P] times [S; H], and D S.

In backward 1. and 3. are run again, products without an epilogue are cuBLAS', and

5. ``_carry_backward_kernel`` makes the gradient of the state after each chunk,
6. ``_values_backward_kernel`` those of S and D,
7. ``_operand_backward_kernel`` those of q, B and C.

The gradient of q_j needs no differences. Turning q_j by 1 + e turns all K_ts with s < j <= t; in the frame of
U_j that is <C^*_t dC^_t, U*_j e U_j> summed over t >= j, or dB^_s B^*_s summed over s < j. On a level every
step belongs to one half, so these sums run over a half's steps only, and pairs that q_j has no part in never
enter them.

This is the float operation. ``quaternion_recurrence`` is the scan of channels that share nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from triton_kernels.dispatch import check_operands, device_of, runs_on_triton
from triton_kernels.quaternion import (
    hamilton,
    load_quaternion,
    quaternion_product_reference,
    store_quaternion,
)

CHUNK = 64
"""Most steps of a chunk."""
SMALLEST_SQUARE = tl.constexpr(2.0**-40)
"""Of |q|: below 2^-20 a q counts as 2^-20, where its direction has no digits left."""


@triton.jit
def _compose(p0, p1, p2, p3, q0, q1, q2, q3):
    return hamilton(q0, q1, q2, q3, p0, p1, p2, p3)


@triton.jit
def _unit(q0, q1, q2, q3):
    """q / |q| and log2 |q|."""
    square = q0 * q0 + q1 * q1 + q2 * q2 + q3 * q3
    tiny = square < SMALLEST_SQUARE
    square = tl.where(tiny, SMALLEST_SQUARE, square)
    scale = tl.rsqrt(square)
    return (
        tl.where(tiny, 1.0, q0 * scale),
        tl.where(tiny, 0.0, q1 * scale),
        tl.where(tiny, 0.0, q2 * scale),
        tl.where(tiny, 0.0, q3 * scale),
        0.5 * tl.log2(square),
    )


@triton.jit
def _add_product(acc, a, b, PRECISION: tl.constexpr):
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _add_sum(acc, chosen, x):
    """acc + chosen x, for ones and zeros in the dtype of products."""
    return tl.dot(chosen, x.to(chosen.dtype), acc, input_precision="ieee")


@triton.jit
def _prefix_kernel(
    q_ptr,
    B_ptr,
    C_ptr,
    turn_ptr,
    log_ptr,
    B_hat_ptr,
    C_hat_ptr,
    keys_ptr,
    reading_ptr,
    total_ptr,
    length,
    num_chunks,
    num_groups,
    q_batch,
    q_time,
    q_group,
    q_state,
    q_component,
    B_batch,
    B_time,
    B_group,
    B_state,
    B_component,
    C_batch,
    C_time,
    C_group,
    C_state,
    C_component,
    N: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of a chunk and group: U, l, C^, B^; keys 2^(l_Q - l_s) B^, [s, 4 N]; 2^l_t C^ as 4 x 4 blocks, which
    multiply the components of H, ``reading`` [t, r, 4 N]; (U_Q, 2^l_Q)."""
    row = tl.program_id(1).to(tl.int64)
    group = tl.program_id(2)
    batch = row // num_chunks
    offset = tl.arange(0, CHUNK)
    t = (row % num_chunks) * CHUNK + offset
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    in_states = n[None, :] < N
    mask = (t[:, None] < length) & in_states
    q_place = batch * q_batch + t[:, None] * q_time + group * q_group + n[None, :] * q_state
    q0, q1, q2, q3 = load_quaternion(q_ptr, q_place, q_component, mask)
    # steps after the end keep the state
    q0 = tl.where(mask, q0, 1.0)
    q0, q1, q2, q3, log = _unit(q0, q1, q2, q3)
    log = tl.cumsum(log, 0)
    u0, u1, u2, u3 = tl.associative_scan((q0, q1, q2, q3), 0, _compose)
    block = row * num_groups + group
    place = (block * 4 * CHUNK + offset[:, None]) * N + n[None, :]
    store_quaternion(turn_ptr, place, CHUNK * N, u0, u1, u2, u3, in_states)
    tl.store(log_ptr + (block * CHUNK + offset[:, None]) * N + n[None, :], log, mask=in_states)
    last = offset[:, None] == CHUNK - 1
    log_total = tl.sum(tl.where(last, log, 0.0), 0)
    t0, t1 = tl.sum(tl.where(last, u0, 0.0), 0), tl.sum(tl.where(last, u1, 0.0), 0)
    t2, t3 = tl.sum(tl.where(last, u2, 0.0), 0), tl.sum(tl.where(last, u3, 0.0), 0)
    total = block * 5 * N + n
    store_quaternion(total_ptr, total, N, t0, t1, t2, t3, n < N)
    tl.store(total_ptr + total + 4 * N, tl.exp2(log_total), mask=n < N)

    B_place = batch * B_batch + t[:, None] * B_time + group * B_group + n[None, :] * B_state
    b0, b1, b2, b3 = load_quaternion(B_ptr, B_place, B_component, mask)
    b0, b1, b2, b3 = hamilton(u0, -u1, -u2, -u3, b0, b1, b2, b3)
    store_quaternion(B_hat_ptr, place, CHUNK * N, b0, b1, b2, b3, in_states)
    remaining = tl.exp2(log_total[None, :] - log)
    keys = (block * CHUNK + offset[:, None]) * 4 * N + n[None, :]
    store_quaternion(
        keys_ptr, keys, N, b0 * remaining, b1 * remaining, b2 * remaining, b3 * remaining, in_states
    )

    C_place = batch * C_batch + t[:, None] * C_time + group * C_group + n[None, :] * C_state
    c0, c1, c2, c3 = load_quaternion(C_ptr, C_place, C_component, mask)
    c0, c1, c2, c3 = hamilton(c0, c1, c2, c3, u0, u1, u2, u3)
    store_quaternion(C_hat_ptr, place, CHUNK * N, c0, c1, c2, c3, in_states)
    since = tl.exp2(log)
    c0, c1, c2, c3 = c0 * since, c1 * since, c2 * since, c3 * since
    blocks = (block * CHUNK + offset[:, None]) * 16 * N + n[None, :]
    store_quaternion(reading_ptr, blocks, N, c0, -c1, -c2, -c3, in_states)
    store_quaternion(reading_ptr, blocks + 4 * N, N, c1, c0, -c3, c2, in_states)
    store_quaternion(reading_ptr, blocks + 8 * N, N, c2, c3, c0, -c1, in_states)
    store_quaternion(reading_ptr, blocks + 12 * N, N, c3, -c2, c1, c0, in_states)


@triton.jit
def _pairs(level, t, s):
    """Whether steps t and s part at a block of 2^level steps, t right and s left."""
    half_t, half_s = t >> (level - 1), s >> (level - 1)
    return (half_t == half_s + 1) & (half_s % 2 == 0)


@triton.jit
def _same_half(level, offset):
    """Whether two steps are in the same half of a block of 2^level steps."""
    half = offset >> (level - 1)
    return half[:, None] == half[None, :]


@triton.jit
def _level_scale(log_ptr, log, level, offset, n, mask, N: tl.constexpr):
    """With b the boundary in the middle of a block of 2^level steps: 2^(l_t - l_b) in its right half, of
    queries, and 2^(l_b - l_s) in its left, of keys."""
    right = ((offset >> (level - 1)) % 2 == 1)[:, None]
    boundary = ((offset >> level) << level) + (1 << (level - 1)) - 1
    since = log - tl.load(log_ptr + boundary[:, None] * N + n[None, :], mask=mask, other=0.0)
    return tl.exp2(tl.where(right, since, -since))


@triton.jit
def _kernel_kernel(
    B_hat_ptr,
    C_hat_ptr,
    log_ptr,
    kernel_ptr,
    num_groups,
    N: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    LEVELS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """K, [t, r, s]: its diagonal, and level by level what is below."""
    block = tl.program_id(0).to(tl.int64) * num_groups + tl.program_id(1)
    offset = tl.arange(0, CHUNK)
    log_ptr += block * CHUNK * N
    B_hat_ptr += block * 4 * CHUNK * N
    C_hat_ptr += block * 4 * CHUNK * N
    kernel_ptr += block * 4 * CHUNK * CHUNK
    dtype: tl.constexpr = kernel_ptr.dtype.element_ty
    zero = tl.zeros([CHUNK, CHUNK], tl.float32)
    K0, K1, K2, K3 = zero, zero, zero, zero
    diagonal = offset[:, None] == offset[None, :]
    for first in range(0, N, BLOCK):
        n = first + tl.arange(0, BLOCK)
        mask = (offset[:, None] >= 0) & (n[None, :] < N)
        place = offset[:, None] * N + n[None, :]
        C0, C1, C2, C3 = load_quaternion(C_hat_ptr, place, CHUNK * N, mask)
        B0, B1, B2, B3 = load_quaternion(B_hat_ptr, place, CHUNK * N, mask)
        log = tl.load(log_ptr + place, mask=mask, other=0.0)
        d0, d1, d2, d3 = hamilton(C0, C1, C2, C3, B0, B1, B2, B3)
        K0 += tl.where(diagonal, tl.sum(d0, 1)[:, None], 0.0)
        K1 += tl.where(diagonal, tl.sum(d1, 1)[:, None], 0.0)
        K2 += tl.where(diagonal, tl.sum(d2, 1)[:, None], 0.0)
        K3 += tl.where(diagonal, tl.sum(d3, 1)[:, None], 0.0)
        for level in range(1, LEVELS + 1):
            scale = _level_scale(log_ptr, log, level, offset, n, mask, N)
            c0, c1, c2, c3 = (
                (C0 * scale).to(dtype),
                (C1 * scale).to(dtype),
                (C2 * scale).to(dtype),
                (C3 * scale).to(dtype),
            )
            b0, b1, b2, b3 = (
                tl.trans((B0 * scale).to(dtype)),
                tl.trans((B1 * scale).to(dtype)),
                tl.trans((B2 * scale).to(dtype)),
                tl.trans((B3 * scale).to(dtype)),
            )
            chosen = _pairs(level, offset[:, None], offset[None, :])
            part = _add_product(zero, c0, b0, PRECISION)
            part = _add_product(part, -c1, b1, PRECISION)
            part = _add_product(part, -c2, b2, PRECISION)
            part = _add_product(part, -c3, b3, PRECISION)
            K0 += tl.where(chosen, part, 0.0)
            part = _add_product(zero, c0, b1, PRECISION)
            part = _add_product(part, c1, b0, PRECISION)
            part = _add_product(part, c2, b3, PRECISION)
            part = _add_product(part, -c3, b2, PRECISION)
            K1 += tl.where(chosen, part, 0.0)
            part = _add_product(zero, c0, b2, PRECISION)
            part = _add_product(part, -c1, b3, PRECISION)
            part = _add_product(part, c2, b0, PRECISION)
            part = _add_product(part, c3, b1, PRECISION)
            K2 += tl.where(chosen, part, 0.0)
            part = _add_product(zero, c0, b3, PRECISION)
            part = _add_product(part, c1, b2, PRECISION)
            part = _add_product(part, -c2, b1, PRECISION)
            part = _add_product(part, c3, b0, PRECISION)
            K3 += tl.where(chosen, part, 0.0)
    place = offset[:, None] * 4 * CHUNK + offset[None, :]
    tl.store(kernel_ptr + place, K0.to(dtype))
    tl.store(kernel_ptr + place + CHUNK, K1.to(dtype))
    tl.store(kernel_ptr + place + 2 * CHUNK, K2.to(dtype))
    tl.store(kernel_ptr + place + 3 * CHUNK, K3.to(dtype))


@triton.jit
def _state_kernel(
    S_ptr,
    keys_ptr,
    total_ptr,
    start_ptr,
    states_ptr,
    end_ptr,
    length,
    num_chunks,
    num_groups,
    P,
    S_batch,
    S_time,
    S_group,
    S_channel,
    N: tl.constexpr,
    CHUNK: tl.constexpr,
    CHANNELS: tl.constexpr,
    STATES: tl.constexpr,
    HAS_START: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The state before each chunk, ``states`` [chunk, group, P, 4 N], and the last one."""
    batch = (tl.program_id(2) // num_groups).to(tl.int64)
    group = tl.program_id(2) % num_groups
    offset = tl.arange(0, CHUNK)
    n = tl.program_id(0) * STATES + tl.arange(0, STATES)
    p = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    in_states = (n < N)[None, :]
    mask = (p < P)[:, None] & in_states
    inner = p[:, None] * (4 * N) + n[None, :]
    outer = (batch * num_groups + group) * P * 4 * N + inner
    zero = tl.zeros([CHANNELS, STATES], tl.float32)
    h0, h1, h2, h3 = zero, zero, zero, zero
    if HAS_START:
        h0, h1, h2, h3 = load_quaternion(start_ptr, outer, N, mask)
    S_ptr += batch * S_batch + group * S_group
    for chunk in range(num_chunks):
        t = chunk * CHUNK + offset
        S = tl.load(
            S_ptr + t[:, None].to(tl.int64) * S_time + p[None, :] * S_channel,
            mask=(t < length)[:, None] & (p < P)[None, :],
            other=0.0,
        )
        S = tl.trans(S)
        block = (batch * num_chunks + chunk) * num_groups + group
        keys = keys_ptr + (block * CHUNK + offset[:, None]) * 4 * N + n[None, :]
        total = total_ptr + block * 5 * N + n[None, :]
        u0, u1, u2, u3 = load_quaternion(total, 0, N, in_states)
        kept = tl.load(total + 4 * N, mask=in_states, other=0.0)
        store_quaternion(states_ptr, block * P * 4 * N + inner, N, h0, h1, h2, h3, mask)
        k0 = tl.load(keys, mask=in_states, other=0.0)
        k1 = tl.load(keys + N, mask=in_states, other=0.0)
        k2 = tl.load(keys + 2 * N, mask=in_states, other=0.0)
        k3 = tl.load(keys + 3 * N, mask=in_states, other=0.0)
        h0 = _add_product(kept * h0, S, k0, PRECISION)
        h1 = _add_product(kept * h1, S, k1, PRECISION)
        h2 = _add_product(kept * h2, S, k2, PRECISION)
        h3 = _add_product(kept * h3, S, k3, PRECISION)
        h0, h1, h2, h3 = hamilton(u0, u1, u2, u3, h0, h1, h2, h3)
    store_quaternion(end_ptr, outer, N, h0, h1, h2, h3, mask)


@triton.jit
def _output_kernel(
    kernel_ptr,
    reading_ptr,
    S_ptr,
    states_ptr,
    D_ptr,
    y_ptr,
    length,
    num_chunks,
    num_groups,
    P,
    S_batch,
    S_time,
    S_group,
    S_channel,
    N: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    HAS_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """y of some rows (t, r) and channels of a chunk: K S + ``reading`` H, and D S where r = 0."""
    row = tl.program_id(1).to(tl.int64)
    group = tl.program_id(2)
    block = row * num_groups + group
    tiles: tl.constexpr = 4 * CHUNK // ROWS
    i = (tl.program_id(0) % tiles) * ROWS + tl.arange(0, ROWS)
    p = (tl.program_id(0) // tiles) * COLUMNS + tl.arange(0, COLUMNS)
    in_channels = p < P
    offset = tl.arange(0, CHUNK)
    first_step = (row % num_chunks) * CHUNK
    S_ptr += (row // num_chunks) * S_batch + group * S_group
    place = (first_step + offset)[:, None] * S_time + p[None, :] * S_channel
    inside = (first_step + offset < length)[:, None] & in_channels[None, :]
    S = tl.load(S_ptr + place, mask=inside, other=0.0)
    kernel_ptr += block * 4 * CHUNK * CHUNK
    K = tl.load(kernel_ptr + i[:, None] * CHUNK + offset[None, :])
    y = _add_product(tl.zeros([ROWS, COLUMNS], tl.float32), K, S, PRECISION)
    reading_ptr += block * 16 * CHUNK * N
    states_ptr += block * P * 4 * N
    for first in range(0, 4 * N, INNER):
        k = first + tl.arange(0, INNER)
        in_states = k < 4 * N
        reading = tl.load(reading_ptr + i[:, None] * (4 * N) + k[None, :], mask=in_states[None, :], other=0.0)
        H = tl.load(
            states_ptr + p[None, :] * (4 * N) + k[:, None],
            mask=in_states[:, None] & in_channels[None, :],
            other=0.0,
        )
        y = _add_product(y, reading, H, PRECISION)
    if HAS_D:
        D = tl.load(D_ptr + group * P + p, mask=in_channels, other=0.0).to(tl.float32)
        t = first_step + i // 4
        real = ((i % 4 == 0) & (t < length))[:, None] & in_channels[None, :]
        S = tl.load(S_ptr + t[:, None] * S_time + p[None, :] * S_channel, mask=real, other=0.0)
        y += D[None, :] * S.to(tl.float32)
    place = (row * 4 * CHUNK + i[:, None]) * (num_groups * P) + group * P + p[None, :]
    tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=in_channels[None, :])


@triton.jit
def _add_turns(a0, a1, a2, a3, b0, b1, b2, b3):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3


@triton.jit
def _carry_backward_kernel(
    states_ptr,
    dstates_ptr,
    total_ptr,
    dend_ptr,
    dstart_ptr,
    dturn_ptr,
    num_chunks,
    num_groups,
    P,
    N: tl.constexpr,
    CHANNELS: tl.constexpr,
    STATES: tl.constexpr,
    HAS_END: tl.constexpr,
):
    """The gradient of each state by what it is read for becomes that of what the chunk after it adds.

    With g that of the state after the chunk, this is U*_Q g; the state before it gets 2^l_Q of that more, and
    a turn of all q of the chunk 2^l_Q sum_p U*_Q g H*, of which ``dturn`` gets the part of this program's
    channels. A chunk is loaded while the one after it is computed.
    """
    batch = (tl.program_id(2) // num_groups).to(tl.int64)
    group = tl.program_id(2) % num_groups
    n = tl.program_id(0) * STATES + tl.arange(0, STATES)
    p = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    in_states = (n < N)[None, :]
    mask = (p < P)[:, None] & in_states
    inner = p[:, None] * (4 * N) + n[None, :]
    outer = (batch * num_groups + group) * P * 4 * N + inner
    zero = tl.zeros([CHANNELS, STATES], tl.float32)
    g0, g1, g2, g3 = zero, zero, zero, zero
    if HAS_END:
        g0, g1, g2, g3 = load_quaternion(dend_ptr, outer, N, mask)
    blocks = (tl.num_programs(2) // num_groups).to(tl.int64) * num_chunks * num_groups
    block = (batch * num_chunks + num_chunks - 1) * num_groups + group
    h0, h1, h2, h3 = load_quaternion(states_ptr, block * P * 4 * N + inner, N, mask)
    d0, d1, d2, d3 = load_quaternion(dstates_ptr, block * P * 4 * N + inner, N, mask)
    for i in range(num_chunks):
        block = (batch * num_chunks + num_chunks - 1 - i) * num_groups + group
        earlier = (block - num_groups) * P * 4 * N + inner
        more = mask & (tl.full([1, 1], i + 1, tl.int32) < num_chunks)
        next_h0, next_h1, next_h2, next_h3 = load_quaternion(states_ptr, earlier, N, more)
        next_d0, next_d1, next_d2, next_d3 = load_quaternion(dstates_ptr, earlier, N, more)
        total = total_ptr + block * 5 * N + n[None, :]
        u0, u1, u2, u3 = load_quaternion(total, 0, N, in_states)
        kept = tl.load(total + 4 * N, mask=in_states, other=0.0)
        g0, g1, g2, g3 = hamilton(u0, -u1, -u2, -u3, g0, g1, g2, g3)
        store_quaternion(dstates_ptr, block * P * 4 * N + inner, N, g0, g1, g2, g3, mask)
        g0, g1, g2, g3 = kept * g0, kept * g1, kept * g2, kept * g3
        t0, t1, t2, t3 = tl.reduce(hamilton(g0, g1, g2, g3, h0, -h1, -h2, -h3), 0, _add_turns)
        part = (tl.program_id(1) * blocks + block) * 4 * N + n
        store_quaternion(dturn_ptr, part, N, t0, t1, t2, t3, n < N)
        g0, g1, g2, g3 = g0 + d0, g1 + d1, g2 + d2, g3 + d3
        h0, h1, h2, h3 = next_h0, next_h1, next_h2, next_h3
        d0, d1, d2, d3 = next_d0, next_d1, next_d2, next_d3
    store_quaternion(dstart_ptr, outer, N, g0, g1, g2, g3, mask)


@triton.jit
def _values_backward_kernel(
    kernel_ptr,
    keys_ptr,
    dy_ptr,
    dstates_ptr,
    S_ptr,
    D_ptr,
    dS_ptr,
    dD_ptr,
    length,
    num_chunks,
    num_groups,
    P,
    S_batch,
    S_time,
    S_group,
    S_channel,
    N: tl.constexpr,
    CHUNK: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    HAS_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dS = K^T dy + keys dH + D dy_0 of a chunk, and its part of dD = sum dy_0 S."""
    row = tl.program_id(1).to(tl.int64)
    group = tl.program_id(2)
    block = row * num_groups + group
    offset = tl.arange(0, CHUNK)
    p = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    in_channels = (p < P)[None, :]
    width = num_groups * P
    channel = group * P + p
    dS = tl.zeros([CHUNK, COLUMNS], tl.float32)
    kernel_ptr += block * 4 * CHUNK * CHUNK
    dy_ptr += row * 4 * CHUNK * width
    for first in range(0, 4 * CHUNK, INNER):
        i = first + tl.arange(0, INNER)
        K = tl.load(kernel_ptr + i[None, :] * CHUNK + offset[:, None])
        dy = tl.load(dy_ptr + i[:, None] * width + channel[None, :], mask=in_channels, other=0.0)
        dS = _add_product(dS, K, dy, PRECISION)
    keys_ptr += block * CHUNK * 4 * N
    dstates_ptr += block * P * 4 * N
    for first in range(0, 4 * N, INNER):
        k = first + tl.arange(0, INNER)
        in_states = k < 4 * N
        keys = tl.load(keys_ptr + offset[:, None] * (4 * N) + k[None, :], mask=in_states[None, :], other=0.0)
        dH = tl.load(
            dstates_ptr + p[None, :] * (4 * N) + k[:, None], mask=in_states[:, None] & in_channels, other=0.0
        )
        dS = _add_product(dS, keys, dH, PRECISION)
    t = (row % num_chunks) * CHUNK + offset[:, None]
    inside = (t < length) & in_channels
    batch = row // num_chunks
    if HAS_D:
        D = tl.load(D_ptr + channel[None, :], mask=in_channels, other=0.0).to(tl.float32)
        real = tl.load(dy_ptr + 4 * offset[:, None] * width + channel[None, :], mask=in_channels, other=0.0)
        real = real.to(tl.float32)
        place = batch * S_batch + t * S_time + group * S_group + p[None, :] * S_channel
        S = tl.load(S_ptr + place, mask=inside, other=0.0).to(tl.float32)
        dS += D * real
        tl.store(dD_ptr + row * width + channel, tl.sum(real * S, 0), mask=p < P)
    place = (batch * length + t) * width + channel[None, :]
    tl.store(dS_ptr + place, dS.to(dS_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _load_chosen(ptr, level, chosen):
    """What is chosen of a tile, for a loop over levels; its lines are read whole."""
    tile = tl.load(ptr, mask=tl.full(chosen.shape, level, tl.int32) > 0, other=0.0)
    return tl.where(chosen, tile, 0.0)


@triton.jit
def _operand_backward_kernel(
    q_ptr,
    turn_ptr,
    log_ptr,
    B_hat_ptr,
    C_hat_ptr,
    dkernel_ptr,
    dreading_ptr,
    dkeys_ptr,
    dturn_ptr,
    dq_ptr,
    dB_ptr,
    dC_ptr,
    length,
    num_chunks,
    num_groups,
    q_batch,
    q_time,
    q_group,
    q_state,
    q_component,
    dq_batch,
    dq_time,
    dq_group,
    dq_state,
    dq_component,
    dB_batch,
    dB_time,
    dB_group,
    dB_state,
    dB_component,
    dC_batch,
    dC_time,
    dC_group,
    dC_state,
    dC_component,
    N: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    LEVELS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of q, B and C of a chunk, from those of K, ``reading`` and keys; ``w`` is the turn of a q."""
    row = tl.program_id(1).to(tl.int64)
    group = tl.program_id(2)
    block = row * num_groups + group
    offset = tl.arange(0, CHUNK)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = (offset[:, None] >= 0) & (n[None, :] < N)
    dtype: tl.constexpr = dkernel_ptr.dtype.element_ty
    # Scalars to 64 bits, so that offsets within a chunk take 32.
    log_ptr += block * CHUNK * N
    turn_ptr += block * 4 * CHUNK * N
    B_hat_ptr += block * 4 * CHUNK * N
    C_hat_ptr += block * 4 * CHUNK * N
    dkernel_ptr += block * 4 * CHUNK * CHUNK
    dreading_ptr += block * 16 * CHUNK * N
    dkeys_ptr += block * CHUNK * 4 * N
    dturn_ptr += block * 4 * N
    place = offset[:, None] * N + n[None, :]
    # r = 0: K_ts, its diagonal, and what multiplies H_0
    pairs = offset[:, None] * (4 * CHUNK) + offset[None, :]
    diagonal = offset[:, None] * (4 * CHUNK + 1)
    blocks = offset[:, None] * (16 * N) + n[None, :]
    log = tl.load(log_ptr + place, mask=mask, other=0.0)
    w0, w1, w2, w3 = load_quaternion(dturn_ptr, n[None, :] + offset[:, None] * 0, N, mask)
    batch = row // num_chunks
    t = (row % num_chunks) * CHUNK + offset[:, None]
    inside = mask & (t < length)

    # Queries first, then keys: both at once would not fit into registers. Nor would what the loops load, were
    # it loaded before them: masks that depend on the level keep loads where they are.
    C0, C1, C2, C3 = load_quaternion(C_hat_ptr, place, CHUNK * N, mask)
    since = tl.exp2(log)
    a0, a1, a2, a3 = load_quaternion(dreading_ptr, blocks, N, mask)
    g0, g1, g2, g3 = a0, -a1, -a2, -a3
    a0, a1, a2, a3 = load_quaternion(dreading_ptr, blocks + 4 * N, N, mask)
    g0, g1, g2, g3 = g0 + a1, g1 + a0, g2 + a3, g3 - a2
    a0, a1, a2, a3 = load_quaternion(dreading_ptr, blocks + 8 * N, N, mask)
    g0, g1, g2, g3 = g0 + a2, g1 - a3, g2 + a0, g3 + a1
    a0, a1, a2, a3 = load_quaternion(dreading_ptr, blocks + 12 * N, N, mask)
    g0, g1, g2, g3 = (g0 + a3) * since, (g1 + a2) * since, (g2 - a1) * since, (g3 + a0) * since
    k0, k1, k2, k3 = load_quaternion(dkernel_ptr, diagonal, CHUNK, offset[:, None] >= 0)
    B0, B1, B2, B3 = load_quaternion(B_hat_ptr, place, CHUNK * N, mask)
    later = (offset[:, None] <= offset[None, :]).to(dtype)
    e0, e1, e2, e3 = hamilton(C0, -C1, -C2, -C3, g0, g1, g2, g3)
    w0 = _add_sum(w0, later, e0)
    w1 = _add_sum(w1, later, e1)
    w2 = _add_sum(w2, later, e2)
    w3 = _add_sum(w3, later, e3)
    x0, x1, x2, x3 = hamilton(k0, k1, k2, k3, B0, -B1, -B2, -B3)
    g0, g1, g2, g3 = g0 + x0, g1 + x1, g2 + x2, g3 + x3
    for level in range(1, LEVELS + 1):
        here = mask & (tl.full([CHUNK, BLOCK], level, tl.int32) > 0)
        scale = _level_scale(log_ptr, log, level, offset, n, mask, N)
        b0, b1, b2, b3 = load_quaternion(B_hat_ptr, place, CHUNK * N, here)
        b0, b1 = (b0 * scale).to(dtype), (b1 * scale).to(dtype)
        b2, b3 = (b2 * scale).to(dtype), (b3 * scale).to(dtype)
        chosen = _pairs(level, offset[:, None], offset[None, :])
        zero = tl.zeros([CHUNK, BLOCK], tl.float32)
        dK = _load_chosen(dkernel_ptr + pairs, level, chosen)
        x0 = _add_product(zero, dK, b0, PRECISION)
        x1 = _add_product(zero, dK, -b1, PRECISION)
        x2 = _add_product(zero, dK, -b2, PRECISION)
        x3 = _add_product(zero, dK, -b3, PRECISION)
        dK = _load_chosen(dkernel_ptr + pairs + CHUNK, level, chosen)
        x1 = _add_product(x1, dK, b0, PRECISION)
        x0 = _add_product(x0, dK, b1, PRECISION)
        x3 = _add_product(x3, dK, -b2, PRECISION)
        x2 = _add_product(x2, dK, b3, PRECISION)
        dK = _load_chosen(dkernel_ptr + pairs + 2 * CHUNK, level, chosen)
        x2 = _add_product(x2, dK, b0, PRECISION)
        x3 = _add_product(x3, dK, b1, PRECISION)
        x0 = _add_product(x0, dK, b2, PRECISION)
        x1 = _add_product(x1, dK, -b3, PRECISION)
        dK = _load_chosen(dkernel_ptr + pairs + 3 * CHUNK, level, chosen)
        x3 = _add_product(x3, dK, b0, PRECISION)
        x2 = _add_product(x2, dK, -b1, PRECISION)
        x1 = _add_product(x1, dK, b2, PRECISION)
        x0 = _add_product(x0, dK, b3, PRECISION)
        x0, x1, x2, x3 = x0 * scale, x1 * scale, x2 * scale, x3 * scale
        g0, g1, g2, g3 = g0 + x0, g1 + x1, g2 + x2, g3 + x3
        # Queries are in right halves: sums over the later steps of their own half.
        later = (_same_half(level, offset) & (offset[:, None] <= offset[None, :])).to(dtype)
        C0, C1, C2, C3 = load_quaternion(C_hat_ptr, place, CHUNK * N, here)
        e0, e1, e2, e3 = hamilton(C0, -C1, -C2, -C3, x0, x1, x2, x3)
        w0 = _add_sum(w0, later, e0)
        w1 = _add_sum(w1, later, e1)
        w2 = _add_sum(w2, later, e2)
        w3 = _add_sum(w3, later, e3)
    u0, u1, u2, u3 = load_quaternion(turn_ptr, place, CHUNK * N, mask)
    x0, x1, x2, x3 = hamilton(g0, g1, g2, g3, u0, -u1, -u2, -u3)
    target = batch * dC_batch + t * dC_time + group * dC_group + n[None, :] * dC_state
    store_quaternion(dC_ptr, target, dC_component, x0, x1, x2, x3, inside)

    B0, B1, B2, B3 = load_quaternion(B_hat_ptr, place, CHUNK * N, mask)
    log_total = tl.load(log_ptr + (CHUNK - 1) * N + n, mask=n < N, other=0.0)
    remaining = tl.exp2(log_total[None, :] - log)
    keys = offset[:, None] * (4 * N) + n[None, :]
    g0, g1, g2, g3 = load_quaternion(dkeys_ptr, keys, N, mask)
    g0, g1, g2, g3 = g0 * remaining, g1 * remaining, g2 * remaining, g3 * remaining
    earlier = (offset[:, None] > offset[None, :]).to(dtype)
    e0, e1, e2, e3 = hamilton(g0, g1, g2, g3, B0, -B1, -B2, -B3)
    w0 = _add_sum(w0, earlier, e0)
    w1 = _add_sum(w1, earlier, e1)
    w2 = _add_sum(w2, earlier, e2)
    w3 = _add_sum(w3, earlier, e3)
    # [s, t] of r = 0
    flipped = offset[None, :] * (4 * CHUNK) + offset[:, None]
    k0, k1, k2, k3 = load_quaternion(dkernel_ptr, diagonal, CHUNK, offset[:, None] >= 0)
    C0, C1, C2, C3 = load_quaternion(C_hat_ptr, place, CHUNK * N, mask)
    x0, x1, x2, x3 = hamilton(C0, -C1, -C2, -C3, k0, k1, k2, k3)
    g0, g1, g2, g3 = g0 + x0, g1 + x1, g2 + x2, g3 + x3
    for level in range(1, LEVELS + 1):
        here = mask & (tl.full([CHUNK, BLOCK], level, tl.int32) > 0)
        scale = _level_scale(log_ptr, log, level, offset, n, mask, N)
        c0, c1, c2, c3 = load_quaternion(C_hat_ptr, place, CHUNK * N, here)
        c0, c1 = (c0 * scale).to(dtype), (c1 * scale).to(dtype)
        c2, c3 = (c2 * scale).to(dtype), (c3 * scale).to(dtype)
        chosen = _pairs(level, offset[None, :], offset[:, None])
        zero = tl.zeros([CHUNK, BLOCK], tl.float32)
        dK = _load_chosen(dkernel_ptr + flipped, level, chosen)
        x0 = _add_product(zero, dK, c0, PRECISION)
        x1 = _add_product(zero, dK, -c1, PRECISION)
        x2 = _add_product(zero, dK, -c2, PRECISION)
        x3 = _add_product(zero, dK, -c3, PRECISION)
        dK = _load_chosen(dkernel_ptr + flipped + CHUNK, level, chosen)
        x0 = _add_product(x0, dK, c1, PRECISION)
        x1 = _add_product(x1, dK, c0, PRECISION)
        x2 = _add_product(x2, dK, -c3, PRECISION)
        x3 = _add_product(x3, dK, c2, PRECISION)
        dK = _load_chosen(dkernel_ptr + flipped + 2 * CHUNK, level, chosen)
        x0 = _add_product(x0, dK, c2, PRECISION)
        x1 = _add_product(x1, dK, c3, PRECISION)
        x2 = _add_product(x2, dK, c0, PRECISION)
        x3 = _add_product(x3, dK, -c1, PRECISION)
        dK = _load_chosen(dkernel_ptr + flipped + 3 * CHUNK, level, chosen)
        x0 = _add_product(x0, dK, c3, PRECISION)
        x1 = _add_product(x1, dK, -c2, PRECISION)
        x2 = _add_product(x2, dK, c1, PRECISION)
        x3 = _add_product(x3, dK, c0, PRECISION)
        x0, x1, x2, x3 = x0 * scale, x1 * scale, x2 * scale, x3 * scale
        g0, g1, g2, g3 = g0 + x0, g1 + x1, g2 + x2, g3 + x3
        earlier = (_same_half(level, offset) & (offset[:, None] > offset[None, :])).to(dtype)
        B0, B1, B2, B3 = load_quaternion(B_hat_ptr, place, CHUNK * N, here)
        e0, e1, e2, e3 = hamilton(x0, x1, x2, x3, B0, -B1, -B2, -B3)
        w0 = _add_sum(w0, earlier, e0)
        w1 = _add_sum(w1, earlier, e1)
        w2 = _add_sum(w2, earlier, e2)
        w3 = _add_sum(w3, earlier, e3)
    u0, u1, u2, u3 = load_quaternion(turn_ptr, place, CHUNK * N, mask)
    x0, x1, x2, x3 = hamilton(u0, u1, u2, u3, g0, g1, g2, g3)
    target = batch * dB_batch + t * dB_time + group * dB_group + n[None, :] * dB_state
    store_quaternion(dB_ptr, target, dB_component, x0, x1, x2, x3, inside)

    x0, x1, x2, x3 = hamilton(u0, u1, u2, u3, w0, w1, w2, w3)
    x0, x1, x2, x3 = hamilton(x0, x1, x2, x3, u0, -u1, -u2, -u3)
    source = batch * q_batch + t * q_time + group * q_group + n[None, :] * q_state
    q0, q1, q2, q3 = load_quaternion(q_ptr, source, q_component, inside)
    square = tl.maximum(q0 * q0 + q1 * q1 + q2 * q2 + q3 * q3, SMALLEST_SQUARE)
    x0, x1, x2, x3 = hamilton(x0, x1, x2, x3, q0 / square, q1 / square, q2 / square, q3 / square)
    target = batch * dq_batch + t * dq_time + group * dq_group + n[None, :] * dq_state
    store_quaternion(dq_ptr, target, dq_component, x0, x1, x2, x3, inside)


@dataclass(frozen=True)
class _Shape:
    """Sizes of one call; ``rows`` are the chunks of all sequences."""

    batch: int
    length: int
    groups: int
    channels: int
    states: int
    dtype: torch.dtype

    @property
    def chunk(self) -> int:
        return min(CHUNK, max(16, int(triton.next_power_of_2(self.length))))

    @property
    def num_chunks(self) -> int:
        return -(-self.length // self.chunk)

    @property
    def rows(self) -> int:
        return self.batch * self.num_chunks

    @property
    def levels(self) -> int:
        return self.chunk.bit_length() - 1

    @property
    def precision(self) -> str:
        """Three TF32 products give float32's precision on tensor cores."""
        return "tf32x3" if self.dtype == torch.float32 else "ieee"


@dataclass(frozen=True)
class _Prefix:
    """What ``_prefix_kernel`` makes; see there."""

    turn: Tensor
    log: Tensor
    B_hat: Tensor
    C_hat: Tensor
    keys: Tensor
    reading: Tensor
    total: Tensor


def _block(size: int, most: int) -> int:
    """A power of two for a tile that is no larger than it must be, of at least 16."""
    return min(most, max(16, int(triton.next_power_of_2(size))))


def _prefix(q: Tensor, B: Tensor, C: Tensor, shape: _Shape) -> _Prefix:
    s = shape
    outer = (s.rows, s.groups)
    inner = (s.chunk, s.states)

    def empty(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*outer, *sizes, dtype=dtype, device=q.device)

    found = _Prefix(
        turn=empty(4, *inner),
        log=empty(*inner),
        B_hat=empty(4, *inner, dtype=s.dtype),
        C_hat=empty(4, *inner, dtype=s.dtype),
        keys=empty(s.chunk, 4 * s.states, dtype=s.dtype),
        reading=empty(4 * s.chunk, 4 * s.states, dtype=s.dtype),
        total=empty(5, s.states),
    )
    block = _block(s.states, 16)
    _prefix_kernel[(triton.cdiv(s.states, block), *outer)](
        q,
        B,
        C,
        found.turn,
        found.log,
        found.B_hat,
        found.C_hat,
        found.keys,
        found.reading,
        found.total,
        s.length,
        s.num_chunks,
        s.groups,
        *q.stride(),
        *B.stride(),
        *C.stride(),
        N=s.states,
        CHUNK=s.chunk,
        BLOCK=block,
        num_warps=8,
    )
    return found


def _kernel(prefix: _Prefix, shape: _Shape) -> Tensor:
    """K of every chunk, [rows, G, 4 Q, Q]."""
    s = shape
    kernel = prefix.reading.new_empty(s.rows, s.groups, 4 * s.chunk, s.chunk)
    _kernel_kernel[(s.rows, s.groups)](
        prefix.B_hat,
        prefix.C_hat,
        prefix.log,
        kernel,
        s.groups,
        N=s.states,
        CHUNK=s.chunk,
        BLOCK=_block(s.states, 32),
        LEVELS=s.levels,
        PRECISION=s.precision,
        num_warps=8,
        num_stages=1,
    )
    return kernel


def _states(S: Tensor, start: Tensor | None, prefix: _Prefix, shape: _Shape) -> tuple[Tensor, Tensor]:
    """H before every chunk, [rows, G, P, 4 N], and the state at the end, [batch, G, P, 4, N]."""
    s = shape
    states = torch.empty(s.rows, s.groups, s.channels, 4 * s.states, dtype=s.dtype, device=S.device)
    end = torch.empty(s.batch, s.groups, s.channels, 4, s.states, dtype=torch.float32, device=S.device)
    channels, block = 64, 16
    grid = (triton.cdiv(s.states, block), triton.cdiv(s.channels, channels), s.batch * s.groups)
    _state_kernel[grid](
        S,
        prefix.keys,
        prefix.total,
        start,
        states,
        end,
        s.length,
        s.num_chunks,
        s.groups,
        s.channels,
        *S.stride(),
        N=s.states,
        CHUNK=s.chunk,
        CHANNELS=channels,
        STATES=block,
        HAS_START=start is not None,
        PRECISION=s.precision,
        num_warps=4,
        num_stages=3,
    )
    return states, end


def _outputs(
    S: Tensor, states: Tensor, D: Tensor | None, kernel: Tensor, prefix: _Prefix, shape: _Shape
) -> Tensor:
    """y [batch, whole chunks, 4, G P]."""
    s = shape
    y = S.new_empty(s.batch, s.num_chunks * s.chunk, 4, s.groups * s.channels)
    rows, columns = min(128, 4 * s.chunk), 128
    tiles = 4 * s.chunk // rows * triton.cdiv(s.channels, columns)
    _output_kernel[(tiles, s.rows, s.groups)](
        kernel,
        prefix.reading,
        S,
        states,
        D,
        y,
        s.length,
        s.num_chunks,
        s.groups,
        s.channels,
        *S.stride(),
        N=s.states,
        CHUNK=s.chunk,
        ROWS=rows,
        COLUMNS=columns,
        INNER=_block(4 * s.states, 64),
        HAS_D=D is not None,
        PRECISION=s.precision,
        num_warps=4,
        num_stages=2,
    )
    return y


CARRY_CHANNELS, CARRY_STATES, CARRY_WARPS = 16, 32, 4
"""Tile and warps of a program of the carry kernel: the fastest of nine on an H200."""


def _carry_backward(
    states: Tensor, dstates: Tensor, dend: Tensor | None, prefix: _Prefix, shape: _Shape
) -> tuple[Tensor, Tensor]:
    """Carry the gradient of the states, in place; that of the first [batch, G, P, 4, N], and ``dturn``."""
    s = shape
    channels, block = CARRY_CHANNELS, _block(s.states, CARRY_STATES)
    grid = (triton.cdiv(s.states, block), triton.cdiv(s.channels, channels), s.batch * s.groups)
    dstart = dstates.new_empty(s.batch, s.groups, s.channels, 4, s.states, dtype=torch.float32)
    dturn = dstates.new_empty(grid[1], s.rows, s.groups, 4, s.states, dtype=torch.float32)
    _carry_backward_kernel[grid](
        states,
        dstates,
        prefix.total,
        dend,
        dstart,
        dturn,
        s.num_chunks,
        s.groups,
        s.channels,
        N=s.states,
        CHANNELS=channels,
        STATES=block,
        HAS_END=dend is not None,
        num_warps=CARRY_WARPS,
    )
    return dstart, dturn.sum(0)


def _values_backward(
    S: Tensor, D: Tensor | None, dy: Tensor, dstates: Tensor, kernel: Tensor, prefix: _Prefix, shape: _Shape
) -> tuple[Tensor, Tensor | None]:
    """dS and dD."""
    s = shape
    width = s.groups * s.channels
    dS = S.new_empty(s.batch, s.length, s.groups, s.channels)
    dD = None if D is None else S.new_empty(s.rows, width, dtype=torch.float32)
    columns = 128
    _values_backward_kernel[(triton.cdiv(s.channels, columns), s.rows, s.groups)](
        kernel,
        prefix.keys,
        dy,
        dstates,
        S,
        D,
        dS,
        dD,
        s.length,
        s.num_chunks,
        s.groups,
        s.channels,
        *S.stride(),
        N=s.states,
        CHUNK=s.chunk,
        COLUMNS=columns,
        INNER=_block(4 * min(s.states, s.chunk), 64),
        HAS_D=D is not None,
        PRECISION=s.precision,
        num_warps=4,
        num_stages=3,
    )
    return dS, None if dD is None or D is None else dD.sum(0).view_as(D).to(D.dtype)


def _padded(x: Tensor, shape: _Shape) -> Tensor:
    """[batch, T, ., .] with zeros up to whole chunks; nothing is copied if it has them."""
    padding = shape.num_chunks * shape.chunk - shape.length
    return F.pad(x, (0, 0, 0, 0, 0, padding)) if padding else x


def _planes(state: Tensor) -> Tensor:
    """A state [batch, G, P, N, 4] as [batch, G, P, 4, N], dense."""
    return state.transpose(-1, -2).contiguous()


class _QuaternionScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        B: Tensor,
        C: Tensor,
        S: Tensor,
        D: Tensor | None,
        initial_state: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        batch, length, groups, channels = S.shape
        s = _Shape(batch, length, groups, channels, q.shape[3], S.dtype)
        start = None if initial_state is None else _planes(initial_state)
        skip = None if D is None else D.contiguous()
        with device_of(S):
            prefix = _prefix(q, B, C, s)
            states, end = _states(S, start, prefix, s)
            kernel = _kernel(prefix, s)
            y = _outputs(S, states, skip, kernel, prefix, s)
        # K is small and slow to make; the states are the opposite.
        ctx.save_for_backward(q, B, C, S, skip, start, kernel)
        ctx.shape = s
        ctx.state_dtype = None if initial_state is None else initial_state.dtype
        ctx.set_materialize_grads(False)
        output = y.unflatten(-1, (groups, channels))[:, :length].permute(0, 1, 3, 4, 2)
        return output, end.transpose(-1, -2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        q, B, C, S, D, start, kernel = ctx.saved_tensors
        s: _Shape = ctx.shape
        if gradients[0] is None:
            dy = S.new_zeros(s.batch, s.num_chunks * s.chunk, 4, s.groups * s.channels)
        else:
            dy = _padded(gradients[0].permute(0, 1, 4, 2, 3).flatten(3), s).contiguous()
        dend = None if gradients[1] is None else _planes(gradients[1])
        with device_of(S), torch.autocast(S.device.type, enabled=False):
            prefix = _prefix(q, B, C, s)
            states, _ = _states(S, start, prefix, s)
            values = _padded(S, s).reshape(s.rows, s.chunk, s.groups, s.channels)
            given = dy.view(s.rows, 4 * s.chunk, s.groups, s.channels)
            dkernel, dreading = torch.empty_like(kernel), torch.empty_like(prefix.reading)
            dstates, dkeys = torch.empty_like(states), torch.empty_like(prefix.keys)
            for g in range(s.groups):
                torch.bmm(given[:, :, g], values[:, :, g].transpose(1, 2), out=dkernel[:, g])
                torch.bmm(given[:, :, g], states[:, g], out=dreading[:, g])
                torch.bmm(given[:, :, g].transpose(1, 2), prefix.reading[:, g], out=dstates[:, g])
            dstart, dturn = _carry_backward(states, dstates, dend, prefix, s)
            for g in range(s.groups):
                torch.bmm(values[:, :, g], dstates[:, g], out=dkeys[:, g])
            dS, dD = _values_backward(S, D, dy, dstates, kernel, prefix, s)
            dq, dB, dC = torch.empty_like(q), torch.empty_like(B), torch.empty_like(C)
            block = 16
            _operand_backward_kernel[(triton.cdiv(s.states, block), s.rows, s.groups)](
                q,
                prefix.turn,
                prefix.log,
                prefix.B_hat,
                prefix.C_hat,
                dkernel,
                dreading,
                dkeys,
                dturn,
                dq,
                dB,
                dC,
                s.length,
                s.num_chunks,
                s.groups,
                *q.stride(),
                *dq.stride(),
                *dB.stride(),
                *dC.stride(),
                N=s.states,
                CHUNK=s.chunk,
                BLOCK=block,
                LEVELS=s.levels,
                PRECISION=s.precision,
                num_warps=4,
                num_stages=1,
            )
        if start is not None:
            dstart = dstart.transpose(-1, -2).to(ctx.state_dtype)
        return dq, dB, dC, dS, dD, None if start is None else dstart


def quaternion_scan_reference(
    q: Tensor,
    B: Tensor,
    C: Tensor,
    S: Tensor,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition of ``quaternion_scan``, one step after the other; float64 stays float64."""
    wide = torch.promote_types(S.dtype, torch.float32)
    factors, keys, queries, values = (v.to(wide) for v in (q, B, C, S))
    batch, length, groups, channels = S.shape
    state = values.new_zeros(batch, groups, channels, q.shape[3], 4)
    if initial_state is not None:
        state = initial_state.to(wide)
    outputs = []
    for t in range(length):
        update = values[:, t, :, :, None, None] * keys[:, t, :, None]
        state = quaternion_product_reference(factors[:, t, :, None], state) + update
        outputs.append(quaternion_product_reference(queries[:, t, :, None], state).sum(3))
    y = torch.stack(outputs, 1)
    if D is not None:
        y = torch.cat([y[..., :1] + (D.to(wide) * values)[..., None], y[..., 1:]], -1)
    return y.to(S.dtype), state


def quaternion_scan(
    q: Tensor,
    B: Tensor,
    C: Tensor,
    S: Tensor,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """h_t = q_t h_{t-1} + B_t S_t; y_t = sum_k C_t,k h_t,k + D S_t, in Hamilton products from the left.

    Products of bfloat16 and float16 inputs run on tensor cores, with float32 sums; states between chunks and
    what chunks add to them are rounded to the dtype of ``S``. float64 inputs and CPU tensors use
    ``quaternion_scan_reference``. Memory of q, B and C in planes, [..., 4, N] under these shapes, is read
    fastest.

    Args:
        q: [batch, T, G, N, 4], of any float dtype, |q| <= 1; float32 keeps slow decays apart from none.
        B, C: [batch, T, G, N, 4], of any float dtype.
        S: real channels [batch, T, G, P]; bfloat16, float16, float32 or float64.
        D: skip weights [G, P], to the real component; nothing if not given.
        initial_state: [batch, G, P, N, 4]; zero if not given.

    Returns:
        y [batch, T, G, P, 4] of the dtype of ``S``, in memory [batch, T, 4, G, P], and the final state
        [batch, G, P, N, 4], float32 (float64 for float64 inputs). Both have gradients to every argument.

    Raises:
        ValueError: shapes or devices do not fit.
    """
    if q.ndim != 5 or S.ndim != 4 or 0 in (*q.shape, *S.shape):
        raise ValueError(
            f"q has shape {tuple(q.shape)} and S {tuple(S.shape)}; give [batch, T, G, N, 4] and "
            "[batch, T, G, P], none of them 0"
        )
    batch, length, groups, channels = S.shape
    states = q.shape[3]
    expected: list[tuple[str, Tensor | None, tuple[int, ...]]] = [
        ("q", q, (batch, length, groups, states, 4)),
        ("B", B, (batch, length, groups, states, 4)),
        ("C", C, (batch, length, groups, states, 4)),
        ("D", D, (groups, channels)),
        ("initial_state", initial_state, (batch, groups, channels, states, 4)),
    ]
    check_operands(S, expected)
    if not runs_on_triton(S):
        return quaternion_scan_reference(q, B, C, S, D, initial_state)
    result: tuple[Tensor, Tensor] = _QuaternionScan.apply(q, B, C, S, D, initial_state)
    return result
