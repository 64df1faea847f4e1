"""The integer selective scan one step at a time, for decoding: equal to the chunked one, without gradients.

Both functions change their memory in place, read nothing on the host and make no shape depend on a value, so
a CUDA graph can hold them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from triton_kernels.shift import shift
from triton_kernels.ssd import SsdScales, boundary, next_state


def ssd_step(
    x: Tensor,
    B_hat: Tensor,
    C_hat: Tensor,
    decay: Tensor,
    D: Tensor,
    scales: SsdScales,
    memory: Mapping[str, Tensor],
    offset: Tensor,
    B_next: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """One step of the scan; all values are integers held in floats.

    Args:
        x: [batch, H*P]. B_hat, C_hat: rotated into the chunk's frame, [batch, N].
        decay: n, [batch, H]. D: skip weights [H].
        scales: static shifts.
        memory: the open chunk: ``A`` [batch, H, Q + 1] (the row A[t-1, .]), ``x`` [batch, H, Q, P], ``B_hat``
            [batch, Q, N], zero where the chunk has not come yet; and, unless sequences end within the first
            chunk, ``B_next`` [batch, Q, N] and the state ``H`` [batch, H, P, N]. Changed in place.
        offset: t, int64 [batch], 0..Q-1; rows may differ.
        B_next: B rotated into the next chunk's frame [batch, N], needed if there is a state.

    Returns:
        The accumulator [batch, H*P] and the intermediates of this step by name (A, G, M and, with a state, u
        and A_u).
    """
    q = scales
    batch, heads = decay.shape
    rows = torch.arange(batch, device=x.device)
    X = x.reshape(batch, heads, q.headdim)
    A = shift(memory["A"] * decay[..., None], q.decay_bits)
    A[rows, :, offset + 1] = (2.0**q.decay_bits - decay) * 2.0 ** (q.A_bits - q.decay_bits)
    memory["A"].copy_(A)
    memory["x"][rows, :, offset] = X
    memory["B_hat"][rows, offset] = B_hat
    G = shift((memory["B_hat"] @ C_hat[..., None])[..., 0], q.G_shift).clamp(-q.G_limit, q.G_limit)
    M = shift(A[..., 1:] * G[:, None], q.M_shift)
    internals = {"A": A, "G": G, "M": M}
    y = (M[:, :, None] @ memory["x"])[:, :, 0] * 2.0**q.M_align + X * (D * 2.0**q.D_align)[:, None]
    if "H" in memory:
        if B_next is None:
            raise ValueError("a scan with a state needs B_next")
        memory["B_next"][rows, offset] = B_next
        # One product per sequence rather than one per head, whose C would have to be copied.
        reads = memory["H"].flatten(1, 2) @ C_hat[..., None]
        u = shift(reads.reshape(X.shape), q.u_shift)
        A_u = shift(A[..., 0], q.A_bits - q.A_u_bits)
        y = y + A_u[..., None] * u * 2.0**q.u_align
        internals |= {"u": u, "A_u": A_u}
    return y.flatten(1), internals


def end_chunk(
    memory: Mapping[str, Tensor], ended: Tensor, scales: SsdScales, cos_Q: Tensor, sin_Q: Tensor
) -> dict[str, Tensor]:
    """Bring the state over the end of a chunk in the rows where one ended, and open the next one there.

    Args:
        memory: as of :func:`ssd_step`, with a state. Changed in place.
        ended: bool [batch].
        scales: static shifts.
        cos_Q, sin_Q: rotation over a whole chunk [N/2].

    Returns:
        The intermediates by name (beta, kappa, sigma, H), meaningful in the rows that ended.
    """
    beta, kappa, sigma, inflow = boundary(memory["A"], memory["x"], memory["B_next"], scales, cos_Q, sin_Q)
    H = next_state(memory["H"], kappa, sigma, inflow, scales)
    memory["H"].copy_(torch.where(ended[:, None, None, None], H, memory["H"]))
    for name in ("A", "x", "B_hat", "B_next"):
        held = memory[name]
        held.masked_fill_(ended.reshape(-1, *[1] * (held.dim() - 1)), 0.0)
    first = memory["A"][..., 0]
    first.masked_fill_(ended[:, None], 2.0**scales.A_bits)
    return {"beta": beta, "kappa": kappa, "sigma": sigma, "H": H}
