"""The mixer of Mamba-2: state-space duality (Dao & Gu 2024, arXiv 2405.21060, section 7 and figure 6)."""

from __future__ import annotations

import math

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
from mamba_int.float_models.scans import STATE_SPACE_DUALITIES
from triton_kernels.rms_norm import gated_rms_norm


class GatedRMSNorm(nn.Module):
    """The weight of the norm after the gate."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))


@register_mixer("mamba2")
class Mamba2Mixer(Mixer):
    """(z, xBC, dt) = in_proj x; (x, B, C) = act(conv xBC); y = SSD(x, dt, B, C); out_proj(norm(y act(z))).

    Parameters have the names and shapes of state-spaces and HuggingFace.
    """

    def __init__(self, config: MambaConfig) -> None:
        super().__init__(config)
        c = config
        conv_channels = c.d_inner + 2 * c.n_groups * c.d_state
        self.in_proj = nn.Linear(c.d_model, c.d_inner + conv_channels + c.n_heads, bias=c.bias)
        self.conv1d = self.make_conv1d(conv_channels)
        self.dt_bias = nn.Parameter(initial_step_bias(c.n_heads, c))
        self.A_log = nn.Parameter(torch.empty(c.n_heads).uniform_(c.A_min, c.A_max).log())
        self.D = nn.Parameter(torch.ones(c.d_inner if c.D_has_hdim else c.n_heads))
        self.norm = GatedRMSNorm(c.d_inner)
        self.out_proj = nn.Linear(c.d_inner, c.d_model, bias=c.bias)

    def forward(self, x: Tensor, mask: Tensor | None = None, state: MixerState | None = None) -> Tensor:
        c = self.config
        z, xBC, dt = self.in_proj(x).split([c.d_inner, self.conv_channels, c.n_heads], -1)
        xBC = self.convolve(self.conv1d, xBC, mask, state)
        shared = c.n_groups * c.d_state
        values, B, C = xBC.split([c.d_inner, shared, shared], -1)
        values = values.unflatten(-1, (c.n_heads, c.headdim))
        B, C = (v.unflatten(-1, (c.n_groups, c.d_state)) for v in (B, C))
        limited = c.dt_limit_low > 0 or c.dt_limit_high > 0
        if limited:
            wide = torch.promote_types(dt.dtype, torch.float32)
            dt = F.softplus(dt.to(wide) + self.dt_bias).clamp(c.dt_limit_low, c.dt_limit_high or math.inf)
        if mask is not None:
            dt = dt.masked_fill(~mask[..., None], 0.0 if limited else NO_STEP)
        with torch.autocast(x.device.type, enabled=False):
            y, last = STATE_SPACE_DUALITIES[c.scan_type](
                values,
                dt,
                negative_exponential(self.A_log),
                B,
                C,
                None if c.D_has_hdim else self.D,
                None if limited else self.dt_bias,
                not limited,
                None if state is None else state["ssm_state"],
            )
        if state is not None:
            state["ssm_state"].copy_(last.detach())
        if c.D_has_hdim:
            y = y + (self.D.view(c.n_heads, c.headdim) * values).to(y.dtype)
        groups = c.n_groups if c.norm_per_group else 1
        y = gated_rms_norm(y.flatten(2), z, self.norm.weight, c.norm_epsilon, groups, c.gate_activation)
        out: Tensor = self.out_proj(y)
        return out

    def state_shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
        c = self.config
        return self.conv_shapes() | {"ssm_state": ((c.n_heads, c.headdim, c.d_state), torch.float32)}

    def complexity(self, length: int) -> int:
        # decay and update, and the product with C
        return 3 * length * self.config.d_inner * self.config.d_state
