"""Mamba-2's float scan as matrix products: state-space duality (Dao & Gu 2024, arXiv 2405.21060, sec. 6).

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T        y_t = h_t C_t + D x_t

This is the float operation; ``triton_kernels/ssd.py`` is the integer one, whose decays, gates and roundings
are part of the proven model. They share the chunked form and nothing else.

A chunk has Q tokens. With a_t the sum of dt A from the chunk's start through t and H the state before the
chunk:

    y_t = sum_{s<=t} e^(a_t - a_s) (C_t . B_s) dt_s x_s  +  e^(a_t) H C_t  +  D x_t
    H'  = e^(a_Q) H  +  sum_s e^(a_Q - a_s) dt_s x_s B_s^T

Three launches forward: decays (``_decay_kernel``), the states before all chunks, carried in registers from
chunk to chunk (``_chunk_state_kernel``), and the outputs, where one program serves many heads of a group, so
that C B^T is computed once for all of them (``_chunk_output_kernel``). Four launches backward: the states
again rather than kept; the gradients of the states, which are the same kernel run from the end with the
gradient of y for x and C for B; every gradient of a chunk in one kernel (``_chunk_gradient_kernel``) with
C B^T from the forward, where dB and then dC are summed over the heads of a program in registers (two loops:
both sums at once would not fit); and the gradient of the decays.

States between kernels have the dtype of ``x`` and lie as [N, P], the layout both matrix products want.
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
from triton_kernels.softplus import stable_softplus

LOG2_E = tl.constexpr(1.4426950408889634)
DECAY_HEADS = 16
"""Heads of one program of the decay kernels."""


@triton.jit
def _decay_kernel(
    dt_ptr,
    dt_bias_ptr,
    A_ptr,
    step_ptr,
    dA_cumsum_ptr,
    length,
    num_heads,
    padded_length,
    CHUNK: tl.constexpr,
    HEADS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
):
    """Step sizes [batch, H, chunks * Q] and the base-2 logarithm of the decay since the chunk's start."""
    batch = tl.program_id(1).to(tl.int64)
    t = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    head = tl.program_id(2) * HEADS + tl.arange(0, HEADS)
    in_heads = head < num_heads
    mask = (t[:, None] < length) & in_heads[None, :]
    step = tl.load(dt_ptr + (batch * length + t[:, None]) * num_heads + head[None, :], mask=mask, other=0.0)
    step = step.to(tl.float32)
    if HAS_BIAS:
        step += tl.load(dt_bias_ptr + head, mask=in_heads, other=0.0).to(tl.float32)[None, :]
    if SOFTPLUS:
        step = stable_softplus(step)
    step = tl.where(mask, step, 0.0)
    A = tl.load(A_ptr + head, mask=in_heads, other=0.0).to(tl.float32)
    dA_cumsum = tl.cumsum(step * (A * LOG2_E)[None, :], 0)
    offset = (batch * num_heads + head[None, :]) * padded_length + t[:, None]
    tl.store(step_ptr + offset, step, mask=in_heads[None, :])
    tl.store(dA_cumsum_ptr + offset, dA_cumsum, mask=in_heads[None, :])


