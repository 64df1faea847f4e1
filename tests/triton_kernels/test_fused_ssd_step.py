"""One kernel for a step of decoding leaves the memory and the result of the step it stands for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from triton_kernels.fused_ssd_step import fused_ssd_step
from triton_kernels.ssd import SsdScales
from triton_kernels.ssd_step import ssd_step

SCALES = SsdScales(
    chunk_size=5, headdim=3, decay_bits=8, A_bits=12, G_shift=3, G_limit=4095, M_shift=16, A_u_bits=10,
    u_shift=9, beta_shift=9, H_align=5, rotation_frac=10, M_align=1, u_align=2, D_align=4,
)  # fmt: skip


def check(device: str, state: bool) -> None:
    """Rows at different places of their chunks, the first and the last among them."""
    batch, heads, N, Q, P = 4, 3, 6, SCALES.chunk_size, SCALES.headdim
    random = torch.Generator().manual_seed(0)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high + 1, shape, generator=random).float().to(device)

    x, B, C, B_next = (integers(-181, 181, batch, width) for width in (heads * P, N, N, N))
    decay, D = integers(0, 255, batch, heads), integers(-127, 127, heads)
    memory = {
        "A": integers(0, 4096, batch, heads, Q + 1),
        "x": integers(-127, 127, batch, heads, Q, P),
        "B_hat": integers(-181, 181, batch, Q, N),
    }
    if state:
        memory |= {"B_next": integers(-181, 181, batch, Q, N), "H": integers(-2047, 2047, batch, heads, P, N)}
    offset = torch.tensor([0, 4, 2, 3], device=device)
    theirs = {name: value.clone() for name, value in memory.items()}
    y = fused_ssd_step(x, B, C, decay, D, SCALES, memory, offset, B_next if state else None)
    expected, _ = ssd_step(x, B, C, decay, D, SCALES, theirs, offset, B_next if state else None)
    assert torch.equal(y, expected)
    assert all(torch.equal(memory[name], theirs[name]) for name in memory)


@pytest.mark.parametrize("state", [False, True])
def test_a_step_in_one_kernel_changes_the_same_memory(state: bool) -> None:
    check("cpu", state)


@pytest.mark.gpu
@pytest.mark.parametrize("state", [False, True])
def test_a_compiled_step_changes_the_same_memory(state: bool) -> None:
    for _ in range(20):
        check("cuda", state)
