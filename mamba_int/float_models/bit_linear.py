"""A matrix of ternary weights on activations of eight bits: BitNet b1.58 (Ma 2024, arXiv 2402.17764)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from triton_kernels.straight_through import straight_through

LEAST_WEIGHT_SCALE = 1e-6
LEAST_ACTIVATION = 1e-8
ACTIVATION_LIMIT = 127


def ternary(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Signs in {-1, 0, 1} of latent weights [outputs, inputs], and their scale, one for the whole matrix.

    s = max(mean |W|, 1e-6), W_q = clip(round(W / s), -1, 1): equations 1 to 3 of the paper.
    """
    scale = weight.abs().mean().clamp(min=LEAST_WEIGHT_SCALE)
    return (weight / scale).round().clamp(-1, 1), scale


class BitLinear(nn.Linear):
    """y = (W_q x_q) s a / 127 with a = max(max_j |x_j|, 1e-8) of each step and x_q = round(127 x / a).

    The parameter ``weight`` is the latent matrix. Gradients pass straight through both roundings. Sums are of
    integers, so that they are exact however they are made.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        assert not bias, "a ternary matrix has no bias"
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        """Normal, of variance 1 / in_features."""
        nn.init.normal_(self.weight, std=self.in_features**-0.5)

    def forward(self, input: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features]."""
        wide = torch.promote_types(input.dtype, torch.float32)
        x, weight = input.to(wide), self.weight.to(wide)
        signs, scale = ternary(weight.detach())
        largest = x.detach().abs().amax(-1, keepdim=True).clamp(min=LEAST_ACTIVATION)
        integers = straight_through(
            x * (ACTIVATION_LIMIT / largest), (ACTIVATION_LIMIT * x / largest).round()
        )
        product = F.linear(integers, straight_through(weight / scale, signs))
        return (product.to(wide) * (scale * largest / ACTIVATION_LIMIT)).to(product.dtype)
