"""A norm that divides by the power of two below the standard deviation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from triton_kernels.straight_through import straight_through

EPSILON = 1e-6


class BitShiftNorm(nn.Module):
    """The residual stream and y = (x - mean x) 2^-k weight step_size, k = floor(log4 v), v the variance.

    k is held within min_shift..max_shift. Between those the root mean square of y, before its weights, is in
    [1, 2): the norm of Mamba-Integer. Gradients are those of (x - mean x) / sqrt(v + 1e-6) times the weights.

    Args:
        width: channels. min_shift, max_shift: range of k.
        residual_in_fp32: keep the sum in at least float32.
    """

    def __init__(self, width: int, min_shift: int, max_shift: int, residual_in_fp32: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.step_size = nn.Parameter(torch.ones(1))
        self.min_shift, self.max_shift = min_shift, max_shift
        self.residual_in_fp32 = residual_in_fp32

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """norm(residual + x) in the dtype of the products that follow, and residual + x."""
        device = x.device.type
        autocast = torch.is_autocast_enabled(device)
        out_dtype = torch.get_autocast_dtype(device) if autocast else self.weight.dtype
        wide = torch.promote_types(x.dtype, torch.float32)
        total = x.to(wide) if residual is None else residual.to(wide) + x.to(wide)
        y = self.normed(total) * (self.weight * self.step_size)
        return y.to(out_dtype), total if self.residual_in_fp32 else total.to(x.dtype)

    def normed(self, x: Tensor) -> Tensor:
        """The norm of [..., width] before its weights."""
        centred = x - x.mean(-1, keepdim=True)
        variance = centred.square().mean(-1, keepdim=True)
        # v = m 2^e with m in [1/2, 1): comparisons with 4^k, exactly.
        _, exponent = torch.frexp(variance.detach())
        shift = torch.div(exponent - 1, 2, rounding_mode="floor").clamp(self.min_shift, self.max_shift)
        exact = centred.detach() * torch.exp2(-shift.to(x.dtype))
        return straight_through(centred * torch.rsqrt(variance + EPSILON), exact)
