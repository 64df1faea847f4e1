"""The mixer of Mamba-1: the selective scan S6 (Gu & Dao 2023, arXiv 2312.00752, algorithm 2 and figure 3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamba_int.float_models.config import MambaConfig
from mamba_int.float_models.mixer import (
    NO_STEP,
    Mixer,
    MixerState,
    initial_step_bias,
    negative_exponential,
    register_mixer,
)
from mamba_int.float_models.scans import SELECTIVE_SCANS
from triton_kernels.activation import activate


@register_mixer("mamba")
class MambaMixer(Mixer):
    """(u, z) = in_proj x; u = act(conv u); (dt, B, C) = x_proj u; out_proj(S6(u, dt_proj dt, B, C) act(z)).

    Parameters have the names and shapes of state-spaces and HuggingFace.
    """

    def __init__(self, config: MambaConfig) -> None:
        super().__init__(config)
        c, rank = config, config.rank
        self.in_proj = nn.Linear(c.d_model, 2 * c.d_inner, bias=c.bias)
        self.conv1d = self.make_conv1d(c.d_inner)
        self.x_proj = nn.Linear(c.d_inner, rank + 2 * c.d_state, bias=False)
        self.dt_proj = nn.Linear(rank, c.d_inner)
        self.A_log = nn.Parameter(torch.arange(1.0, c.d_state + 1).log().repeat(c.d_inner, 1))
        self.D = nn.Parameter(torch.ones(c.d_inner))
        self.out_proj = nn.Linear(c.d_inner, c.d_model, bias=c.bias)
        with torch.no_grad():
            self.dt_proj.weight.uniform_(-(rank**-0.5), rank**-0.5)
            self.dt_proj.bias.copy_(initial_step_bias(c.d_inner, c))

    def forward(self, x: Tensor, mask: Tensor | None = None, state: MixerState | None = None) -> Tensor:
        c = self.config
        u, z = self.in_proj(x).chunk(2, -1)
        u = self.convolve(self.conv1d, u, mask, state)
        dt, B, C = self.x_proj(u).split([c.rank, c.d_state, c.d_state], -1)
        if c.BCdt_norm:
            dt, B, C = (self._normed(v) for v in (dt, B, C))
        delta = F.linear(dt, self.dt_proj.weight)
        if mask is not None:
            delta = delta.masked_fill(~mask[..., None], NO_STEP)
        fused = c.gate_activation == "silu"
        with torch.autocast(x.device.type, enabled=False):
            y, last = SELECTIVE_SCANS[c.scan_type](
                u,
                delta,
                negative_exponential(self.A_log),
                B,
                C,
                self.D,
                z if fused else None,
                self.dt_proj.bias,
                True,
                None if state is None else state["ssm_state"],
            )
        if state is not None:
            state["ssm_state"].copy_(last.detach())
        if not fused:
            y = y * activate(z, c.gate_activation)
        out: Tensor = self.out_proj(y)
        return out

    def _normed(self, v: Tensor) -> Tensor:
        wide = v.to(torch.promote_types(v.dtype, torch.float32))
        return F.rms_norm(wide, v.shape[-1:], eps=self.config.BCdt_norm_epsilon).to(v.dtype)

    def state_shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
        c = self.config
        return self.conv_shapes() | {"ssm_state": ((c.d_inner, c.d_state), torch.float32)}

    def complexity(self, length: int) -> int:
        # decay and update, and the product with C
        return 3 * length * self.config.d_inner * self.config.d_state
