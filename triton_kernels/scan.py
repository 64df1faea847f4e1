"""The integer scan of real, complex or quaternion states, with straight-through gradients, and as a kernel.

``mamba_int/operations/scan.py`` is the specification; letters and layouts are its own. The fused kernel keeps
the states of a few channels in registers and walks over time: it reads x, q, B and C once and writes y.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_kernels.clamp import saturate
from triton_kernels.dispatch import device_of
from triton_kernels.quaternion import quaternion_product_reference
from triton_kernels.rounding import half_unit, rounded
from triton_kernels.shift import shift

TILE = 1 << 11
"""Most states, four components each, that a program of the kernel holds."""


@dataclass(frozen=True)
class ScanScales:
    """Static shifts of the scan; letters as in the specification.

    Attributes:
        q_bits: k. inflow_align: a. H_limit: every component of a state saturates there. D_align: b.
    """

    q_bits: int
    inflow_align: int
    H_limit: int
    D_align: int

    @classmethod
    def from_attributes(cls, attributes: Mapping[str, Any]) -> Self:
        """Read the scales from a node's attributes (extra ones are ignored)."""
        return cls(**{name: int(attributes[name]) for name in cls.__dataclass_fields__})


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Products of quaternions, the components that are not zero on the fourth axis from the end."""
    if a.shape[-4] == 1:
        return a * b
    wide = [value.movedim(-4, -1) for value in (a, b)]
    padded = [torch.nn.functional.pad(value, (0, 4 - value.shape[-1])) for value in wide]
    return quaternion_product_reference(*padded).movedim(-1, -4)


def scan_step(H: Tensor, q: Tensor, B: Tensor, x: Tensor, scales: ScanScales, rounding: bool) -> Tensor:
    """H_t; all values are integers held in floats.

    Args:
        H: H_{t-1} [batch, components, G, P, N]. q, B: [batch, components, G, N]. x: [batch, G, P].
        scales: static shifts. rounding: False for the float twin, which neither rounds nor saturates.
    """
    inflow = B[..., None, :] * x[:, None, :, :, None] * 2.0**scales.inflow_align
    total = shift(_product(q[..., None, :], H) + inflow, scales.q_bits, rounding)
    return saturate(total, -scales.H_limit, scales.H_limit) if rounding else total


def read_states(H: Tensor, C: Tensor, x: Tensor, D: Tensor, scales: ScanScales) -> Tensor:
    """y [..., 4 G P] of H [..., components, G, P, N], C [..., 4, G, N] and x [..., G, P]; D is [G P]."""
    y = _product(C[..., None, :], H).sum(-1)
    skipped = x * D.reshape(x.shape[-2:]) * 2.0**scales.D_align
    y = torch.cat([y[..., :1, :, :] + skipped[..., None, :, :], y[..., 1:, :, :]], -3)
    return y.flatten(-3)


def scan(
    x: Tensor, q: Tensor, B: Tensor, C: Tensor, D: Tensor, scales: ScanScales, rounding: bool = True
) -> tuple[Tensor, Tensor]:
    """The scan over whole sequences, from a state of zeros; all values are integers held in floats.

    Args:
        x: [batch, T, G, P]. q, B, C: [batch, T, components, G, N]. D: [G P].
        scales: static shifts. rounding: False for the float twin.

    Returns:
        y [batch, T, 4 G P] before its shift, and the states H [batch, T, components, G, P, N].
    """
    batch, length, groups, channels = x.shape
    H = x.new_zeros(batch, B.shape[2], groups, channels, B.shape[-1])
    states = []
    for t in range(length):
        H = scan_step(H, q[:, t], B[:, t], x[:, t], scales, rounding)
        states.append(H)
    stacked = torch.stack(states, 1)
    return read_states(stacked, C, x, D, scales), stacked


@triton.jit
def _load(at, n, component, modes, inside, PRESENT: tl.constexpr, BLOCK_N: tl.constexpr):
    """Component of q, B or C of all states of a group; zeros where it is not held."""
    if PRESENT:
        return tl.load(at + component * modes + n, mask=inside, other=0.0)[None, :]
    return tl.zeros((1, BLOCK_N), tl.float32)


@triton.jit
def _scan_kernel(
    x, q, B, C, D, y, T, P, N, G, factor, half, inflow, limit, skip,
    TURNING: tl.constexpr, COMPONENTS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    b, g = tl.program_id(0).to(tl.int64), tl.program_id(1)
    p, n = tl.program_id(2) * BLOCK_P + tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    held, states = p < P, n < N
    modes = G * N
    D_p = tl.load(D + g * P + p, mask=held, other=0.0) * skip
    h0 = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    h1 = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    h2 = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    h3 = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    for t in range(T):
        row = b * T + t
        x_p = tl.load(x + (row * G + g) * P + p, mask=held, other=0.0)
        entering = (x_p * inflow)[:, None]
        at_q, at_B, at_C = (
            q + row * TURNING * modes + g * N,
            B + row * COMPONENTS * modes + g * N,
            C + row * 4 * modes + g * N,
        )
        q0 = _load(at_q, n, 0, modes, states, True, BLOCK_N)
        q1 = _load(at_q, n, 1, modes, states, TURNING > 1, BLOCK_N)
        q2 = _load(at_q, n, 2, modes, states, TURNING > 2, BLOCK_N)
        q3 = _load(at_q, n, 3, modes, states, TURNING > 2, BLOCK_N)
        e0 = entering * _load(at_B, n, 0, modes, states, True, BLOCK_N)
        e1 = entering * _load(at_B, n, 1, modes, states, COMPONENTS > 1, BLOCK_N)
        e2 = entering * _load(at_B, n, 2, modes, states, COMPONENTS > 1, BLOCK_N)
        e3 = entering * _load(at_B, n, 3, modes, states, COMPONENTS > 1, BLOCK_N)
        n0 = q0 * h0 - q1 * h1 - q2 * h2 - q3 * h3 + e0
        n1 = q0 * h1 + q1 * h0 + q2 * h3 - q3 * h2 + e1
        n2 = q0 * h2 + q2 * h0 + q3 * h1 - q1 * h3 + e2
        n3 = q0 * h3 + q3 * h0 + q1 * h2 - q2 * h1 + e3
        h0 = tl.minimum(tl.maximum(rounded(n0, factor, half), -limit), limit)
        h1 = tl.minimum(tl.maximum(rounded(n1, factor, half), -limit), limit)
        h2 = tl.minimum(tl.maximum(rounded(n2, factor, half), -limit), limit)
        h3 = tl.minimum(tl.maximum(rounded(n3, factor, half), -limit), limit)
        c0 = _load(at_C, n, 0, modes, states, True, BLOCK_N)
        c1 = _load(at_C, n, 1, modes, states, True, BLOCK_N)
        c2 = _load(at_C, n, 2, modes, states, True, BLOCK_N)
        c3 = _load(at_C, n, 3, modes, states, True, BLOCK_N)
        y0 = tl.sum(c0 * h0 - c1 * h1 - c2 * h2 - c3 * h3, 1) + D_p * x_p
        y1 = tl.sum(c0 * h1 + c1 * h0 + c2 * h3 - c3 * h2, 1)
        y2 = tl.sum(c0 * h2 + c2 * h0 + c3 * h1 - c1 * h3, 1)
        y3 = tl.sum(c0 * h3 + c3 * h0 + c1 * h2 - c2 * h1, 1)
        to = y + row * 4 * G * P + g * P + p
        tl.store(to, y0, mask=held)
        tl.store(to + G * P, y1, mask=held)
        tl.store(to + 2 * G * P, y2, mask=held)
        tl.store(to + 3 * G * P, y3, mask=held)


def fused_scan(x: Tensor, q: Tensor, B: Tensor, C: Tensor, D: Tensor, scales: ScanScales) -> Tensor:
    """y of :func:`scan` in one kernel, without states and gradients.

    Exact where float32 is: no sum of the scan may exceed 2^24.

    Args:
        x, q, B, C, D, scales: as of :func:`scan`; float32.
    """
    batch, length, groups, channels = x.shape
    states = q.shape[-1]
    y = torch.empty(batch, length, 4 * groups * channels, dtype=x.dtype, device=x.device)
    block_n = triton.next_power_of_2(states)
    block_p = min(triton.next_power_of_2(channels), max(1, TILE // block_n))
    if y.numel():
        with device_of(x):
            _scan_kernel[(batch, groups, triton.cdiv(channels, block_p))](
                *(value.contiguous() for value in (x, q, B, C, D)), y,
                length, channels, states, groups, 2.0**-scales.q_bits, half_unit(scales.q_bits),
                2.0**scales.inflow_align, float(scales.H_limit), 2.0**scales.D_align,
                TURNING=q.shape[2], COMPONENTS=B.shape[2], BLOCK_P=block_p, BLOCK_N=block_n,
            )  # fmt: skip
    return y