@triton.jit
def _decay_backward_kernel(
    dt_ptr,
    dt_bias_ptr,
    A_ptr,
    step_ptr,
    dstep_ptr,
    da_ptr,
    da_state_ptr,
    ddt_ptr,
    dA_ptr,
    ddt_bias_ptr,
    length,
    num_heads,
    padded_length,
    CHUNK: tl.constexpr,
    HEADS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
):
    """From the gradients of step sizes and of their cumulative sums: ddt, and per chunk dA and ddt_bias."""
    batch = tl.program_id(1).to(tl.int64)
    t = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    head = tl.program_id(2) * HEADS + tl.arange(0, HEADS)
    in_heads = head < num_heads
    mask = (t[:, None] < length) & in_heads[None, :]
    offset = (batch * num_heads + head[None, :]) * padded_length + t[:, None]
    step = tl.load(step_ptr + offset, mask=in_heads[None, :], other=0.0)
    dstep = tl.load(dstep_ptr + offset, mask=in_heads[None, :], other=0.0)
    da = tl.load(da_ptr + offset, mask=in_heads[None, :], other=0.0)
    da += tl.load(da_state_ptr + offset, mask=in_heads[None, :], other=0.0)
    A = tl.load(A_ptr + head, mask=in_heads, other=0.0).to(tl.float32)
    ddA = tl.cumsum(da, 0, reverse=True)
    ddt = dstep + ddA * A[None, :]
    inputs = (batch * length + t[:, None]) * num_heads + head[None, :]
    if SOFTPLUS:
        raw = tl.load(dt_ptr + inputs, mask=mask, other=0.0).to(tl.float32)
        if HAS_BIAS:
            raw += tl.load(dt_bias_ptr + head, mask=in_heads, other=0.0).to(tl.float32)[None, :]
        ddt *= tl.sigmoid(raw)
    ddt = tl.where(mask, ddt, 0.0)
    tl.store(ddt_ptr + inputs, ddt, mask=mask)
    partial = (batch * tl.num_programs(0) + tl.program_id(0)) * num_heads + head
    tl.store(dA_ptr + partial, tl.sum(ddA * step, 0), mask=in_heads)
    tl.store(ddt_bias_ptr + partial, tl.sum(ddt, 0), mask=in_heads)


