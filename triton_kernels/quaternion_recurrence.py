"""The quaternion recurrence h_t = q_t h_{t-1} + u_t of every channel for itself, and the product q_t ... q_1.

Steps compose as (q, u) then (r, v) = (r q, r u + v), which is associative though quaternions do not commute
(Blelloch 1990, "Prefix sums and their applications", section 1.4.1). The gradient is the same recurrence from
the
end: g_t = dh_t + q*_{t+1} g_{t+1}, du_t = g_t, dq_t = g_t h*_{t-1}.

Cost: forward reads q and u and writes h, 12 numbers a step and channel for 36 multiply-adds of the recurrence
    (twice that as a scan): bound by bytes. Backward reads q, dh and h and writes dq and du, 20 numbers.

A program is one warp: 32 channels, one a lane, with ``STEPS`` steps in the lane's registers, so that the scan
needs no other lane; it comes from keeping the integer arguments unspecialized, see ``selective_scan``. It
walks through time alone where there are channels enough to fill a GPU. With fewer, time is cut into segments
that all run at once, after a first pass over each for what it does to the state and the same recurrence over
these: O(log T) deep but for the steps of a segment, and 8 numbers more to read.

``quaternion_scan`` is the recurrence with a read-out, where channels share their q, as matrix products.
"""

from __future__ import annotations

from typing import Any

import torch
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

STEPS = 8
"""Steps that a lane holds at once."""
CHANNELS = 32
SEGMENT = 64
"""Fewest steps of a segment."""
PROGRAMS = 1056
"""Programs that fill a GPU: eight for each multiprocessor of an H100 or H200."""
SIZES = [
    "length",
    "channels",
    "segment_length",
    "q_batch",
    "q_time",
    "q_channel",
    "q_component",
    "u_batch",
    "u_time",
    "u_channel",
    "u_component",
    "h_batch",
    "h_time",
    "h_channel",
    "h_component",
    "dq_batch",
    "dq_time",
    "dq_channel",
    "dq_component",
]


@triton.jit
def _compose(q0, q1, q2, q3, u0, u1, u2, u3, r0, r1, r2, r3, v0, v1, v2, v3):
    p0, p1, p2, p3 = hamilton(r0, r1, r2, r3, q0, q1, q2, q3)
    w0, w1, w2, w3 = hamilton(r0, r1, r2, r3, u0, u1, u2, u3)
    return p0, p1, p2, p3, w0 + v0, w1 + v1, w2 + v2, w3 + v3


@triton.jit
def _take_last(x, last):
    return tl.sum(tl.where(last, x, 0.0), 0)


