"""The first-order linear recurrence h_t = a_t h_{t-1} + b_t, real or complex, as an associative scan.

Pairs (a, b) compose as (a1, b1) then (a2, b2) = (a1 a2, a2 b1 + b2), which is associative (Blelloch 1990,
"Prefix sums and their applications", section 1.4.1), so a block of time needs a logarithmic number of steps.
A program owns a few channels of one sequence and carries the state from block to block.

The gradient is the same recurrence from the end: g_t = dh_t + conj(a_{t+1}) g_{t+1}, db_t = g_t and
da_t = g_t conj(h_{t-1}).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_kernels.dispatch import check_operands, device_of, runs_on_triton

TIMES = 64
"""Steps of one block."""
CHANNELS = 16
"""Channels of one program."""


@triton.jit
def _compose(decay, update, next_decay, next_update):
    return decay * next_decay, next_decay * update + next_update


@triton.jit
def _compose_complex(
    decay_re, decay_im, update_re, update_im, next_decay_re, next_decay_im, next_update_re, next_update_im
):
    return (
        decay_re * next_decay_re - decay_im * next_decay_im,
        decay_re * next_decay_im + decay_im * next_decay_re,
        next_decay_re * update_re - next_decay_im * update_im + next_update_re,
        next_decay_re * update_im + next_decay_im * update_re + next_update_im,
    )


@triton.jit
def _recurrence_kernel(
    a_ptr,
    b_ptr,
    start_ptr,
    h_ptr,
    end_ptr,
    length,
    channels,
    TIMES: tl.constexpr,
    CHANNELS: tl.constexpr,
    COMPLEX: tl.constexpr,
    HAS_START: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """h of all steps and the state at the end.

    REVERSE: the steps are taken from the last to the first, each decay is the conjugate of that of the step
    after it in time (one for the last step), ``start`` belongs to the last step and ``end`` is conj(a_0) h_0.
    Complex values lie as (re, im).
    """
    batch = tl.program_id(1).to(tl.int64)
    d = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    in_channels = d < channels
    offset = tl.arange(0, TIMES)
    first = offset[:, None] == 0
    last = offset[:, None] == TIMES - 1
    width: tl.constexpr = 2 if COMPLEX else 1
    outer = (batch * channels + d) * width
    state = tl.zeros([CHANNELS], tl.float32)
    state_im = tl.zeros([CHANNELS], tl.float32)
    if HAS_START:
        state = tl.load(start_ptr + outer, mask=in_channels, other=0.0).to(tl.float32)
        if COMPLEX:
            state_im = tl.load(start_ptr + outer + 1, mask=in_channels, other=0.0)
    for block in range(tl.cdiv(length, TIMES)):
        t = block * TIMES + offset
        decay_t = t
        if REVERSE:
            decay_t = length - t
            t = length - 1 - t
        mask = ((t >= 0) & (t < length))[:, None] & in_channels[None, :]
        # steps beyond the end keep the state; so does the decay "after" the last step
        decay_mask = ((t >= 0) & (decay_t < length))[:, None] & in_channels[None, :]
        place = ((batch * length + t[:, None]) * channels + d[None, :]) * width
        decay_place = ((batch * length + decay_t[:, None]) * channels + d[None, :]) * width
        decay = tl.load(a_ptr + decay_place, mask=decay_mask, other=1.0).to(tl.float32)
        update = tl.load(b_ptr + place, mask=mask, other=0.0).to(tl.float32)
        if COMPLEX:
            decay_im = tl.load(a_ptr + decay_place + 1, mask=decay_mask, other=0.0)
            if REVERSE:
                decay_im = -decay_im
            update_im = tl.load(b_ptr + place + 1, mask=mask, other=0.0)
            carried = decay * state[None, :] - decay_im * state_im[None, :]
            carried_im = decay * state_im[None, :] + decay_im * state[None, :]
            update += tl.where(first, carried, 0.0)
            update_im += tl.where(first, carried_im, 0.0)
            _, _, h, h_im = tl.associative_scan((decay, decay_im, update, update_im), 0, _compose_complex)
            tl.store(h_ptr + place + 1, h_im, mask=mask)
            state_im = tl.sum(tl.where(last, h_im, 0.0), 0)
        else:
            update += tl.where(first, decay * state[None, :], 0.0)
            _, h = tl.associative_scan((decay, update), 0, _compose)
        tl.store(h_ptr + place, h.to(h_ptr.dtype.element_ty), mask=mask)
        state = tl.sum(tl.where(last, h, 0.0), 0)
    if REVERSE:
        earliest = (batch * length * channels + d) * width
        decay = tl.load(a_ptr + earliest, mask=in_channels, other=0.0).to(tl.float32)
        if COMPLEX:
            decay_im = -tl.load(a_ptr + earliest + 1, mask=in_channels, other=0.0)
            tl.store(end_ptr + outer + 1, decay * state_im + decay_im * state, mask=in_channels)
            state = decay * state - decay_im * state_im
        else:
            state = decay * state
    elif COMPLEX:
        tl.store(end_ptr + outer + 1, state_im, mask=in_channels)
    tl.store(end_ptr + outer, state, mask=in_channels)


@triton.jit
def _decay_gradient_kernel(
    g_ptr,
    h_ptr,
    start_ptr,
    da_ptr,
    length,
    channels,
    BLOCK: tl.constexpr,
    COMPLEX: tl.constexpr,
    HAS_START: tl.constexpr,
):
    """da_t = g_t conj(h_{t-1})."""
    batch = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < length * channels
    width: tl.constexpr = 2 if COMPLEX else 1
    place = (batch * length * channels + i) * width
    before = place - channels * width
    later = mask & (i >= channels)
    h = tl.load(h_ptr + before, mask=later, other=0.0).to(tl.float32)
    start = (batch * channels + i) * width
    if HAS_START:
        h += tl.load(start_ptr + start, mask=mask & (i < channels), other=0.0).to(tl.float32)
    g = tl.load(g_ptr + place, mask=mask, other=0.0).to(tl.float32)
    if COMPLEX:
        h_im = tl.load(h_ptr + before + 1, mask=later, other=0.0)
        if HAS_START:
            h_im += tl.load(start_ptr + start + 1, mask=mask & (i < channels), other=0.0)
        g_im = tl.load(g_ptr + place + 1, mask=mask, other=0.0)
        tl.store(da_ptr + place + 1, g_im * h - g * h_im, mask=mask)
        da = g * h + g_im * h_im
    else:
        da = g * h
    tl.store(da_ptr + place, da.to(da_ptr.dtype.element_ty), mask=mask)


def _numbers(x: Tensor | None) -> Tensor | None:
    """The real numbers a kernel reads: complex values as pairs."""
    return torch.view_as_real(x.resolve_conj()) if x is not None and x.is_complex() else x


def _recurrence(
    a: Tensor, b: Tensor, start: Tensor | None, h_dtype: torch.dtype, reverse: bool
) -> tuple[Tensor, Tensor]:
    batch, length, channels = a.shape
    h = torch.empty(a.shape, dtype=h_dtype, device=a.device)
    end_dtype = torch.promote_types(a.dtype, torch.float32)
    end = torch.empty(batch, channels, dtype=end_dtype, device=a.device)
    _recurrence_kernel[(triton.cdiv(channels, CHANNELS), batch)](
        _numbers(a),
        _numbers(b),
        _numbers(start),
        _numbers(h),
        _numbers(end),
        length,
        channels,
        TIMES=TIMES,
        CHANNELS=CHANNELS,
        COMPLEX=a.is_complex(),
        HAS_START=start is not None,
        REVERSE=reverse,
        num_warps=4,
    )
    return h, end


class _AssociativeScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
        a, b = a.contiguous(), b.contiguous()
        start = None if initial_state is None else initial_state.contiguous()
        with device_of(a):
            h, final_state = _recurrence(a, b, start, a.dtype, reverse=False)
        ctx.save_for_backward(a, h, start)
        ctx.set_materialize_grads(False)
        return h, final_state

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        a, h, start = ctx.saved_tensors
        dh = torch.zeros_like(h) if gradients[0] is None else gradients[0].contiguous()
        dfinal_state = None if gradients[1] is None else gradients[1].contiguous()
        batch, length, channels = a.shape
        wide = torch.promote_types(a.dtype, torch.float32)
        da = torch.empty_like(a)
        block = 1024
        with device_of(a):
            g, dinitial_state = _recurrence(a, dh, dfinal_state, wide, reverse=True)
            _decay_gradient_kernel[(triton.cdiv(length * channels, block), batch)](
                _numbers(g),
                _numbers(h),
                _numbers(start),
                _numbers(da),
                length,
                channels,
                BLOCK=block,
                COMPLEX=a.is_complex(),
                HAS_START=start is not None,
            )
        return da, g.to(a.dtype), None if start is None else dinitial_state.to(start.dtype)


def associative_scan_reference(
    a: Tensor, b: Tensor, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The definition of ``associative_scan``, one step after the other; float64 and complex128 stay so."""
    wide = torch.promote_types(a.dtype, torch.float32)
    decay, update = a.to(wide), b.to(wide)
    state = torch.zeros_like(update[:, 0]) if initial_state is None else initial_state.to(wide)
    states = []
    for t in range(a.shape[1]):
        state = decay[:, t] * state + update[:, t]
        states.append(state)
    return torch.stack(states, 1).to(a.dtype), state


