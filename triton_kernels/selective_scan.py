"""The selective scan of Mamba-1, S6 (Gu & Dao 2023, arXiv 2312.00752, section 3), forward and backward.

    h_t = exp(delta_t A) h_{t-1} + delta_t u_t B_t        y_t = h_t . C_t + D u_t,  times silu(z_t)

with one decay for every channel and state, so there is no matrix product in it. Time is cut into chunks of
``CHUNK`` steps, which all run at once:

1. ``_chunk_end_kernel``: what a chunk adds to the state at its end, if it began with none. The decay from a
   step to the end is the exponential of A times a sum of step sizes, so this needs no recurrence.
2. ``_carry_kernel``: the state before each chunk.
3. ``_scan_kernel``: the recurrence inside a chunk, and y.

Backward runs 1 and 2 from the end for the gradient of the state after each chunk, then
``_scan_backward_kernel``, which computes a chunk's states again from the one kept before it. Exponents are
sums of steps times A, never differences of large logarithms, and nothing is divided by a decay: with
negative A nothing can overflow.

A program is one warp: 32 channels, one a lane, with all steps of a chunk in the lane's registers, so that
scans and sums over time need no other lane. It comes from keeping the integer arguments unspecialized:
unaware that rows are aligned, the compiler does not vectorize over channels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from triton_kernels.dispatch import check_operands, device_of, runs_on_triton
from triton_kernels.softplus import stable_softplus

CHUNK = 16
CHANNELS = 32
CARRIED = 256
"""States of one program of the carry kernel."""
LOG2_E = tl.constexpr(1.4426950408889634)
SIZES = [
    "length",
    "channels",
    "num_chunks",
    "u_batch_stride",
    "u_time_stride",
    "delta_batch_stride",
    "delta_time_stride",
    "z_batch_stride",
    "z_time_stride",
    "dout_batch_stride",
    "dout_time_stride",
    "values_batch_stride",
    "values_time_stride",
]


@triton.jit
def _compose(decay, update, next_decay, next_update):
    return decay * next_decay, next_decay * update + next_update


@triton.jit
def _step_sizes(delta_ptr, offset, mask, bias, SOFTPLUS: tl.constexpr):
    """delta plus its bias through softplus; zero outside, where the state then stays as it is."""
    delta = tl.load(delta_ptr + offset, mask=mask, other=0.0).to(tl.float32) + bias[None, :]
    if SOFTPLUS:
        delta = stable_softplus(delta)
    return tl.where(mask, delta, 0.0)


@triton.jit(do_not_specialize=SIZES)
def _chunk_end_kernel(
    values_ptr,
    z_ptr,
    delta_ptr,
    delta_bias_ptr,
    A_ptr,
    keys_ptr,
    states_ptr,
    total_ptr,
    length,
    channels,
    num_chunks,
    values_batch_stride,
    values_time_stride,
    z_batch_stride,
    z_time_stride,
    delta_batch_stride,
    delta_time_stride,
    N: tl.constexpr,
    STEPS: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    HAS_Z: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """The state at a chunk's end without the state before it; REVERSE: the gradient before.

    Forward: values u, keys B. REVERSE: values the gradient of the output, keys C.
    """
    batch = (tl.program_id(1) // num_chunks).to(tl.int64)
    chunk = tl.program_id(1) % num_chunks
    t = chunk * STEPS + tl.arange(0, STEPS)
    d = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    in_time = t < length
    in_channels = d < channels
    mask = in_time[:, None] & in_channels[None, :]
    time = t[:, None].to(tl.int64)
    bias = tl.zeros([WIDTH], tl.float32)
    if HAS_BIAS:
        bias = tl.load(delta_bias_ptr + d, mask=in_channels, other=0.0).to(tl.float32)
    delta_base = delta_ptr + batch * delta_batch_stride
    delta = _step_sizes(delta_base, time * delta_time_stride + d[None, :], mask, bias, SOFTPLUS)
    values = tl.load(
        values_ptr + batch * values_batch_stride + time * values_time_stride + d[None, :],
        mask=mask,
        other=0.0,
    ).to(tl.float32)
    through = tl.cumsum(delta, 0)
    total = tl.sum(delta, 0)
    if REVERSE:
        if HAS_Z:
            z_base = z_ptr + batch * z_batch_stride
            z = tl.load(z_base + time * z_time_stride + d[None, :], mask=mask, other=0.0).to(tl.float32)
            values *= z * tl.sigmoid(z)
        span = through
    else:
        values *= delta
        span = tl.maximum(total[None, :] - through, 0.0)
        tl.store(total_ptr + tl.program_id(1).to(tl.int64) * channels + d, total, mask=in_channels)
    keys_base = keys_ptr + batch * N * length + t
    states_base = states_ptr + tl.program_id(1).to(tl.int64) * N * channels + d
    for n in range(N):
        A = tl.load(A_ptr + d * N + n, mask=in_channels, other=0.0).to(tl.float32) * LOG2_E
        key = tl.load(keys_base + n * length, mask=in_time, other=0.0).to(tl.float32)
        end = tl.sum(tl.exp2(span * A[None, :]) * values * key[:, None], 0)
        tl.store(states_base + n * channels, end, mask=in_channels)


@triton.jit
def _carry_kernel(
    states_ptr,
    total_ptr,
    A_ptr,
    start_ptr,
    end_ptr,
    channels,
    num_chunks,
    N: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_START: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """Replace what each chunk adds by what comes to it from the chunks before (REVERSE: after) it."""
    batch = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    mask = i < N * channels
    n = i // channels
    d = i % channels
    A = tl.load(A_ptr + d * N + n, mask=mask, other=0.0).to(tl.float32) * LOG2_E
    outer = batch * channels * N + d * N + n
    state = tl.zeros([WIDTH], tl.float32)
    if HAS_START:
        state = tl.load(start_ptr + outer, mask=mask, other=0.0).to(tl.float32)
    for j in range(num_chunks):
        chunk = j
        if REVERSE:
            chunk = num_chunks - 1 - j
        row = batch * num_chunks + chunk
        added = tl.load(states_ptr + row * N * channels + i, mask=mask, other=0.0)
        total = tl.load(total_ptr + row * channels + d, mask=mask, other=0.0)
        tl.store(states_ptr + row * N * channels + i, state, mask=mask)
        state = state * tl.exp2(A * total) + added
    tl.store(end_ptr + outer, state, mask=mask)


@triton.jit(do_not_specialize=SIZES)
def _scan_kernel(
    u_ptr,
    delta_ptr,
    delta_bias_ptr,
    A_ptr,
    B_ptr,
    C_ptr,
    D_ptr,
    z_ptr,
    states_ptr,
    y_ptr,
    length,
    channels,
    num_chunks,
    u_batch_stride,
    u_time_stride,
    delta_batch_stride,
    delta_time_stride,
    z_batch_stride,
    z_time_stride,
    N: tl.constexpr,
    STEPS: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_Z: tl.constexpr,
):
    """y of one chunk from the state before it."""
    batch = (tl.program_id(1) // num_chunks).to(tl.int64)
    chunk = tl.program_id(1) % num_chunks
    offset = tl.arange(0, STEPS)
    t = chunk * STEPS + offset
    d = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    in_time = t < length
    in_channels = d < channels
    mask = in_time[:, None] & in_channels[None, :]
    time = t[:, None].to(tl.int64)
    bias = tl.zeros([WIDTH], tl.float32)
    if HAS_BIAS:
        bias = tl.load(delta_bias_ptr + d, mask=in_channels, other=0.0).to(tl.float32)
    delta_base = delta_ptr + batch * delta_batch_stride
    delta = _step_sizes(delta_base, time * delta_time_stride + d[None, :], mask, bias, SOFTPLUS)
    u = tl.load(u_ptr + batch * u_batch_stride + time * u_time_stride + d[None, :], mask=mask, other=0.0)
    u = u.to(tl.float32)
    delta_u = delta * u
    y = tl.zeros([STEPS, WIDTH], tl.float32)
    if HAS_D:
        y = u * tl.load(D_ptr + d, mask=in_channels, other=0.0).to(tl.float32)[None, :]
    B_base = B_ptr + batch * N * length + t
    C_base = C_ptr + batch * N * length + t
    states_base = states_ptr + tl.program_id(1).to(tl.int64) * N * channels + d
    first = offset[:, None] == 0
    for n in range(N):
        A = tl.load(A_ptr + d * N + n, mask=in_channels, other=0.0).to(tl.float32) * LOG2_E
        B = tl.load(B_base + n * length, mask=in_time, other=0.0).to(tl.float32)
        C = tl.load(C_base + n * length, mask=in_time, other=0.0).to(tl.float32)
        start = tl.load(states_base + n * channels, mask=in_channels, other=0.0)
        decay = tl.exp2(delta * A[None, :])
        update = delta_u * B[:, None] + tl.where(first, decay * start[None, :], 0.0)
        _, h = tl.associative_scan((decay, update), 0, _compose)
        y += h * C[:, None]
    if HAS_Z:
        z_base = z_ptr + batch * z_batch_stride
        z = tl.load(z_base + time * z_time_stride + d[None, :], mask=mask, other=0.0).to(tl.float32)
        y *= z * tl.sigmoid(z)
    tl.store(y_ptr + (batch * length + time) * channels + d[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=SIZES)
def _scan_backward_kernel(
    u_ptr,
    delta_ptr,
    delta_bias_ptr,
    A_ptr,
    B_ptr,
    C_ptr,
    D_ptr,
    z_ptr,
    states_ptr,
    dstates_ptr,
    dout_ptr,
    du_ptr,
    ddelta_ptr,
    dz_ptr,
    dA_ptr,
    dB_ptr,
    dC_ptr,
    dD_ptr,
    ddelta_bias_ptr,
    length,
    channels,
    num_chunks,
    u_batch_stride,
    u_time_stride,
    delta_batch_stride,
    delta_time_stride,
    z_batch_stride,
    z_time_stride,
    dout_batch_stride,
    dout_time_stride,
    N: tl.constexpr,
    STEPS: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_Z: tl.constexpr,
):
    """All gradients of one chunk; those of A, B, C, D and the bias are parts that the caller sums."""
    batch = (tl.program_id(1) // num_chunks).to(tl.int64)
    chunk = tl.program_id(1) % num_chunks
    row = tl.program_id(1).to(tl.int64)
    offset = tl.arange(0, STEPS)
    t = chunk * STEPS + offset
    d = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    in_time = t < length
    in_channels = d < channels
    mask = in_time[:, None] & in_channels[None, :]
    time = t[:, None].to(tl.int64)
    bias = tl.zeros([WIDTH], tl.float32)
    if HAS_BIAS:
        bias = tl.load(delta_bias_ptr + d, mask=in_channels, other=0.0).to(tl.float32)
    delta_base = delta_ptr + batch * delta_batch_stride + d[None, :]
    delta = _step_sizes(delta_base, time * delta_time_stride, mask, bias, SOFTPLUS)
    next_mask = (t[:, None] + 1 < length) & in_channels[None, :]
    next_delta = _step_sizes(delta_base, (time + 1) * delta_time_stride, next_mask, bias, SOFTPLUS)
    u = tl.load(u_ptr + batch * u_batch_stride + time * u_time_stride + d[None, :], mask=mask, other=0.0)
    u = u.to(tl.float32)
    delta_u = delta * u
    dout_base = dout_ptr + batch * dout_batch_stride
    dy = tl.load(dout_base + time * dout_time_stride + d[None, :], mask=mask, other=0.0).to(tl.float32)
    if HAS_Z:
        z_base = z_ptr + batch * z_batch_stride
        z = tl.load(z_base + time * z_time_stride + d[None, :], mask=mask, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(z)
        dgate = dy * sigmoid * (1.0 + z * (1.0 - sigmoid))
        dy *= z * sigmoid
        y = tl.zeros([STEPS, WIDTH], tl.float32)
    g_B = tl.zeros([STEPS, WIDTH], tl.float32)
    ddelta = tl.zeros([STEPS, WIDTH], tl.float32)
    B_base = B_ptr + batch * N * length + t
    C_base = C_ptr + batch * N * length + t
    states_base = row * N * channels + d
    sums_base = ((tl.program_id(0) * (tl.num_programs(1) // num_chunks) + batch) * N) * length + t
    first = offset[:, None] == 0
    last = offset[:, None] == STEPS - 1
    for n in range(N):
        A = tl.load(A_ptr + d * N + n, mask=in_channels, other=0.0).to(tl.float32)
        B = tl.load(B_base + n * length, mask=in_time, other=0.0).to(tl.float32)
        C = tl.load(C_base + n * length, mask=in_time, other=0.0).to(tl.float32)
        start = tl.load(states_ptr + states_base + n * channels, mask=in_channels, other=0.0)
        dend = tl.load(dstates_ptr + states_base + n * channels, mask=in_channels, other=0.0)
        exponent = (A * LOG2_E)[None, :]
        decay = tl.exp2(delta * exponent)
        added = delta_u * B[:, None]
        update = added + tl.where(first, decay * start[None, :], 0.0)
        _, h = tl.associative_scan((decay, update), 0, _compose)
        next_decay = tl.exp2(next_delta * exponent)
        dupdate = dy * C[:, None] + tl.where(last, dend[None, :], 0.0)
        # flipped by hand: in a lane's registers that is free, where reverse=True would flip across lanes
        reversed_terms = (tl.flip(next_decay, 0), tl.flip(dupdate, 0))
        _, g = tl.associative_scan(reversed_terms, 0, _compose)
        g = tl.flip(g, 0)
        if HAS_Z:
            y += h * C[:, None]
        tl.store(dC_ptr + sums_base + n * length, tl.sum(h * dy, 1), mask=in_time)
        tl.store(dB_ptr + sums_base + n * length, tl.sum(g * delta_u, 1), mask=in_time)
        g_B += g * B[:, None]
        g_decayed = g * (h - added)
        ddelta += g_decayed * A[None, :]
        tl.store(dA_ptr + states_base + n * channels, tl.sum(g_decayed * delta, 0), mask=in_channels)
    ddelta += g_B * u
    du = g_B * delta
    if HAS_D:
        D = tl.load(D_ptr + d, mask=in_channels, other=0.0).to(tl.float32)[None, :]
        du += dy * D
        tl.store(dD_ptr + row * channels + d, tl.sum(dy * u, 0), mask=in_channels)
        if HAS_Z:
            y += u * D
    place = (batch * length + time) * channels + d[None, :]
    if HAS_Z:
        tl.store(dz_ptr + place, (dgate * y).to(dz_ptr.dtype.element_ty), mask=mask)
    if SOFTPLUS:
        raw = tl.load(delta_base + time * delta_time_stride, mask=mask, other=0.0).to(tl.float32)
        ddelta *= tl.sigmoid(raw + bias[None, :])
    ddelta = tl.where(mask, ddelta, 0.0)
    if HAS_BIAS:
        tl.store(ddelta_bias_ptr + row * channels + d, tl.sum(ddelta, 0), mask=in_channels)
    tl.store(du_ptr + place, du.to(du_ptr.dtype.element_ty), mask=mask)
    tl.store(ddelta_ptr + place, ddelta.to(ddelta_ptr.dtype.element_ty), mask=mask)


def _dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _outer_strides(x: Tensor | None) -> tuple[int, int]:
    return (0, 0) if x is None else (x.stride(0), x.stride(1))


def _carried_states(
    values: Tensor,
    z: Tensor | None,
    delta: Tensor,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    A: Tensor,
    keys: Tensor,
    total: Tensor,
    start: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """States before all chunks [batch, chunks, N, D] (reverse: gradients after them), and that at the end."""
    batch, length, channels = values.shape
    d_state = A.shape[1]
    num_chunks = total.shape[1]
    states = values.new_empty(batch, num_chunks, d_state, channels, dtype=torch.float32)
    end = values.new_empty(batch, channels, d_state, dtype=torch.float32)
    _chunk_end_kernel[(triton.cdiv(channels, CHANNELS), batch * num_chunks)](
        values,
        z,
        delta,
        delta_bias,
        A,
        keys,
        states,
        total,
        length,
        channels,
        num_chunks,
        *_outer_strides(values),
        *_outer_strides(z),
        *_outer_strides(delta),
        N=d_state,
        STEPS=CHUNK,
        WIDTH=CHANNELS,
        HAS_BIAS=delta_bias is not None,
        SOFTPLUS=delta_softplus,
        HAS_Z=z is not None,
        REVERSE=reverse,
        num_warps=1,
    )
    _carry_kernel[(triton.cdiv(channels * d_state, CARRIED), batch)](
        states,
        total,
        A,
        start,
        end,
        channels,
        num_chunks,
        N=d_state,
        WIDTH=CARRIED,
        HAS_START=start is not None,
        REVERSE=reverse,
        num_warps=2,
    )
    return states, end


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        delta_bias: Tensor | None,
        delta_softplus: bool,
        initial_state: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        u, delta = _dense_rows(u), _dense_rows(delta)
        # [batch, N, L]: the steps of a chunk then lie at fixed distances from one pointer
        B, C = (v.transpose(1, 2).contiguous() for v in (B, C))
        A = A.contiguous()
        z = None if z is None else _dense_rows(z)
        start = None if initial_state is None else initial_state.contiguous()
        batch, length, channels = u.shape
        num_chunks = triton.cdiv(length, CHUNK)
        total = u.new_empty(batch, num_chunks, channels, dtype=torch.float32)
        y = torch.empty(u.shape, dtype=u.dtype, device=u.device)
        with device_of(u):
            states, final_state = _carried_states(
                u, None, delta, delta_bias, delta_softplus, A, B, total, start, reverse=False
            )
            _scan_kernel[(triton.cdiv(channels, CHANNELS), batch * num_chunks)](
                u,
                delta,
                delta_bias,
                A,
                B,
                C,
                D,
                z,
                states,
                y,
                length,
                channels,
                num_chunks,
                *_outer_strides(u),
                *_outer_strides(delta),
                *_outer_strides(z),
                N=A.shape[1],
                STEPS=CHUNK,
                WIDTH=CHANNELS,
                HAS_BIAS=delta_bias is not None,
                SOFTPLUS=delta_softplus,
                HAS_D=D is not None,
                HAS_Z=z is not None,
                num_warps=1,
            )
        ctx.save_for_backward(u, delta, A, B, C, D, z, delta_bias, initial_state, states, total)
        ctx.delta_softplus = delta_softplus
        ctx.set_materialize_grads(False)
        return y, final_state

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        u, delta, A, B, C, D, z, delta_bias, initial_state, states, total = ctx.saved_tensors
        dout = torch.zeros_like(u) if gradients[0] is None else _dense_rows(gradients[0])
        dfinal_state = None if gradients[1] is None else gradients[1].contiguous()
        batch, length, channels = u.shape
        d_state = A.shape[1]
        num_chunks = total.shape[1]
        blocks = triton.cdiv(channels, CHANNELS)
        du, ddelta = (torch.empty(v.shape, dtype=v.dtype, device=v.device) for v in (u, delta))
        dz = None if z is None else torch.empty(z.shape, dtype=z.dtype, device=z.device)
        dA = torch.empty_like(states)
        # parts of dB and dC from each block of channels, of dD and ddelta_bias from each chunk
        dBC = u.new_empty(2, blocks, batch, d_state, length, dtype=torch.float32)
        per_channel = u.new_empty(2, batch * num_chunks, channels, dtype=torch.float32)
        with device_of(u):
            dstates, dinitial_state = _carried_states(
                dout, z, delta, delta_bias, ctx.delta_softplus, A, C, total, dfinal_state, reverse=True
            )
            _scan_backward_kernel[(blocks, batch * num_chunks)](
                u,
                delta,
                delta_bias,
                A,
                B,
                C,
                D,
                z,
                states,
                dstates,
                dout,
                du,
                ddelta,
                dz,
                dA,
                dBC[0],
                dBC[1],
                per_channel[0],
                per_channel[1],
                length,
                channels,
                num_chunks,
                *_outer_strides(u),
                *_outer_strides(delta),
                *_outer_strides(z),
                *_outer_strides(dout),
                N=d_state,
                STEPS=CHUNK,
                WIDTH=CHANNELS,
                HAS_BIAS=delta_bias is not None,
                SOFTPLUS=ctx.delta_softplus,
                HAS_D=D is not None,
                HAS_Z=z is not None,
                num_warps=1,
            )
        dB, dC = dBC.sum(1).transpose(-1, -2).to(B.dtype)
        return (
            du,
            ddelta,
            dA.sum((0, 1)).t().to(A.dtype),
            dB,
            dC,
            None if D is None else per_channel[0].sum(0).to(D.dtype),
            dz,
            None if delta_bias is None else per_channel[1].sum(0).to(delta_bias.dtype),
            None,
            None if initial_state is None else dinitial_state.to(initial_state.dtype),
        )


def selective_scan_reference(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition of ``selective_scan``, one step after the other; float64 stays float64."""
    wide = torch.promote_types(u.dtype, torch.float32)
    values, step, rates, keys, queries = (v.to(wide) for v in (u, delta, A, B, C))
    if delta_bias is not None:
        step = step + delta_bias.to(wide)
    if delta_softplus:
        step = F.softplus(step)
    state = values.new_zeros(u.shape[0], *A.shape)
    if initial_state is not None:
        state = initial_state.to(wide)
    outputs = []
    for t in range(u.shape[1]):
        update = (step[:, t] * values[:, t])[..., None] * keys[:, t, None, :]
        state = torch.exp(step[:, t, :, None] * rates) * state + update
        outputs.append((state @ queries[:, t, :, None])[..., 0])
    y = torch.stack(outputs, 1)
    if D is not None:
        y = y + D.to(wide) * values
    if z is not None:
        y = y * F.silu(z.to(wide))
    return y.to(u.dtype), state


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """h_t = exp(delta_t A) h_{t-1} + delta_t u_t B_t; y_t = (h_t . C_t + D u_t) silu(z_t) (arXiv 2312.00752).

    Time is the middle axis of all sequences. Kernels compute in float32; float64 inputs and CPU tensors use
    ``selective_scan_reference``.

    Args:
        u: [batch, L, D]; bfloat16, float16, float32 or float64.
        delta: step sizes [batch, L, D], of any float dtype; positive, unless ``delta_softplus``.
        A: rates [D, N], negative.
        B, C: [batch, L, N], of any one float dtype.
        D: skip weights [D]. z: gate [batch, L, D]. delta_bias: added to ``delta`` before the softplus [D].
        delta_softplus: apply softplus to ``delta`` (plus ``delta_bias``).
        initial_state: [batch, D, N]; zero if not given.

    Returns:
        y like ``u``, and the final state [batch, D, N], float32 (float64 for float64 inputs). Both have
        gradients to every argument.

    Raises:
        ValueError: shapes or devices do not fit.
    """
    if u.ndim != 3 or A.ndim != 2 or 0 in (*u.shape, *A.shape):
        raise ValueError(
            f"u has shape {tuple(u.shape)} and A {tuple(A.shape)}; "
            "give [batch, L, D] and [D, N], none of them 0"
        )
    if B.dtype != C.dtype:
        raise ValueError(f"B and C have dtypes {B.dtype} and {C.dtype}; convert them to one")
    batch, length, channels = u.shape
    d_state = A.shape[1]
    expected: list[tuple[str, Tensor | None, tuple[int, ...]]] = [
        ("delta", delta, (batch, length, channels)),
        ("A", A, (channels, d_state)),
        ("B", B, (batch, length, d_state)),
        ("C", C, (batch, length, d_state)),
        ("D", D, (channels,)),
        ("z", z, (batch, length, channels)),
        ("delta_bias", delta_bias, (channels,)),
        ("initial_state", initial_state, (batch, channels, d_state)),
    ]
    check_operands(u, expected)
    if not runs_on_triton(u):
        return selective_scan_reference(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state)
    result: tuple[Tensor, Tensor] = _SelectiveScan.apply(
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state
    )
    return result