@triton.jit(do_not_specialize=SIZES)
def _recurrence_kernel(
    q_ptr,
    u_ptr,
    start_ptr,
    h_ptr,
    end_ptr,
    product_ptr,
    states_ptr,
    initial_ptr,
    dq_ptr,
    length,
    channels,
    segment_length,
    q_batch,
    q_time,
    q_channel,
    q_component,
    u_batch,
    u_time,
    u_channel,
    u_component,
    h_batch,
    h_time,
    h_channel,
    h_component,
    dq_batch,
    dq_time,
    dq_channel,
    dq_component,
    STEPS: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_START: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    REVERSE: tl.constexpr,
    TOTALS: tl.constexpr,
    GRADIENT: tl.constexpr,
):
    """h of all steps of a segment from the state before it in ``start`` [batch, segments, D, 4].

    REVERSE: steps are taken from the last to the first, each with the conjugate q of the step after it in
        time (one at the last step); ``end`` is then q*_0 g_0. TOTALS: only the composition of a segment,
        (product, end). GRADIENT, with REVERSE: h is du, and dq comes from ``states``, the h of forward, and
        ``initial`` before them.
    """
    batch = tl.program_id(1).to(tl.int64)
    segment = tl.program_id(2)
    d = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    in_channels = d < channels
    offset = tl.arange(0, STEPS)
    first = offset[:, None] == 0
    last = offset[:, None] == STEPS - 1
    outer = ((batch * tl.num_programs(2) + segment) * channels + d) * 4
    p0 = tl.full([WIDTH], 1.0, tl.float32)
    p1 = tl.zeros([WIDTH], tl.float32)
    p2 = tl.zeros([WIDTH], tl.float32)
    p3 = tl.zeros([WIDTH], tl.float32)
    s0 = tl.zeros([WIDTH], tl.float32)
    s1 = tl.zeros([WIDTH], tl.float32)
    s2 = tl.zeros([WIDTH], tl.float32)
    s3 = tl.zeros([WIDTH], tl.float32)
    if HAS_START:
        s0, s1, s2, s3 = load_quaternion(start_ptr, outer, 1, in_channels)
    channel = d[None, :].to(tl.int64)
    for block in range(tl.cdiv(segment_length, STEPS)):
        i = block * STEPS + offset
        # number of the step in the order it is taken
        step = segment * segment_length + i
        inside = (i < segment_length) & (step < length)
        t = step
        q_t = t
        if REVERSE:
            t = length - 1 - step
            q_t = length - step
        mask = inside[:, None] & in_channels[None, :]
        # steps beyond the end keep the state; so does the q "after" the last step
        q_mask = (inside & (q_t < length))[:, None] & in_channels[None, :]
        q_place = batch * q_batch + q_t[:, None].to(tl.int64) * q_time + channel * q_channel
        q0, q1, q2, q3 = load_quaternion(q_ptr, q_place, q_component, q_mask)
        q0 = tl.where(q_mask, q0, 1.0)
        if REVERSE:
            q1, q2, q3 = -q1, -q2, -q3
        time = t[:, None].to(tl.int64)
        u_place = batch * u_batch + time * u_time + channel * u_channel
        u0, u1, u2, u3 = load_quaternion(u_ptr, u_place, u_component, mask)
        c0, c1, c2, c3 = hamilton(q0, q1, q2, q3, s0[None, :], s1[None, :], s2[None, :], s3[None, :])
        u0 += tl.where(first, c0, 0.0)
        u1 += tl.where(first, c1, 0.0)
        u2 += tl.where(first, c2, 0.0)
        u3 += tl.where(first, c3, 0.0)
        q0, q1, q2, q3, u0, u1, u2, u3 = tl.associative_scan((q0, q1, q2, q3, u0, u1, u2, u3), 0, _compose)
        if not TOTALS:
            h_place = batch * h_batch + time * h_time + channel * h_channel
            store_quaternion(h_ptr, h_place, h_component, u0, u1, u2, u3, mask)
        if GRADIENT:
            before = time - 1
            b_mask = mask & (before >= 0)
            b_place = batch * h_batch + before * h_time + channel * h_channel
            h0, h1, h2, h3 = load_quaternion(states_ptr, b_place, h_component, b_mask)
            if HAS_INITIAL:
                earliest = mask & (time == 0)
                i_place = (batch * channels + channel) * 4 + time * 0
                i0, i1, i2, i3 = load_quaternion(initial_ptr, i_place, 1, earliest)
                h0, h1, h2, h3 = h0 + i0, h1 + i1, h2 + i2, h3 + i3
            d0, d1, d2, d3 = hamilton(u0, u1, u2, u3, h0, -h1, -h2, -h3)
            dq_place = batch * dq_batch + time * dq_time + channel * dq_channel
            store_quaternion(dq_ptr, dq_place, dq_component, d0, d1, d2, d3, mask)
        s0, s1, s2, s3 = (
            _take_last(u0, last),
            _take_last(u1, last),
            _take_last(u2, last),
            _take_last(u3, last),
        )
        if TOTALS:
            l0, l1, l2, l3 = (
                _take_last(q0, last),
                _take_last(q1, last),
                _take_last(q2, last),
                _take_last(q3, last),
            )
            p0, p1, p2, p3 = hamilton(l0, l1, l2, l3, p0, p1, p2, p3)
    if TOTALS:
        store_quaternion(product_ptr, outer, 1, p0, p1, p2, p3, in_channels)
        store_quaternion(end_ptr, outer, 1, s0, s1, s2, s3, in_channels)
    elif segment == tl.num_programs(2) - 1:
        if REVERSE:
            q_place = batch * q_batch + d.to(tl.int64) * q_channel
            q0, q1, q2, q3 = load_quaternion(q_ptr, q_place, q_component, in_channels)
            s0, s1, s2, s3 = hamilton(q0, -q1, -q2, -q3, s0, s1, s2, s3)
        end = (batch * channels + d) * 4
        store_quaternion(end_ptr, end, 1, s0, s1, s2, s3, in_channels)


