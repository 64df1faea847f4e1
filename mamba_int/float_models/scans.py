"""The recurrences of float models in three ways each: sequential, chunked, associative.

All compute the same numbers up to float rounding. Decays are only ever exponentials of sums of negative
numbers, never quotients of cumulative products, so nothing overflows at any length.

- ``sequential``: one step after the other, the definition.
- ``chunked``: all chunks at once. On GPUs these are the Triton kernels, elsewhere PyTorch with as many steps
  in Python as a chunk has and as there are chunks, so 2 sqrt(T) instead of T.
- ``associative``: a tree of pairs (Blelloch 1990), which holds the decay and the update of every state at
  every step at once: the most memory, by d_state times.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from triton_kernels.associative_scan import associative_scan, associative_scan_reference
from triton_kernels.dispatch import runs_on_triton
from triton_kernels.quaternion import (
    quaternion_left_matrix,
    quaternion_product,
    quaternion_product_reference,
)
from triton_kernels.quaternion_recurrence import quaternion_recurrence, quaternion_recurrence_reference
from triton_kernels.quaternion_scan import quaternion_scan, quaternion_scan_reference
from triton_kernels.selective_scan import selective_scan, selective_scan_reference
from triton_kernels.state_space_duality import state_space_duality, state_space_duality_reference

Recurrence = Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]
SelectiveScan = Callable[..., tuple[Tensor, Tensor]]
DUALITY_CHUNK = 64
"""Steps of a chunk of matrix products."""
QUATERNION_CHUNK = 16
"""Steps of a chunk of quaternion products."""


def _chunk_length(length: int) -> int:
    """Steps of a chunk for the fewest Python steps in all."""
    return max(16, math.isqrt(length))


def _chunks(x: Tensor, chunk: int) -> Tensor:
    """[batch, T, ...] as [batch, chunks, chunk, ...], zeros after the end."""
    padding = -x.shape[1] % chunk
    if padding:
        x = torch.cat([x, x.new_zeros(x.shape[0], padding, *x.shape[2:])], 1)
    return torch.unflatten(x, 1, (-1, chunk))


def _carry(added: Tensor, decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """States before all chunks and after the last, from what each adds and how it decays."""
    starts = []
    for chunk in range(added.shape[1]):
        starts.append(state)
        state = decay[:, chunk] * state + added[:, chunk]
    return torch.stack(starts, 1), state


# -- h_t = a_t h_{t-1} + b_t ------------------------------------------------------------------------------


def _sequential_recurrence(a: Tensor, b: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    return associative_scan_reference(a, b, state)


def _chunked_recurrence(a: Tensor, b: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    if runs_on_triton(a):
        return associative_scan(a, b, state)
    length = a.shape[1]
    chunk = _chunk_length(length)
    decays, updates = _chunks(a, chunk), _chunks(b, chunk)
    if length % chunk:
        # Steps after the end keep the state.
        inside = torch.arange(decays.shape[1] * chunk, device=a.device) < length
        decays = torch.where(inside.view(-1, chunk, 1), decays, 1.0)
    start = torch.zeros_like(b[:, 0]) if state is None else state.to(b.dtype)
    h, decay = updates[:, :, 0], decays[:, :, 0]
    within, since = [h], [decay]
    for t in range(1, chunk):
        h = decays[:, :, t] * h + updates[:, :, t]
        decay = decay * decays[:, :, t]
        within.append(h)
        since.append(decay)
    starts, end = _carry(h, decay, start)
    states = torch.stack(within, 2) + torch.stack(since, 2) * starts[:, :, None]
    return states.flatten(1, 2)[:, :length], end


def _tree(a: Tensor, b: Tensor) -> Tensor:
    """h of all steps from pairs of steps: the odd ones by recursion, the even ones from those before them."""
    length = a.shape[1]
    if length == 1:
        return b
    even = length - length % 2
    decay, next_decay = a[:, 0:even:2], a[:, 1:even:2]
    odd = _tree(decay * next_decay, next_decay * b[:, 0:even:2] + b[:, 1:even:2])
    later = b[:, 2::2] + a[:, 2::2] * odd[:, : b[:, 2::2].shape[1]]
    evens = torch.cat([b[:, :1], later], 1)
    paired = torch.stack([evens[:, : odd.shape[1]], odd], 2).flatten(1, 2)
    return torch.cat([paired, evens[:, odd.shape[1] :]], 1)


def _associative_recurrence(a: Tensor, b: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    if runs_on_triton(a):
        return associative_scan(a, b, state)
    if state is not None:
        b = torch.cat([b[:, :1] + a[:, :1] * state[:, None].to(b.dtype), b[:, 1:]], 1)
    h = _tree(a, b)
    return h, h[:, -1]


RECURRENCES: dict[str, Recurrence] = {
    "sequential": _sequential_recurrence,
    "chunked": _chunked_recurrence,
    "associative": _associative_recurrence,
}
"""h_t = a_t h_{t-1} + b_t for a, b [batch, T, D], real or complex, and a state [batch, D] or None; returns h
and the last state. On GPUs ``chunked`` and ``associative`` are one kernel, an associative scan in blocks."""


# -- S6 ---------------------------------------------------------------------------------------------------


def _step_sizes(delta: Tensor, bias: Tensor | None, softplus: bool, wide: torch.dtype) -> Tensor:
    step = delta.to(wide)
    if bias is not None:
        step = step + bias.to(wide)
    return F.softplus(step) if softplus else step


def _skip_and_gate(y: Tensor, u: Tensor, D: Tensor | None, z: Tensor | None) -> Tensor:
    if D is not None:
        y = y + D.to(y.dtype) * u.to(y.dtype)
    if z is not None:
        y = y * F.silu(z.to(y.dtype))
    return y.to(u.dtype)


def _chunked_selective_scan(
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
    if runs_on_triton(u):
        return selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state)
    length = u.shape[1]
    chunk = _chunk_length(length)
    if length <= chunk:
        return selective_scan_reference(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state)
    wide = torch.promote_types(u.dtype, torch.float32)
    step = _step_sizes(delta, delta_bias, delta_softplus, wide)
    rates = A.to(wide)
    values = _chunks(step * u.to(wide), chunk)
    steps, keys, queries = (_chunks(v.to(wide), chunk) for v in (step, B, C))

    def advance(h: Tensor, t: int) -> Tensor:
        decay = torch.exp(steps[:, :, t, :, None] * rates)
        return torch.addcmul(values[:, :, t, :, None] * keys[:, :, t, None, :], decay, h)

    # What each chunk adds to the state at its end, then the states before the chunks, then the outputs.
    h = values.new_zeros(*values.shape[:2], *A.shape)
    for t in range(chunk):
        h = advance(h, t)
    start = h.new_zeros(u.shape[0], *A.shape) if initial_state is None else initial_state.to(wide)
    h, end = _carry(h, torch.exp(steps.sum(2)[..., None] * rates), start)
    outputs = []
    for t in range(chunk):
        h = advance(h, t)
        outputs.append((h @ queries[:, :, t, :, None])[..., 0])
    y = torch.stack(outputs, 2).flatten(1, 2)[:, :length]
    return _skip_and_gate(y, u, D, z), end


def _associative_selective_scan(
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
    wide = torch.promote_types(u.dtype, torch.float32)
    step = _step_sizes(delta, delta_bias, delta_softplus, wide)
    decay = torch.exp(step[..., None] * A.to(wide))
    update = (step * u.to(wide))[..., None] * B.to(wide)[:, :, None, :]
    state = None if initial_state is None else initial_state.to(wide).flatten(1)
    h, end = _associative_recurrence(decay.flatten(2), update.flatten(2), state)
    y = (h.unflatten(2, A.shape) @ C.to(wide)[..., None])[..., 0]
    return _skip_and_gate(y, u, D, z), end.unflatten(1, A.shape)


SELECTIVE_SCANS: dict[str, SelectiveScan] = {
    "sequential": selective_scan_reference,
    "chunked": _chunked_selective_scan,
    "associative": _associative_selective_scan,
}
"""Arguments and results as ``triton_kernels.selective_scan.selective_scan``."""


# -- SSD --------------------------------------------------------------------------------------------------


def _chunked_state_space_duality(
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
    """Matrix products within a chunk (arXiv 2405.21060, section 6)."""
    if runs_on_triton(x):
        return state_space_duality(x, dt, A, B, C, D, dt_bias, dt_softplus, initial_state)
    length, heads, headdim = x.shape[1:]
    groups, d_state = B.shape[2:]
    if length == 1:
        return state_space_duality_reference(x, dt, A, B, C, D, dt_bias, dt_softplus, initial_state)
    wide = torch.promote_types(x.dtype, torch.float32)
    step = _step_sizes(dt, dt_bias, dt_softplus, wide)
    chunk = min(DUALITY_CHUNK, length)
    # [batch, chunks, Q, groups, heads of a group, ...]
    values = _chunks(x.to(wide).unflatten(2, (groups, -1)), chunk)
    steps = _chunks(step.unflatten(2, (groups, -1)), chunk)
    keys, queries = (_chunks(v.to(wide), chunk) for v in (B, C))
    exponents = (steps * A.to(wide).unflatten(0, (groups, -1))).movedim(2, -1)
    # Sums of the exponents after s through t, [..., t, s]; differences of large sums would lose their digits.
    causal = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).tril()
    between = exponents[..., None].expand(*exponents.shape, chunk)
    between = between.masked_fill(~causal.tril(-1), 0).cumsum(-2)
    weighted = values * (torch.exp(between[..., -1, :]).movedim(-1, 2) * steps)[..., None]
    total = exponents.sum(-1)
    added = torch.einsum("bcsgrp,bcsgn->bcgrpn", weighted, keys)
    start = added.new_zeros(x.shape[0], groups, heads // groups, headdim, d_state)
    if initial_state is not None:
        start = initial_state.to(wide).unflatten(1, (groups, -1))
    starts, end = _carry(added, torch.exp(total)[..., None, None], start)
    similarity = torch.einsum("bctgn,bcsgn->bcgts", queries, keys)
    decay = torch.exp(between).masked_fill(~causal, 0) * steps.movedim(2, -1)[..., None, :]
    y = torch.einsum("bcgts,bcgrts,bcsgrp->bctgrp", similarity, decay, values)
    before = torch.einsum("bctgn,bcgrpn->bctgrp", queries, starts)
    y = y + before * torch.exp(exponents.cumsum(-1)).movedim(-1, 2)[..., None]
    y = y.flatten(1, 2)[:, :length].flatten(2, 3)
    if D is not None:
        y = y + D.to(wide)[:, None] * x.to(wide)
    return y.to(x.dtype), end.flatten(1, 2)


def _associative_state_space_duality(
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
    wide = torch.promote_types(x.dtype, torch.float32)
    step = _step_sizes(dt, dt_bias, dt_softplus, wide)
    keys, queries = (v.to(wide).repeat_interleave(x.shape[2] // B.shape[2], 2) for v in (B, C))
    update = (step[..., None] * x.to(wide))[..., None] * keys[..., None, :]
    decay = torch.exp(step * A.to(wide))[..., None, None].expand_as(update)
    shape = update.shape[2:]
    state = None if initial_state is None else initial_state.to(wide).flatten(1)
    h, end = _associative_recurrence(decay.flatten(2), update.flatten(2), state)
    y = (h.unflatten(2, shape) @ queries[..., None])[..., 0]
    if D is not None:
        y = y + D.to(wide)[:, None] * x.to(wide)
    return y.to(x.dtype), end.unflatten(1, shape)


STATE_SPACE_DUALITIES: dict[str, SelectiveScan] = {
    "sequential": state_space_duality_reference,
    "chunked": _chunked_state_space_duality,
    "associative": _associative_state_space_duality,
}
"""Arguments and results as ``triton_kernels.state_space_duality.state_space_duality``."""


# -- quaternions ------------------------------------------------------------------------------------------


def _chunked_quaternion_scan(
    q: Tensor,
    B: Tensor,
    C: Tensor,
    S: Tensor,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The q of a group act once for all its channels: K_ts = sum_k C_t q_t ... q_{s+1} B_s, then K S."""
    length, groups, channels = S.shape[1:]
    if length == 1:
        # decoding needs no chunk
        return quaternion_scan_reference(q, B, C, S, D, initial_state)
    if runs_on_triton(S):
        return quaternion_scan(q, B, C, S, D, initial_state)
    wide = torch.promote_types(S.dtype, torch.float32)
    chunk = min(QUATERNION_CHUNK, length)
    factors, keys, queries, values = (_chunks(v.to(wide), chunk) for v in (q, B, C, S))
    if length % chunk:
        # Steps after the end keep the state.
        inside = torch.arange(factors.shape[1] * chunk, device=q.device) < length
        one = torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=wide, device=q.device)
        factors = torch.where(inside.view(-1, chunk, 1, 1, 1), factors, one)
    # of all steps s so far, and of the state before the chunk: q_t ... q_{s+1} B_s and q_t ... q_1
    through, since = keys[:, :, :0], torch.ones_like(keys[:, :, 0, ..., :1])
    since = F.pad(since, (0, 3))
    similarity, reading = [], []
    for t in range(chunk):
        factor, query = factors[:, :, t], queries[:, :, t]
        moved = quaternion_product_reference(factor[:, :, None], through)
        through = torch.cat([moved, keys[:, :, t, None]], 2)
        since = quaternion_product_reference(factor, since)
        row = quaternion_product_reference(query[:, :, None], through).sum(-2)
        similarity.append(F.pad(row, (0, 0, 0, 0, 0, chunk - 1 - t)))
        reading.append(quaternion_product_reference(query, since))
    added = torch.einsum("bcsgni,bcsgp->bcgpni", through, values)
    state = added.new_zeros(S.shape[0], groups, channels, q.shape[3], 4)
    if initial_state is not None:
        state = initial_state.to(wide)
    starts = []
    for i in range(added.shape[1]):
        starts.append(state)
        state = quaternion_product_reference(since[:, i, :, None], state) + added[:, i]
    y = torch.einsum("bctsgi,bcsgp->bctgpi", torch.stack(similarity, 2), values)
    left = quaternion_left_matrix(torch.stack(reading, 2))
    y = y + torch.einsum("bctgnij,bcgpnj->bctgpi", left, torch.stack(starts, 1))
    y = y.flatten(1, 2)[:, :length]
    if D is not None:
        y = y + F.pad((D.to(wide) * S.to(wide))[..., None], (0, 3))
    return y.to(S.dtype), state


