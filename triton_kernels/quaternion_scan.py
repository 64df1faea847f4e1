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
itself. So the scan is bound by operations; its large products are cuBLAS': [K | C P] times [S; H] for y, B^
times S for the state, and in backward the four products that are their gradients. The kernels make their
operands and carry the state through the chunks:

1. ``_prefix_kernel``: U, l, C^, B^, and what is made of them.
2. ``_kernel_kernel``: K.
3. ``_carry_kernel``: the state before each chunk, H' = U_Q (2^l_Q H + sum_s 2^(l_Q - l_s) B^_s S_s).
4. ``_carry_backward_kernel``: the gradient of the state after each chunk.
5. ``_operand_backward_kernel``: those of q, B and C.

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
def _prefix_kernel(
    q_ptr,
    B_ptr,
    C_ptr,
    turn_ptr,
    log_ptr,
    B_hat_ptr,
    C_hat_ptr,
    keys_ptr,
    operand_ptr,
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
    """Of a chunk and group: U, l, C^, B^; keys 2^(l_Q - l_s) B^; 2^l_t C^ as the 4 x 4 blocks of the operand
    [t, r, Q + 4 N], which multiply the components of H; (U_Q, 2^l_Q)."""
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
    width: tl.constexpr = CHUNK + 4 * N
    blocks = (block * CHUNK + offset[:, None]) * 4 * width + CHUNK + n[None, :]
    store_quaternion(operand_ptr, blocks, N, c0, -c1, -c2, -c3, in_states)
    store_quaternion(operand_ptr, blocks + width, N, c1, c0, -c3, c2, in_states)
    store_quaternion(operand_ptr, blocks + 2 * width, N, c2, c3, c0, -c1, in_states)
    store_quaternion(operand_ptr, blocks + 3 * width, N, c3, -c2, c1, c0, in_states)


@triton.jit
def _pairs(level, t, s):
    """Whether steps t and s part at a block of 2^level steps, t right and s left; level 0: t = s."""
    half = 1 << tl.maximum(level - 1, 0)
    parted = (t // half == s // half + 1) & ((s // half) % 2 == 0)
    return ((level == 0) & (t == s)) | ((level > 0) & parted)


@triton.jit
def _same_half(level, offset):
    """Whether two steps are in the same half of a block of 2^level steps; never on level 0."""
    half = 1 << tl.maximum(level - 1, 0)
    return (offset[:, None] // half == offset[None, :] // half) & (level > 0)


@triton.jit
def _level_scales(log_ptr, level, offset, n, mask, N: tl.constexpr):
    """2^(l_t - l_b) of queries, b the end of the half before; 2^(l_b - l_s) of keys, b that of their own."""
    log = tl.load(log_ptr + offset[:, None] * N + n[None, :], mask=mask, other=0.0)
    half = 1 << tl.maximum(level - 1, 0)
    begin = (offset // half) * half
    apart = mask & (level > 0)
    before = tl.load(
        log_ptr + (begin - 1)[:, None] * N + n[None, :], mask=apart & (begin > 0)[:, None], other=0.0
    )
    end = tl.load(log_ptr + (begin + half - 1)[:, None] * N + n[None, :], mask=apart, other=0.0)
    queries = tl.where(apart, tl.exp2(log - before), 1.0)
    keys = tl.where(apart, tl.exp2(end - log), 1.0)
    return queries, keys


@triton.jit
def _kernel_kernel(
    B_hat_ptr,
    C_hat_ptr,
    log_ptr,
    operand_ptr,
    num_groups,
    N: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    LEVELS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Component r of K_ts: the first Q columns of the operand. K_r = sum_c +-C^_(r xor c) B^_c."""
    r = tl.program_id(0)
    block = tl.program_id(1).to(tl.int64) * num_groups + tl.program_id(2)
    offset = tl.arange(0, CHUNK)
    log_ptr += block * CHUNK * N
    B_hat_ptr += block * 4 * CHUNK * N
    C_hat_ptr += block * 4 * CHUNK * N
    dtype: tl.constexpr = operand_ptr.dtype.element_ty
    K = tl.zeros([CHUNK, CHUNK], tl.float32)
    for level in range(LEVELS + 1):
        part = tl.zeros([CHUNK, CHUNK], tl.float32)
        for first in range(0, N, BLOCK):
            n = first + tl.arange(0, BLOCK)
            mask = (offset[:, None] >= 0) & (n[None, :] < N)
            queries, keys = _level_scales(log_ptr, level, offset, n, mask, N)
            place = offset[:, None] * N + n[None, :]
            for c in tl.static_range(4):
                negative = ((r == 0) & (c > 0)) | ((c > 0) & (r > 0) & (c == r % 3 + 1))
                sign = tl.where(negative, -1.0, 1.0)
                C = tl.load(C_hat_ptr + place + (r ^ c) * CHUNK * N, mask=mask, other=0.0).to(tl.float32)
                B = tl.load(B_hat_ptr + place + c * CHUNK * N, mask=mask, other=0.0).to(tl.float32)
                C = (C * (queries * sign)).to(dtype)
                B = (B * keys).to(dtype)
                part = tl.dot(C, tl.trans(B), part, input_precision=PRECISION)
        K += tl.where(_pairs(level, offset[:, None], offset[None, :]), part, 0.0)
    width: tl.constexpr = CHUNK + 4 * N
    place = (block * CHUNK + offset[:, None]) * 4 * width + r * width + offset[None, :]
    tl.store(operand_ptr + place, K.to(dtype))


@triton.jit
def _carry_kernel(
    states_ptr,
    total_ptr,
    start_ptr,
    end_ptr,
    num_chunks,
    num_groups,
    P,
    N: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HAS_START: tl.constexpr,
):
    """What each chunk adds, [4, N, P] below the S of a chunk, becomes the state before it."""
    batch = (tl.program_id(2) // num_groups).to(tl.int64)
    group = tl.program_id(2) % num_groups
    n = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    p = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (n[:, None] < N) & (p[None, :] < P)
    outer = (batch * num_groups + group) * 4 * N * P + n[:, None].to(tl.int64) * P + p[None, :]
    zero = tl.zeros([ROWS, COLUMNS], tl.float32)
    h0, h1, h2, h3 = zero, zero, zero, zero
    if HAS_START:
        h0, h1, h2, h3 = load_quaternion(start_ptr, outer, N * P, mask)
    for chunk in range(num_chunks):
        block = (batch * num_chunks + chunk) * num_groups + group
        place = (block * (CHUNK + 4 * N) + CHUNK + n[:, None]) * P + p[None, :]
        a0, a1, a2, a3 = load_quaternion(states_ptr, place, N * P, mask)
        total = block * 5 * N + n[:, None]
        u0, u1, u2, u3 = load_quaternion(total_ptr, total, N, n[:, None] < N)
        kept = tl.load(total_ptr + total + 4 * N, mask=n[:, None] < N, other=0.0)
        store_quaternion(states_ptr, place, N * P, h0, h1, h2, h3, mask)
        h0, h1, h2, h3 = hamilton(
            u0, u1, u2, u3, kept * h0 + a0, kept * h1 + a1, kept * h2 + a2, kept * h3 + a3
        )
    store_quaternion(end_ptr, outer, N * P, h0, h1, h2, h3, mask)


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
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HAS_END: tl.constexpr,
):
    """The gradient of each state by what it is read for becomes that of what the chunk after it adds.

    With g that of the state after the chunk, this is U*_Q g; the state before it gets 2^l_Q of that more, and
    a turn of all q of the chunk 2^l_Q sum_p U*_Q g H*, of which ``dturn`` gets the part of this program's
    channels.
    """
    batch = (tl.program_id(2) // num_groups).to(tl.int64)
    group = tl.program_id(2) % num_groups
    n = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    p = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (n[:, None] < N) & (p[None, :] < P)
    outer = (batch * num_groups + group) * 4 * N * P + n[:, None].to(tl.int64) * P + p[None, :]
    zero = tl.zeros([ROWS, COLUMNS], tl.float32)
    g0, g1, g2, g3 = zero, zero, zero, zero
    if HAS_END:
        g0, g1, g2, g3 = load_quaternion(dend_ptr, outer, N * P, mask)
    batches = tl.num_programs(2) // num_groups
    for i in range(num_chunks):
        chunk = num_chunks - 1 - i
        block = (batch * num_chunks + chunk) * num_groups + group
        place = (block * (CHUNK + 4 * N) + CHUNK + n[:, None]) * P + p[None, :]
        h0, h1, h2, h3 = load_quaternion(states_ptr, place, N * P, mask)
        d0, d1, d2, d3 = load_quaternion(dstates_ptr, place, N * P, mask)
        total = block * 5 * N + n[:, None]
        u0, u1, u2, u3 = load_quaternion(total_ptr, total, N, n[:, None] < N)
        kept = tl.load(total_ptr + total + 4 * N, mask=n[:, None] < N, other=0.0)
        g0, g1, g2, g3 = hamilton(u0, -u1, -u2, -u3, g0, g1, g2, g3)
        store_quaternion(dstates_ptr, place, N * P, g0, g1, g2, g3, mask)
        g0, g1, g2, g3 = kept * g0, kept * g1, kept * g2, kept * g3
        t0, t1, t2, t3 = hamilton(g0, g1, g2, g3, h0, -h1, -h2, -h3)
        part = tl.program_id(0).to(tl.int64) * batches * num_chunks * num_groups + block
        store_quaternion(
            dturn_ptr,
            part * 4 * N + n,
            N,
            tl.sum(t0, 1),
            tl.sum(t1, 1),
            tl.sum(t2, 1),
            tl.sum(t3, 1),
            n < N,
        )
        g0, g1, g2, g3 = g0 + d0, g1 + d1, g2 + d2, g3 + d3
    store_quaternion(dstart_ptr, outer, N * P, g0, g1, g2, g3, mask)


@triton.jit
def _add_product(acc, a, b, PRECISION: tl.constexpr):
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _operand_backward_kernel(
    q_ptr,
    turn_ptr,
    log_ptr,
    B_hat_ptr,
    C_hat_ptr,
    doperand_ptr,
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
    SUM_PRECISION: tl.constexpr,
):
    """Gradients of q, B and C of one chunk, from those of the operands; ``w`` is the turn of each q."""
    row = tl.program_id(1).to(tl.int64)
    group = tl.program_id(2)
    block = row * num_groups + group
    offset = tl.arange(0, CHUNK)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = (offset[:, None] >= 0) & (n[None, :] < N)
    width: tl.constexpr = CHUNK + 4 * N
    dtype: tl.constexpr = doperand_ptr.dtype.element_ty
    # Scalars to 64 bits, so that offsets within a chunk take 32.
    log_ptr += block * CHUNK * N
    turn_ptr += block * 4 * CHUNK * N
    B_hat_ptr += block * 4 * CHUNK * N
    C_hat_ptr += block * 4 * CHUNK * N
    doperand_ptr += block * CHUNK * 4 * width
    dkeys_ptr += block * CHUNK * 4 * N
    dturn_ptr += block * 4 * N
    place = offset[:, None] * N + n[None, :]
    # component 0 of the gradient of the operand: [t, s] of K, then [t, n] of what multiplies H_0
    pairs = offset[:, None] * (4 * width) + offset[None, :]
    blocks = offset[:, None] * (4 * width) + CHUNK + n[None, :]
    log = tl.load(log_ptr + place, mask=mask, other=0.0)
    w0, w1, w2, w3 = load_quaternion(dturn_ptr, n[None, :] + offset[:, None] * 0, N, mask)
    batch = row // num_chunks
    t = (row % num_chunks) * CHUNK + offset[:, None]
    inside = mask & (t < length)

    # Queries first, then keys: both at once would not fit into registers.
    C0, C1, C2, C3 = load_quaternion(C_hat_ptr, place, CHUNK * N, mask)
    since = tl.exp2(log)
    a0, a1, a2, a3 = load_quaternion(doperand_ptr, blocks, N, mask)
    g0, g1, g2, g3 = a0, -a1, -a2, -a3
    a0, a1, a2, a3 = load_quaternion(doperand_ptr, blocks + width, N, mask)
    g0, g1, g2, g3 = g0 + a1, g1 + a0, g2 + a3, g3 - a2
    a0, a1, a2, a3 = load_quaternion(doperand_ptr, blocks + 2 * width, N, mask)
    g0, g1, g2, g3 = g0 + a2, g1 - a3, g2 + a0, g3 + a1
    a0, a1, a2, a3 = load_quaternion(doperand_ptr, blocks + 3 * width, N, mask)
    g0, g1, g2, g3 = (g0 + a3) * since, (g1 + a2) * since, (g2 - a1) * since, (g3 + a0) * since
    later = (offset[:, None] <= offset[None, :]).to(tl.float32)
    e0, e1, e2, e3 = hamilton(C0, -C1, -C2, -C3, g0, g1, g2, g3)
    w0 = _add_product(w0, later, e0, SUM_PRECISION)
    w1 = _add_product(w1, later, e1, SUM_PRECISION)
    w2 = _add_product(w2, later, e2, SUM_PRECISION)
    w3 = _add_product(w3, later, e3, SUM_PRECISION)
    for level in range(LEVELS + 1):
        queries, key_scale = _level_scales(log_ptr, level, offset, n, mask, N)
        b0, b1, b2, b3 = load_quaternion(B_hat_ptr, place, CHUNK * N, mask)
        b0, b1 = (b0 * key_scale).to(dtype), (b1 * key_scale).to(dtype)
        b2, b3 = (b2 * key_scale).to(dtype), (b3 * key_scale).to(dtype)
        chosen = _pairs(level, offset[:, None], offset[None, :])
        zero = tl.zeros([CHUNK, BLOCK], tl.float32)
        dK = tl.load(doperand_ptr + pairs, mask=chosen, other=0.0)
        x0 = _add_product(zero, dK, b0, PRECISION)
        x1 = _add_product(zero, dK, -b1, PRECISION)
        x2 = _add_product(zero, dK, -b2, PRECISION)
        x3 = _add_product(zero, dK, -b3, PRECISION)
        dK = tl.load(doperand_ptr + pairs + width, mask=chosen, other=0.0)
        x1 = _add_product(x1, dK, b0, PRECISION)
        x0 = _add_product(x0, dK, b1, PRECISION)
        x3 = _add_product(x3, dK, -b2, PRECISION)
        x2 = _add_product(x2, dK, b3, PRECISION)
        dK = tl.load(doperand_ptr + pairs + 2 * width, mask=chosen, other=0.0)
        x2 = _add_product(x2, dK, b0, PRECISION)
        x3 = _add_product(x3, dK, b1, PRECISION)
        x0 = _add_product(x0, dK, b2, PRECISION)
        x1 = _add_product(x1, dK, -b3, PRECISION)
        dK = tl.load(doperand_ptr + pairs + 3 * width, mask=chosen, other=0.0)
        x3 = _add_product(x3, dK, b0, PRECISION)
        x2 = _add_product(x2, dK, -b1, PRECISION)
        x1 = _add_product(x1, dK, b2, PRECISION)
        x0 = _add_product(x0, dK, b3, PRECISION)
        x0, x1, x2, x3 = x0 * queries, x1 * queries, x2 * queries, x3 * queries
        g0, g1, g2, g3 = g0 + x0, g1 + x1, g2 + x2, g3 + x3
        # Queries are in right halves: sums over the later steps of their own half.
        later = (_same_half(level, offset) & (offset[:, None] <= offset[None, :])).to(tl.float32)
        C0, C1, C2, C3 = load_quaternion(C_hat_ptr, place, CHUNK * N, mask)
        e0, e1, e2, e3 = hamilton(C0, -C1, -C2, -C3, x0, x1, x2, x3)
        w0 = _add_product(w0, later, e0, SUM_PRECISION)
        w1 = _add_product(w1, later, e1, SUM_PRECISION)
        w2 = _add_product(w2, later, e2, SUM_PRECISION)
        w3 = _add_product(w3, later, e3, SUM_PRECISION)
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
    earlier = (offset[:, None] > offset[None, :]).to(tl.float32)
    e0, e1, e2, e3 = hamilton(g0, g1, g2, g3, B0, -B1, -B2, -B3)
    w0 = _add_product(w0, earlier, e0, SUM_PRECISION)
    w1 = _add_product(w1, earlier, e1, SUM_PRECISION)
    w2 = _add_product(w2, earlier, e2, SUM_PRECISION)
    w3 = _add_product(w3, earlier, e3, SUM_PRECISION)
    # [s, t] of component 0
    flipped = offset[None, :] * (4 * width) + offset[:, None]
    for level in range(LEVELS + 1):
        queries, key_scale = _level_scales(log_ptr, level, offset, n, mask, N)
        c0, c1, c2, c3 = load_quaternion(C_hat_ptr, place, CHUNK * N, mask)
        c0, c1 = (c0 * queries).to(dtype), (c1 * queries).to(dtype)
        c2, c3 = (c2 * queries).to(dtype), (c3 * queries).to(dtype)
        chosen = _pairs(level, offset[None, :], offset[:, None])
        zero = tl.zeros([CHUNK, BLOCK], tl.float32)
        dK = tl.load(doperand_ptr + flipped, mask=chosen, other=0.0)
        x0 = _add_product(zero, dK, c0, PRECISION)
        x1 = _add_product(zero, dK, -c1, PRECISION)
        x2 = _add_product(zero, dK, -c2, PRECISION)
        x3 = _add_product(zero, dK, -c3, PRECISION)
        dK = tl.load(doperand_ptr + flipped + width, mask=chosen, other=0.0)
        x0 = _add_product(x0, dK, c1, PRECISION)
        x1 = _add_product(x1, dK, c0, PRECISION)
        x2 = _add_product(x2, dK, -c3, PRECISION)
        x3 = _add_product(x3, dK, c2, PRECISION)
        dK = tl.load(doperand_ptr + flipped + 2 * width, mask=chosen, other=0.0)
        x0 = _add_product(x0, dK, c2, PRECISION)
        x1 = _add_product(x1, dK, c3, PRECISION)
        x2 = _add_product(x2, dK, c0, PRECISION)
        x3 = _add_product(x3, dK, -c1, PRECISION)
        dK = tl.load(doperand_ptr + flipped + 3 * width, mask=chosen, other=0.0)
        x0 = _add_product(x0, dK, c3, PRECISION)
        x1 = _add_product(x1, dK, -c2, PRECISION)
        x2 = _add_product(x2, dK, c1, PRECISION)
        x3 = _add_product(x3, dK, c0, PRECISION)
        x0, x1, x2, x3 = x0 * key_scale, x1 * key_scale, x2 * key_scale, x3 * key_scale
        g0, g1, g2, g3 = g0 + x0, g1 + x1, g2 + x2, g3 + x3
        earlier = (_same_half(level, offset) & (offset[:, None] > offset[None, :])).to(tl.float32)
        B0, B1, B2, B3 = load_quaternion(B_hat_ptr, place, CHUNK * N, mask)
        e0, e1, e2, e3 = hamilton(x0, x1, x2, x3, B0, -B1, -B2, -B3)
        w0 = _add_product(w0, earlier, e0, SUM_PRECISION)
        w1 = _add_product(w1, earlier, e1, SUM_PRECISION)
        w2 = _add_product(w2, earlier, e2, SUM_PRECISION)
        w3 = _add_product(w3, earlier, e3, SUM_PRECISION)
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


@triton.jit
def _skip_backward_kernel(
    S_ptr,
    dy_ptr,
    D_ptr,
    dS_ptr,
    dD_ptr,
    rows,
    width,
    S_stride,
    dy_stride,
    dS_stride,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dS += D dy_0, and the part of dD = sum dy_0 S of every program."""
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    D = tl.load(D_ptr + d, mask=d < width, other=0.0).to(tl.float32)[None, :]
    dD = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = (first + tl.arange(0, ROWS))[:, None].to(tl.int64)
        mask = (row < rows) & (d[None, :] < width)
        dy = tl.load(dy_ptr + row * dy_stride + d[None, :], mask=mask, other=0.0).to(tl.float32)
        S = tl.load(S_ptr + row * S_stride + d[None, :], mask=mask, other=0.0).to(tl.float32)
        place = dS_ptr + row * dS_stride + d[None, :]
        dS = tl.load(place, mask=mask, other=0.0).to(tl.float32) + D * dy
        tl.store(place, dS.to(dS_ptr.dtype.element_ty), mask=mask)
        dD += dy * S
    tl.store(dD_ptr + tl.program_id(0) * width + d, tl.sum(dD, 0), mask=d < width)


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
    def width(self) -> int:
        """Columns of the operand: those of K, and those for the four components of the state."""
        return self.chunk + 4 * self.states

    @property
    def precision(self) -> str:
        """Three TF32 products give float32's precision on tensor cores."""
        return "tf32x3" if self.dtype == torch.float32 else "ieee"


@dataclass(frozen=True)
class _Prefix:
    """What ``_prefix_kernel`` and ``_kernel_kernel`` make; see there."""

    turn: Tensor
    log: Tensor
    B_hat: Tensor
    C_hat: Tensor
    keys: Tensor
    operand: Tensor
    total: Tensor


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
        operand=empty(s.chunk, 4, s.width, dtype=s.dtype),
        total=empty(5, s.states),
    )
    block = min(32, max(16, triton.next_power_of_2(s.states)))
    _prefix_kernel[(triton.cdiv(s.states, block), *outer)](
        q,
        B,
        C,
        found.turn,
        found.log,
        found.B_hat,
        found.C_hat,
        found.keys,
        found.operand,
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
        num_warps=4,
    )
    wide = s.dtype == torch.float32
    _kernel_kernel[(4, *outer)](
        found.B_hat,
        found.C_hat,
        found.log,
        found.operand,
        s.groups,
        N=s.states,
        CHUNK=s.chunk,
        BLOCK=min(32, max(16, triton.next_power_of_2(s.states))),
        LEVELS=s.levels,
        PRECISION=s.precision,
        num_warps=4,
        num_stages=1 if wide else 2,
    )
    return found


CARRY_ROWS, CARRY_COLUMNS = 8, 64
"""States and channels of a program of the carry kernels."""


def _carry_grid(shape: _Shape) -> tuple[int, int, int]:
    return (
        triton.cdiv(shape.channels, CARRY_COLUMNS),
        triton.cdiv(shape.states, CARRY_ROWS),
        shape.batch * shape.groups,
    )


def _values_and_states(
    S: Tensor, start: Tensor | None, prefix: _Prefix, shape: _Shape
) -> tuple[Tensor, Tensor]:
    """[S; H] of every chunk, [rows, G, Q + 4 N, P], and the state at the end, [batch, G, 4, N, P]."""
    s = shape
    stacked = torch.empty(s.rows, s.groups, s.width, s.channels, dtype=s.dtype, device=S.device)
    padded = _padded(S, s)
    values = stacked[:, :, : s.chunk]
    values.copy_(padded.reshape(s.rows, s.chunk, s.groups, s.channels).transpose(1, 2))
    for group in range(s.groups):
        torch.bmm(prefix.keys[:, group].transpose(1, 2), values[:, group], out=stacked[:, group, s.chunk :])
    end = torch.empty(s.batch, s.groups, 4, s.states, s.channels, dtype=torch.float32, device=S.device)
    _carry_kernel[_carry_grid(s)](
        stacked,
        prefix.total,
        start,
        end,
        s.num_chunks,
        s.groups,
        s.channels,
        N=s.states,
        CHUNK=s.chunk,
        ROWS=CARRY_ROWS,
        COLUMNS=CARRY_COLUMNS,
        HAS_START=start is not None,
        num_warps=4,
    )
    return stacked, end


def _by_group(memory: Tensor, group: int, rows: int, columns: int) -> Tensor:
    """The matrices [chunks, rows, P] of a group in [..., G P]."""
    return memory.view(-1, rows, memory.shape[-1])[..., group * columns : (group + 1) * columns]


def _padded(x: Tensor, shape: _Shape) -> Tensor:
    """[batch, T, ., .] with zeros up to whole chunks; nothing is copied if it has them."""
    padding = shape.num_chunks * shape.chunk - shape.length
    return F.pad(x, (0, 0, 0, 0, 0, padding)) if padding else x


def _planes(state: Tensor) -> Tensor:
    """A state [batch, G, P, N, 4] as [batch, G, 4, N, P], dense."""
    return state.permute(0, 1, 4, 3, 2).contiguous()


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
        y = S.new_empty(batch, s.num_chunks * s.chunk, 4, groups * channels)
        with device_of(S), torch.autocast(S.device.type, enabled=False):
            prefix = _prefix(q, B, C, s)
            stacked, end = _values_and_states(S, start, prefix, s)
            operand = prefix.operand.flatten(2, 3)
            for group in range(groups):
                torch.bmm(
                    operand[:, group], stacked[:, group], out=_by_group(y, group, 4 * s.chunk, channels)
                )
            if D is not None:
                y[:, :length, 0].addcmul_(S.flatten(2), D.flatten().to(S.dtype))
        ctx.save_for_backward(q, B, C, S, D, start)
        ctx.shape = s
        ctx.state_dtype = None if initial_state is None else initial_state.dtype
        ctx.set_materialize_grads(False)
        output = y.unflatten(-1, (groups, channels))[:, :length].permute(0, 1, 3, 4, 2)
        return output, end.permute(0, 1, 4, 3, 2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        q, B, C, S, D, start = ctx.saved_tensors
        s = ctx.shape
        whole = s.num_chunks * s.chunk
        if gradients[0] is None:
            dy = S.new_zeros(s.batch, whole, 4, s.groups * s.channels)
        else:
            dy = _padded(gradients[0].permute(0, 1, 4, 2, 3).flatten(3), s).contiguous()
        dend = None if gradients[1] is None else _planes(gradients[1])
        with device_of(S), torch.autocast(S.device.type, enabled=False):
            prefix = _prefix(q, B, C, s)
            stacked, _ = _values_and_states(S, start, prefix, s)
            doperand = torch.empty_like(prefix.operand)
            dstacked = torch.empty_like(stacked)
            operand, flat = prefix.operand.flatten(2, 3), doperand.flatten(2, 3)
            for group in range(s.groups):
                given = _by_group(dy, group, 4 * s.chunk, s.channels)
                torch.bmm(given, stacked[:, group].transpose(1, 2), out=flat[:, group])
                torch.bmm(operand[:, group].transpose(1, 2), given, out=dstacked[:, group])
            grid = _carry_grid(s)
            dturn = S.new_empty(grid[0], s.rows, s.groups, 4, s.states, dtype=torch.float32)
            dstart = S.new_empty(s.batch, s.groups, 4, s.states, s.channels, dtype=torch.float32)
            _carry_backward_kernel[grid](
                stacked,
                dstacked,
                prefix.total,
                dend,
                dstart,
                dturn,
                s.num_chunks,
                s.groups,
                s.channels,
                N=s.states,
                CHUNK=s.chunk,
                ROWS=CARRY_ROWS,
                COLUMNS=CARRY_COLUMNS,
                HAS_END=dend is not None,
                num_warps=4,
            )
            dS = S.new_empty(s.batch, whole, s.groups * s.channels)
            dkeys = torch.empty_like(prefix.keys)
            for group in range(s.groups):
                dstates = dstacked[:, group, s.chunk :]
                torch.bmm(stacked[:, group, : s.chunk], dstates.transpose(1, 2), out=dkeys[:, group])
                torch.baddbmm(
                    dstacked[:, group, : s.chunk],
                    prefix.keys[:, group],
                    dstates,
                    out=_by_group(dS, group, s.chunk, s.channels),
                )
            dq, dB, dC = torch.empty_like(q), torch.empty_like(B), torch.empty_like(C)
            block = 16
            _operand_backward_kernel[(triton.cdiv(s.states, block), s.rows, s.groups)](
                q,
                prefix.turn,
                prefix.log,
                prefix.B_hat,
                prefix.C_hat,
                doperand,
                dkeys,
                dturn.sum(0),
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
                SUM_PRECISION="ieee",
                num_warps=4,
                num_stages=1,
            )
            dS = dS[:, : s.length]
            dD = None if D is None else _skip_backward(S, dy, D, dS, s)
        return (
            dq,
            dB,
            dC,
            dS.unflatten(-1, (s.groups, s.channels)),
            dD,
            None if start is None else dstart.permute(0, 1, 4, 3, 2).to(ctx.state_dtype),
        )


def _skip_backward(S: Tensor, dy: Tensor, D: Tensor, dS: Tensor, shape: _Shape) -> Tensor:
    """Add the skip's part to dS, in place, and give dD."""
    s = shape
    width = s.groups * s.channels
    rows = s.batch * s.length
    values = S.reshape(rows, width)
    real, target = dy[:, : s.length, 0], dS
    if s.batch > 1 and dS.shape[1] * dS.stride(1) != dS.stride(0):
        # padded sequences do not join
        real, target = real.contiguous(), dS.contiguous()
    real, flat = real.flatten(0, 1), target.flatten(0, 1)
    block = min(256, triton.next_power_of_2(width))
    programs = min(64, triton.cdiv(rows, 4))
    dD = S.new_empty(programs, width, dtype=torch.float32)
    _skip_backward_kernel[(programs, triton.cdiv(width, block))](
        values,
        real,
        D.contiguous(),
        flat,
        dD,
        rows,
        width,
        values.stride(0),
        real.stride(0),
        flat.stride(0),
        ROWS=4,
        BLOCK=block,
    )
    if target is not dS:
        dS.copy_(target)
    return dD.sum(0).view_as(D).to(D.dtype)


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