def _segment_length(batch: int, length: int, channels: int) -> int:
    """Steps of a segment: all of them if the channels alone make enough programs."""
    programs = batch * -(-channels // CHANNELS)
    segments = min(-(-PROGRAMS // programs), -(-length // SEGMENT))
    return -(-length // segments)


def _run(
    q: Tensor,
    u: Tensor,
    start: Tensor | None,
    h: Tensor,
    reverse: bool,
    states: Tensor | None = None,
    initial: Tensor | None = None,
    dq: Tensor | None = None,
) -> Tensor:
    """Fill ``h`` (and ``dq``) and return the state at the end [batch, D, 4], float32."""
    batch, length, channels = q.shape[:3]
    segment_length = _segment_length(batch, length, channels)
    segments = triton.cdiv(length, segment_length)
    end = torch.empty(batch, channels, 4, dtype=torch.float32, device=q.device)

    def launch(start: Tensor | None, end: Tensor, product: Tensor | None) -> None:
        gradient = dq is not None and product is None
        _recurrence_kernel[(triton.cdiv(channels, CHANNELS), batch, segments)](
            q,
            u,
            start,
            h,
            end,
            product,
            states,
            initial,
            dq,
            length,
            channels,
            segment_length,
            *q.stride(),
            *u.stride(),
            *h.stride(),
            *(h if dq is None else dq).stride(),
            STEPS=STEPS,
            WIDTH=CHANNELS,
            HAS_START=start is not None,
            HAS_INITIAL=initial is not None,
            REVERSE=reverse,
            TOTALS=product is not None,
            GRADIENT=gradient,
            num_warps=1,
        )

    if segments > 1:
        product, added = torch.empty(2, batch, segments, channels, 4, dtype=torch.float32, device=q.device)
        launch(None, added, product)
        through = torch.empty_like(added)
        _run(product, added, start, through, reverse=False)
        before = torch.zeros_like(through[:, :1]) if start is None else start[:, None].float()
        start = torch.cat([before, through[:, :-1]], 1)
    launch(start, end, None)
    return end


class _QuaternionRecurrence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, u: Tensor, initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
        start = None if initial_state is None else initial_state.contiguous()
        h = torch.empty_like(u)
        with device_of(q):
            final_state = _run(q, u, start, h, reverse=False)
        ctx.save_for_backward(q, h, start)
        ctx.set_materialize_grads(False)
        return h, final_state

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        q, h, start = ctx.saved_tensors
        dh = torch.zeros_like(h) if gradients[0] is None else gradients[0]
        dfinal_state = None if gradients[1] is None else gradients[1].contiguous()
        du = torch.empty_strided(h.shape, h.stride(), dtype=h.dtype, device=h.device)
        dq = torch.empty_like(q)
        with device_of(q):
            dstart = _run(q, dh, dfinal_state, du, reverse=True, states=h, initial=start, dq=dq)
        return dq, du, None if start is None else dstart.to(start.dtype)


def quaternion_recurrence_reference(
    q: Tensor, u: Tensor, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The definition of ``quaternion_recurrence``, one step after the other; float64 stays float64."""
    wide = torch.promote_types(q.dtype, torch.float32)
    factors, updates = q.to(wide), u.to(wide)
    state = torch.zeros_like(updates[:, 0]) if initial_state is None else initial_state.to(wide)
    states = []
    for t in range(q.shape[1]):
        state = quaternion_product_reference(factors[:, t], state) + updates[:, t]
        states.append(state)
    return torch.stack(states, 1).to(q.dtype), state


def quaternion_recurrence(q: Tensor, u: Tensor, initial_state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """h_t = q_t h_{t-1} + u_t in Hamilton products, over the second axis.

    Kernels compute in float32; float64 inputs and CPU tensors use ``quaternion_recurrence_reference``. Memory
    in planes, [batch, T, 4, D] under these shapes, is read in whole lines.

    Args:
        q, u: [batch, T, D, 4], of one dtype: bfloat16, float16, float32 or float64.
        initial_state: [batch, D, 4]; zero if not given.

    Returns:
        h like ``u``, and the final state [batch, D, 4] of at least float32. Both have gradients to every
        argument.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    if q.ndim != 4 or q.shape[-1] != 4 or 0 in q.shape:
        raise ValueError(f"q has shape {tuple(q.shape)}; give it as [batch, T, D, 4], none of them 0")
    if u.dtype != q.dtype:
        raise ValueError(f"q and u have dtypes {q.dtype} and {u.dtype}; convert them to one")
    batch, _, channels, _ = q.shape
    check_operands(q, [("u", u, tuple(q.shape)), ("initial_state", initial_state, (batch, channels, 4))])
    if not runs_on_triton(q):
        return quaternion_recurrence_reference(q, u, initial_state)
    result: tuple[Tensor, Tensor] = _QuaternionRecurrence.apply(q, u, initial_state)
    return result


def quaternion_cumulative_product(q: Tensor) -> Tensor:
    """P_t = q_t q_{t-1} ... q_1, the later on the left, over the second axis of [batch, T, D, 4].

    Returns:
        like ``q``, with its gradient: ``quaternion_recurrence`` from the state 1 with nothing added.
    """
    one = q.new_zeros(q.shape[0], *q.shape[2:])
    one[..., 0] = 1.0
    return quaternion_recurrence(q, torch.zeros_like(q), one)[0]