def _associative_quaternion_scan(
    q: Tensor,
    B: Tensor,
    C: Tensor,
    S: Tensor,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The states of all steps at once, then their read-out."""
    wide = torch.promote_types(S.dtype, torch.float32)
    update = S.to(wide)[..., None, None] * B.to(wide)[:, :, :, None]
    shape = update.shape[2:5]
    factors = q.to(wide)[:, :, :, None].expand_as(update)
    state = None if initial_state is None else initial_state.to(wide).flatten(1, 3)
    h, end = quaternion_recurrence(factors.flatten(2, 4), update.flatten(2, 4), state)
    y = quaternion_product(C.to(wide)[:, :, :, None], h.unflatten(2, shape)).sum(-2)
    if D is not None:
        y = y + F.pad((D.to(wide) * S.to(wide))[..., None], (0, 3))
    return y.to(S.dtype), end.unflatten(1, shape)


QUATERNION_RECURRENCES: dict[str, Recurrence] = {
    "sequential": quaternion_recurrence_reference,
    "chunked": quaternion_recurrence,
    "associative": quaternion_recurrence,
}
"""Arguments and results as ``triton_kernels.quaternion_recurrence.quaternion_recurrence``."""

QUATERNION_SCANS: dict[str, SelectiveScan] = {
    "sequential": quaternion_scan_reference,
    "chunked": _chunked_quaternion_scan,
    "associative": _associative_quaternion_scan,
}
"""Arguments and results as ``triton_kernels.quaternion_scan.quaternion_scan``."""