@triton.jit
def _chunk_state_kernel(
    values_ptr,
    keys_ptr,
    step_ptr,
    dA_cumsum_ptr,
    start_ptr,
    states_ptr,
    end_ptr,
    length,
    num_chunks,
    num_heads,
    heads_per_group,
    values_batch_stride,
    values_time_stride,
    values_head_stride,
    keys_batch_stride,
    keys_time_stride,
    keys_group_stride,
    P: tl.constexpr,
    N: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    HAS_START: tl.constexpr,
    REVERSE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The state before every chunk, or, REVERSE, the gradient of the state after every chunk.

    Forward: values x, keys B, start the initial state, end the final one. REVERSE: values dy, keys C, start
    the gradient of the final state, end that of the initial one.
    """
    batch = (tl.program_id(0) // num_heads).to(tl.int64)
    head = tl.program_id(0) % num_heads
    row = tl.program_id(0).to(tl.int64)
    p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.arange(0, BLOCK_N)
    offset = tl.arange(0, CHUNK)
    in_state = (n[:, None] < N) & (p[None, :] < P)
    values_base = values_ptr + batch * values_batch_stride + head * values_head_stride
    keys_base = keys_ptr + batch * keys_batch_stride + (head // heads_per_group) * keys_group_stride
    outer = row * P * N + p[None, :] * N + n[:, None]
    if HAS_START:
        state = tl.load(start_ptr + outer, mask=in_state, other=0.0).to(tl.float32)
    else:
        state = tl.zeros([BLOCK_N, BLOCK_P], tl.float32)
    for i in range(num_chunks):
        chunk = i
        if REVERSE:
            chunk = num_chunks - 1 - i
        t = chunk * CHUNK + offset
        values = tl.load(
            values_base + t[:, None].to(tl.int64) * values_time_stride + p[None, :],
            mask=(t[:, None] < length) & (p[None, :] < P),
            other=0.0,
        )
        keys = tl.load(
            keys_base + t[:, None].to(tl.int64) * keys_time_stride + n[None, :],
            mask=(t[:, None] < length) & (n[None, :] < N),
            other=0.0,
        )
        decays = dA_cumsum_ptr + (row * num_chunks + chunk) * CHUNK
        dA_cumsum = tl.load(decays + offset)
        dA_total = tl.load(decays + CHUNK - 1)
        if REVERSE:
            weight = tl.exp2(dA_cumsum)
        else:
            step = tl.load(step_ptr + (row * num_chunks + chunk) * CHUNK + offset)
            weight = tl.exp2(tl.minimum(dA_total - dA_cumsum, 0.0)) * step
        place = ((batch * num_chunks + chunk) * num_heads + head) * N * P + n[:, None] * P + p[None, :]
        tl.store(states_ptr + place, state.to(states_ptr.dtype.element_ty), mask=in_state)
        weighted = (values.to(tl.float32) * weight[:, None]).to(values.dtype)
        state = tl.dot(tl.trans(keys), weighted, state * tl.exp2(dA_total), input_precision=PRECISION)
    tl.store(end_ptr + outer, state, mask=in_state)


@triton.jit
def _chunk_output_kernel(
    x_ptr,
    B_ptr,
    C_ptr,
    D_ptr,
    step_ptr,
    dA_cumsum_ptr,
    states_ptr,
    CB_ptr,
    y_ptr,
    length,
    num_chunks,
    num_heads,
    heads_per_group,
    heads_per_program,
    x_batch_stride,
    x_time_stride,
    x_head_stride,
    B_batch_stride,
    B_time_stride,
    B_group_stride,
    C_batch_stride,
    C_time_stride,
    C_group_stride,
    P: tl.constexpr,
    N: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    HAS_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """y of one chunk for ``heads_per_program`` heads of one group."""
    batch = (tl.program_id(1) // num_chunks).to(tl.int64)
    chunk = tl.program_id(1) % num_chunks
    first_head = tl.program_id(0) * heads_per_program
    group = first_head // heads_per_group
    offset = tl.arange(0, CHUNK)
    t = chunk * CHUNK + offset
    n = tl.arange(0, BLOCK_N)
    p = tl.arange(0, BLOCK_P)
    in_time = t[:, None] < length
    in_keys = in_time & (n[None, :] < N)
    in_values = in_time & (p[None, :] < P)
    in_state = (n[:, None] < N) & (p[None, :] < P)
    time = t[:, None].to(tl.int64)
    B_base = B_ptr + batch * B_batch_stride + group * B_group_stride
    C_base = C_ptr + batch * C_batch_stride + group * C_group_stride
    C = tl.load(C_base + time * C_time_stride + n[None, :], mask=in_keys, other=0.0)
    B = tl.load(B_base + time * B_time_stride + n[None, :], mask=in_keys, other=0.0)
    CB = tl.dot(C, tl.trans(B), input_precision=PRECISION)
    if first_head == group * heads_per_group:
        square = (tl.program_id(1).to(tl.int64) * (num_heads // heads_per_group) + group) * CHUNK * CHUNK
        tl.store(CB_ptr + square + offset[:, None] * CHUNK + offset[None, :], CB)
    causal = offset[:, None] >= offset[None, :]
    x_base = x_ptr + batch * x_batch_stride + time * x_time_stride + p[None, :]
    y_base = y_ptr + (batch * length + time) * num_heads * P + p[None, :]
    states_base = states_ptr + (batch * num_chunks + chunk) * num_heads * N * P + n[:, None] * P + p[None, :]
    decay_base = (batch * num_heads * num_chunks + chunk) * CHUNK
    for i in range(heads_per_program):
        head = first_head + i
        state = tl.load(states_base + head.to(tl.int64) * N * P, mask=in_state, other=0.0)
        x = tl.load(x_base + head * x_head_stride, mask=in_values, other=0.0)
        decays = decay_base + head.to(tl.int64) * num_chunks * CHUNK
        dA_cumsum = tl.load(dA_cumsum_ptr + decays + offset)
        step = tl.load(step_ptr + decays + offset)
        y = tl.dot(C, state, input_precision=PRECISION) * tl.exp2(dA_cumsum)[:, None]
        exponent = tl.minimum(dA_cumsum[:, None] - dA_cumsum[None, :], 0.0)
        decay = tl.where(causal, tl.exp2(exponent), 0.0)
        attention = (CB * decay * step[None, :]).to(x.dtype)
        y = tl.dot(attention, x, y, input_precision=PRECISION)
        if HAS_D:
            y += x.to(tl.float32) * tl.load(D_ptr + head).to(tl.float32)
        tl.store(y_base + head * P, y.to(y_ptr.dtype.element_ty), mask=in_values)


@triton.jit
def _chunk_gradient_kernel(
    x_ptr,
    B_ptr,
    C_ptr,
    CB_ptr,
    D_ptr,
    step_ptr,
    dA_cumsum_ptr,
    states_ptr,
    dstates_ptr,
    dy_ptr,
    dx_ptr,
    dB_ptr,
    dC_ptr,
    dD_ptr,
    dstep_ptr,
    da_ptr,
    da_state_ptr,
    length,
    num_chunks,
    num_heads,
    heads_per_group,
    heads_per_program,
    x_batch_stride,
    x_time_stride,
    x_head_stride,
    B_batch_stride,
    B_time_stride,
    B_group_stride,
    C_batch_stride,
    C_time_stride,
    C_group_stride,
    dy_batch_stride,
    dy_time_stride,
    dy_head_stride,
    P: tl.constexpr,
    N: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    HAS_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """All gradients of one chunk for ``heads_per_program`` heads of one group.

    Square matrices are kept transposed, [s, t], so that the one that multiplies dy comes from registers. The
    gradient of a_t is that of a row less that of a column of one and the same float32 matrix: their sums
    over a chunk cancel to its precision, which sums over rounded products (y . dy - x . dx) would not.
    """
    batch = (tl.program_id(1) // num_chunks).to(tl.int64)
    chunk = tl.program_id(1) % num_chunks
    first_head = tl.program_id(0) * heads_per_program
    group = first_head // heads_per_group
    programs_per_group = heads_per_group // heads_per_program
    offset = tl.arange(0, CHUNK)
    t = chunk * CHUNK + offset
    n = tl.arange(0, BLOCK_N)
    p = tl.arange(0, BLOCK_P)
    in_time = t[:, None] < length
    in_keys = in_time & (n[None, :] < N)
    in_values = in_time & (p[None, :] < P)
    in_state = (n[:, None] < N) & (p[None, :] < P)
    time = t[:, None].to(tl.int64)
    B_base = B_ptr + batch * B_batch_stride + group * B_group_stride
    C_base = C_ptr + batch * C_batch_stride + group * C_group_stride
    B = tl.load(B_base + time * B_time_stride + n[None, :], mask=in_keys, other=0.0)
    num_groups = num_heads // heads_per_group
    square = (tl.program_id(1).to(tl.int64) * num_groups + group) * CHUNK * CHUNK
    CB = tl.load(CB_ptr + square + offset[None, :] * CHUNK + offset[:, None])
    dCB = tl.zeros([CHUNK, CHUNK], tl.float32)
    dB = tl.zeros([CHUNK, BLOCK_N], tl.float32)
    diagonal = offset[:, None] == offset[None, :]
    causal = offset[:, None] <= offset[None, :]
    x_base = x_ptr + batch * x_batch_stride + time * x_time_stride + p[None, :]
    dy_base = dy_ptr + batch * dy_batch_stride + time * dy_time_stride + p[None, :]
    dx_base = dx_ptr + (batch * length + time) * num_heads * P + p[None, :]
    states_base = (batch * num_chunks + chunk) * num_heads * N * P + n[:, None] * P + p[None, :]
    decay_base = (batch * num_heads * num_chunks + chunk) * CHUNK
    for i in range(heads_per_program):
        head = first_head + i
        x = tl.load(x_base + head * x_head_stride, mask=in_values, other=0.0)
        dy = tl.load(dy_base + head * dy_head_stride, mask=in_values, other=0.0)
        dstate = tl.load(dstates_ptr + states_base + head.to(tl.int64) * N * P, mask=in_state, other=0.0)
        decays = decay_base + head.to(tl.int64) * num_chunks * CHUNK
        dA_cumsum = tl.load(dA_cumsum_ptr + decays + offset)
        dA_total = tl.load(dA_cumsum_ptr + decays + CHUNK - 1)
        step = tl.load(step_ptr + decays + offset)

        exponent = tl.minimum(dA_cumsum[None, :] - dA_cumsum[:, None], 0.0)
        decay = tl.where(causal, tl.exp2(exponent), 0.0)
        dattention = tl.dot(x, tl.trans(dy), input_precision=PRECISION) * decay
        if HAS_D:
            skip = tl.sum(tl.sum(tl.where(diagonal, dattention, 0.0), 1), 0)
            tl.store(dD_ptr + (batch * num_chunks + chunk) * num_heads + head, skip)
        dCB += dattention * step[:, None]
        dattention *= CB
        dstep = tl.sum(dattention, 1)
        da = tl.sum(dattention * step[:, None], 0)

        remaining = tl.exp2(tl.minimum(dA_total - dA_cumsum, 0.0))
        dx = tl.dot(B, dstate, input_precision=PRECISION) * remaining[:, None]
        across = tl.sum(x.to(tl.float32) * dx, 1)
        dstep += across
        da += tl.where(offset == CHUNK - 1, tl.sum(step * across, 0), 0.0) - step * dstep
        tl.store(dstep_ptr + decays + offset, dstep)
        tl.store(da_ptr + decays + offset, da)
        # Both terms times step, or the compiler adds the second into the first's registers, whose layout
        # for chained products keeps every element twice.
        within = tl.dot((CB * decay).to(x.dtype), dy, input_precision=PRECISION)
        dx = dx * step[:, None] + within * step[:, None]
        if HAS_D:
            dx += dy.to(tl.float32) * tl.load(D_ptr + head).to(tl.float32)
        tl.store(dx_base + head * P, dx.to(dx_ptr.dtype.element_ty), mask=in_values)
        weighted = (x.to(tl.float32) * (remaining * step)[:, None]).to(x.dtype)
        dB = tl.dot(weighted, tl.trans(dstate), dB, input_precision=PRECISION)
    C = tl.load(C_base + time * C_time_stride + n[None, :], mask=in_keys, other=0.0)
    dCB_low = dCB.to(C.dtype)
    dB = tl.dot(dCB_low, C, dB, input_precision=PRECISION)
    part = tl.program_id(0) % programs_per_group
    batches = tl.num_programs(1) // num_chunks
    place = ((part * batches + batch) * length + time) * num_groups * N + group * N + n[None, :]
    tl.store(dB_ptr + place, dB.to(dB_ptr.dtype.element_ty), mask=in_keys)

    dC = tl.dot(tl.trans(dCB_low), B, input_precision=PRECISION)
    for i in range(heads_per_program):
        head = first_head + i
        dy = tl.load(dy_base + head * dy_head_stride, mask=in_values, other=0.0)
        state = tl.load(states_ptr + states_base + head.to(tl.int64) * N * P, mask=in_state, other=0.0)
        dstate = tl.load(dstates_ptr + states_base + head.to(tl.int64) * N * P, mask=in_state, other=0.0)
        decays = decay_base + head.to(tl.int64) * num_chunks * CHUNK
        since = tl.exp2(tl.load(dA_cumsum_ptr + decays + offset))
        whole = tl.exp2(tl.load(dA_cumsum_ptr + decays + CHUNK - 1))
        weighted = dy.to(tl.float32) * since[:, None]
        da_state = tl.sum(weighted * tl.dot(C, state, input_precision=PRECISION), 1)
        # <state, dstate> as the trace of a product: its square has fewer registers than the two factors
        overlap = tl.dot(tl.trans(state), dstate, input_precision=PRECISION)
        kept = tl.sum(tl.sum(tl.where(p[:, None] == p[None, :], overlap, 0.0), 1), 0) * whole
        da_state += tl.where(offset == CHUNK - 1, kept, 0.0)
        tl.store(da_state_ptr + decays + offset, da_state)
        dC = tl.dot(weighted.to(dy.dtype), tl.trans(state), dC, input_precision=PRECISION)
    tl.store(dC_ptr + place, dC.to(dC_ptr.dtype.element_ty), mask=in_keys)


@dataclass(frozen=True)
class _Launch:
    """How the kernels are launched for one shape; ``warps`` and ``stages`` of states, outputs, gradients."""

    chunk: int
    block_N: int
    block_P: int
    state_block_P: int
    precision: str
    warps: tuple[int, int, int]
    stages: tuple[int, int, int]


def _launch(dtype: torch.dtype, headdim: int, d_state: int) -> _Launch:
    block_N = max(16, triton.next_power_of_2(d_state))
    block_P = max(16, triton.next_power_of_2(headdim))
    if dtype == torch.float32:
        # Three TF32 products give float32's precision on tensor cores; tiles are twice as large in bytes.
        chunk = 32 if block_N <= 128 and block_P <= 64 else 16
        return _Launch(chunk, block_N, block_P, min(block_P, 32), "tf32x3", (4, 4, 8), (1, 1, 1))
    chunk = 64 if block_N <= 128 and block_P <= 128 else 32
    return _Launch(chunk, block_N, block_P, min(block_P, 32), "ieee", (4, 4, 8), (3, 2, 2))


def _heads_per_program(rows: int, heads_per_group: int, num_groups: int, programs: int) -> int:
    """Most heads a program can serve, a divisor of the group's, with at least ``programs`` programs."""
    divisors = [d for d in range(heads_per_group, 0, -1) if heads_per_group % d == 0]
    enough = [d for d in divisors if rows * num_groups * (heads_per_group // d) >= programs]
    return enough[0] if enough else 1


def _aligned(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


class _StateSpaceDuality(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        dt_bias: Tensor | None,
        dt_softplus: bool,
        initial_state: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        x, B, C, dt = _aligned(x), _aligned(B), _aligned(C), dt.contiguous()
        if initial_state is not None:
            initial_state = initial_state.contiguous()
        batch, length, num_heads, headdim = x.shape
        num_groups = B.shape[2]
        launch = _launch(x.dtype, headdim, B.shape[-1])
        num_chunks = triton.cdiv(length, launch.chunk)
        step = x.new_empty(batch, num_heads, num_chunks * launch.chunk, dtype=torch.float32)
        dA_cumsum = torch.empty_like(step)
        with device_of(x):
            _decay_kernel[(num_chunks, batch, triton.cdiv(num_heads, DECAY_HEADS))](
                dt,
                dt_bias,
                A,
                step,
                dA_cumsum,
                length,
                num_heads,
                step.shape[-1],
                CHUNK=launch.chunk,
                HEADS=DECAY_HEADS,
                HAS_BIAS=dt_bias is not None,
                SOFTPLUS=dt_softplus,
            )
            states, final_state = _chunk_states(x, B, step, dA_cumsum, initial_state, launch, reverse=False)
            y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
            CB = x.new_empty(batch, num_chunks, num_groups, launch.chunk, launch.chunk, dtype=torch.float32)
            heads = _heads_per_program(batch * num_chunks, num_heads // num_groups, num_groups, 792)
            _chunk_output_kernel[(num_heads // heads, batch * num_chunks)](
                x,
                B,
                C,
                D,
                step,
                dA_cumsum,
                states,
                CB,
                y,
                length,
                num_chunks,
                num_heads,
                num_heads // num_groups,
                heads,
                *x.stride()[:3],
                *B.stride()[:3],
                *C.stride()[:3],
                P=headdim,
                N=B.shape[-1],
                CHUNK=launch.chunk,
                BLOCK_N=launch.block_N,
                BLOCK_P=launch.block_P,
                HAS_D=D is not None,
                PRECISION=launch.precision,
                num_warps=launch.warps[1],
                num_stages=launch.stages[1],
            )
        ctx.save_for_backward(x, dt, A, B, C, D, dt_bias, initial_state, step, dA_cumsum, CB)
        ctx.dt_softplus, ctx.launch = dt_softplus, launch
        ctx.set_materialize_grads(False)
        return y, final_state

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        x, dt, A, B, C, D, dt_bias, initial_state, step, dA_cumsum, CB = ctx.saved_tensors
        launch = ctx.launch
        dy = torch.zeros_like(x) if gradients[0] is None else _aligned(gradients[0])
        dfinal_state = None if gradients[1] is None else gradients[1].contiguous()
        batch, length, num_heads, headdim = x.shape
        num_groups, d_state = B.shape[2:]
        num_chunks = triton.cdiv(length, launch.chunk)
        heads = _heads_per_program(batch * num_chunks, num_heads // num_groups, num_groups, 256)
        parts = num_heads // num_groups // heads
        sums_dtype = x.dtype if parts == 1 else torch.float32
        dBC = torch.empty(2, parts, *B.shape, dtype=sums_dtype, device=x.device)
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        dstep, da, da_state = (torch.empty_like(step) for _ in range(3))
        ddt = torch.empty_like(dt)
        # dA, ddt_bias and dD of each chunk, one sum for the three of them
        partial = x.new_zeros(3, batch * num_chunks, num_heads, dtype=torch.float32)
        with device_of(x):
            states, _ = _chunk_states(x, B, step, dA_cumsum, initial_state, launch, reverse=False)
            dstates, dinitial_state = _chunk_states(
                dy, C, step, dA_cumsum, dfinal_state, launch, reverse=True
            )
            _chunk_gradient_kernel[(num_heads // heads, batch * num_chunks)](
                x,
                B,
                C,
                CB,
                D,
                step,
                dA_cumsum,
                states,
                dstates,
                dy,
                dx,
                dBC[0],
                dBC[1],
                partial[2],
                dstep,
                da,
                da_state,
                length,
                num_chunks,
                num_heads,
                num_heads // num_groups,
                heads,
                *x.stride()[:3],
                *B.stride()[:3],
                *C.stride()[:3],
                *dy.stride()[:3],
                P=headdim,
                N=d_state,
                CHUNK=launch.chunk,
                BLOCK_N=launch.block_N,
                BLOCK_P=launch.block_P,
                HAS_D=D is not None,
                PRECISION=launch.precision,
                num_warps=launch.warps[2],
                num_stages=launch.stages[2],
            )
            _decay_backward_kernel[(num_chunks, batch, triton.cdiv(num_heads, DECAY_HEADS))](
                dt,
                dt_bias,
                A,
                step,
                dstep,
                da,
                da_state,
                ddt,
                partial[0],
                partial[1],
                length,
                num_heads,
                step.shape[-1],
                CHUNK=launch.chunk,
                HEADS=DECAY_HEADS,
                HAS_BIAS=dt_bias is not None,
                SOFTPLUS=ctx.dt_softplus,
            )
        dA, ddt_bias, dD = partial.sum(1)
        dB, dC = dBC[:, 0] if parts == 1 else dBC.sum(1).to(x.dtype)
        return (
            dx,
            ddt,
            dA.to(A.dtype),
            dB,
            dC,
            None if D is None else dD.to(D.dtype),
            None if dt_bias is None else ddt_bias.to(dt_bias.dtype),
            None,
            None if initial_state is None else dinitial_state.to(initial_state.dtype),
        )


def _chunk_states(
    values: Tensor,
    keys: Tensor,
    step: Tensor,
    dA_cumsum: Tensor,
    start: Tensor | None,
    launch: _Launch,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """States at the chunks' bounds [batch, chunks, H, N, P] and at the end [batch, H, P, N], float32."""
    batch, length, num_heads, headdim = values.shape
    d_state = keys.shape[-1]
    num_chunks = triton.cdiv(length, launch.chunk)
    states = values.new_empty(batch, num_chunks, num_heads, d_state, headdim)
    end = values.new_empty(batch, num_heads, headdim, d_state, dtype=torch.float32)
    _chunk_state_kernel[(batch * num_heads, triton.cdiv(headdim, launch.state_block_P))](
        values,
        keys,
        step,
        dA_cumsum,
        start,
        states,
        end,
        length,
        num_chunks,
        num_heads,
        num_heads // keys.shape[2],
        *values.stride()[:3],
        *keys.stride()[:3],
        P=headdim,
        N=d_state,
        CHUNK=launch.chunk,
        BLOCK_N=launch.block_N,
        BLOCK_P=launch.state_block_P,
        HAS_START=start is not None,
        REVERSE=reverse,
        PRECISION=launch.precision,
        num_warps=launch.warps[0],
        num_stages=launch.stages[0],
    )
    return states, end


def state_space_duality_reference(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition of ``state_space_duality``, one step after the other; float64 stays float64."""
    batch, length, num_heads, headdim = x.shape
    d_state = B.shape[-1]
    wide = torch.promote_types(x.dtype, torch.float32)
    values, step, rates = x.to(wide), dt.to(wide), A.to(wide)
    keys, queries = (v.to(wide).repeat_interleave(num_heads // B.shape[2], 2) for v in (B, C))
    if dt_bias is not None:
        step = step + dt_bias.to(wide)
    if dt_softplus:
        step = F.softplus(step)
    decay = torch.exp(step * rates)
    state = values.new_zeros(batch, num_heads, headdim, d_state)
    if initial_state is not None:
        state = initial_state.to(wide)
    outputs = []
    for t in range(length):
        update = (step[:, t, :, None] * values[:, t])[..., None] * keys[:, t, :, None, :]
        state = decay[:, t, :, None, None] * state + update
        outputs.append((state @ queries[:, t, :, :, None])[..., 0])
    y = torch.stack(outputs, 1)
    if D is not None:
        y = y + D.to(wide)[:, None] * values
    return y.to(x.dtype), state


def state_space_duality(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T; y_t = h_t C_t + D x_t (arXiv 2405.21060, section 6).

    Products of bfloat16 and float16 inputs run on tensor cores, with float32 sums; states between chunks are
    rounded to the dtype of ``x``. float32 inputs use three TF32 products for each one (close to float32's own
    rounding), never one. float64 inputs and CPU tensors use ``state_space_duality_reference``.

    Args:
        x: [batch, T, H, P]; bfloat16, float16, float32 or float64.
        dt: step sizes [batch, T, H], of any float dtype; positive, unless ``dt_softplus``.
        A: rates [H], negative: exponents are capped at zero, where rounded sums of large ones could pass it.
        B, C: [batch, T, G, N], of the dtype of ``x``; head h belongs to group h // (H / G).
        D: skip weights [H]. dt_bias: added to ``dt`` before the softplus [H].
        dt_softplus: apply softplus to ``dt`` (plus ``dt_bias``).
        initial_state: [batch, H, P, N]; zero if not given.

    Returns:
        y like ``x``, and the final state [batch, H, P, N], float32 (float64 for float64 inputs). Both have
        gradients to every argument.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    _check(x, dt, A, B, C, D, dt_bias, initial_state)
    if not runs_on_triton(x):
        return state_space_duality_reference(x, dt, A, B, C, D, dt_bias, dt_softplus, initial_state)
    result: tuple[Tensor, Tensor] = _StateSpaceDuality.apply(
        x, dt, A, B, C, D, dt_bias, dt_softplus, initial_state
    )
    return result


def _check(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
) -> None:
    if x.ndim != 4 or B.ndim != 4:
        raise ValueError(
            f"x has {x.ndim} dimensions and B {B.ndim}; give x as [batch, T, H, P] and B as [batch, T, G, N]"
        )
    batch, length, num_heads, headdim = x.shape
    num_groups, d_state = B.shape[2:]
    if 0 in (batch, length, num_heads, headdim, num_groups, d_state):
        raise ValueError(f"x {tuple(x.shape)} or B {tuple(B.shape)} is empty; give at least one of each")
    if num_heads % num_groups:
        raise ValueError(f"{num_heads} heads cannot be shared out to {num_groups} groups; make G divide H")
    if B.dtype != x.dtype or C.dtype != x.dtype:
        raise ValueError(f"x, B and C have dtypes {x.dtype}, {B.dtype}, {C.dtype}; convert them to one")
    expected: list[tuple[str, Tensor | None, tuple[int, ...]]] = [
        ("dt", dt, (batch, length, num_heads)),
        ("A", A, (num_heads,)),
        ("B", B, (batch, length, num_groups, d_state)),
        ("C", C, (batch, length, num_groups, d_state)),
        ("D", D, (num_heads,)),
        ("dt_bias", dt_bias, (num_heads,)),
        ("initial_state", initial_state, (batch, num_heads, headdim, d_state)),
    ]
    check_operands(x, expected)