def associative_scan(a: Tensor, b: Tensor, initial_state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """h_t = a_t h_{t-1} + b_t over the middle axis, real or complex.

    Kernels compute in float32 (pairs of them for complex64); float64, complex128 and CPU tensors use
    ``associative_scan_reference``.

    Args:
        a, b: [batch, T, D], of one dtype: bfloat16, float16, float32, float64, complex64 or complex128.
        initial_state: [batch, D], complex if ``a`` is; zero if not given.

    Returns:
        h like ``a``, and the final state [batch, D] of at least float32. Both have gradients to every
        argument.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    if a.ndim != 3 or 0 in a.shape:
        raise ValueError(f"a has shape {tuple(a.shape)}; give it as [batch, T, D], none of them 0")
    if b.dtype != a.dtype:
        raise ValueError(f"a and b have dtypes {a.dtype} and {b.dtype}; convert them to one")
    if initial_state is not None and initial_state.is_complex() != a.is_complex():
        raise ValueError(
            f"initial_state is {initial_state.dtype} and a {a.dtype}; make both real or both complex"
        )
    batch, _, channels = a.shape
    check_operands(a, [("b", b, tuple(a.shape)), ("initial_state", initial_state, (batch, channels))])
    if not runs_on_triton(a):
        return associative_scan_reference(a, b, initial_state)
    result: tuple[Tensor, Tensor] = _AssociativeScan.apply(a, b, initial_state)
    return result
