"""The mixers of Mamba-Integer, both versions: ternary projections, and decays by numbers of 15 bits or heads.

The formulas are those of the public description of that model, its square roots computed as they are meant:
its own Newton iteration diverges between its starting points. Parameters have its names and shapes.

    (u, z) = in_proj x;  u = act(conv u);  out = res_gate out_proj(y gate(z))

Version 1, for a channel d and an entry n of the state, with N = d_state and all in reals:

    (r, B, C) = x_proj u;  m = clip(dt_proj r, -20, 20);  dt = clip(squareplus(m) / 100, 1/1000, 1/10)
    a_dn = clip(base_decay_nums_dn + m_d, 0, 32000) / 2^15
    h_dn' = a_dn h_dn + (1 - a_dn) dt_d u_d B_n;  y_d = sum_n h_dn C_n

Version 2, for a head of P channels, whose (dt, B, C) are 1 + 2N outputs of x_proj next to each other:

    A = clip(clip(A_log, -2.3, -0.01) clip(softplus(clip(dt, -10, 10)), 0.01, 10), -20, -0.001)
    h' = e^A h + u B^T / (|B| + 1e-6);  y = h C / (|C| + 1e-6)
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamba_int.float_models.bit_linear import BitLinear
from mamba_int.float_models.config import MambaConfig
from mamba_int.float_models.mixer import Mixer, MixerState, register_mixer
from mamba_int.float_models.scans import RECURRENCES, STATE_SPACE_DUALITIES
from triton_kernels.activation import activate

DECAY_BITS = 15
LARGEST_DECAY = 32000
NORM_EPSILON = 1e-6


class MambaIntegerMixer(Mixer):
    """What the two versions share.

    Args:
        config: of the model. projected: outputs of x_proj.
    """

    def __init__(self, config: MambaConfig, projected: int) -> None:
        super().__init__(config)
        c = config
        self.in_proj = BitLinear(c.d_model, 2 * c.d_inner)
        self.conv1d = self.make_conv1d(c.d_inner)
        self.x_proj = BitLinear(c.d_inner, projected)
        self.out_proj = BitLinear(c.d_inner, c.d_model)
        # The backbone divides out_proj by sqrt(n_layer): together 1 / sqrt(2 n_layer).
        self.res_gate = nn.Parameter(torch.full((1,), 0.5**0.5))

    def forward(self, x: Tensor, mask: Tensor | None = None, state: MixerState | None = None) -> Tensor:
        u, z = self.in_proj(x).chunk(2, -1)
        u = self.convolve(self.conv1d, u, mask, state)
        y, last = self.scan(u, mask, None if state is None else state["ssm_state"])
        if state is not None:
            state["ssm_state"].copy_(last.detach().view_as(state["ssm_state"]))
        out: Tensor = self.out_proj(y.to(u.dtype) * activate(z, self.config.gate_activation))
        return out * self.res_gate.to(out.dtype)

    def scan(self, u: Tensor, mask: Tensor | None, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """y [batch, T, d_inner] of the activated u, and the state after the last step."""
        raise NotImplementedError

    def complexity(self, length: int) -> int:
        # decay and update, and the product with C
        return 3 * length * self.config.d_inner * self.config.d_state


@register_mixer("mamba_integer_v1")
class MambaIntegerV1Mixer(MambaIntegerMixer):
    """A decay for every entry of the state, and an input that counts for what the decay leaves room."""

    def __init__(self, config: MambaConfig) -> None:
        c = config
        super().__init__(c, c.rank + 2 * c.d_state)
        self.dt_proj = BitLinear(c.rank, c.d_inner)
        self.base_decay_nums = nn.Parameter(torch.full((c.d_inner, c.d_state), 2.0 ** (DECAY_BITS - 1)))

    def parts(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """m [batch, T, d_inner], B and C [batch, T, d_state]."""
        c = self.config
        r, B, C = self.x_proj(u).split([c.rank, c.d_state, c.d_state], -1)
        return self.dt_proj(r).clamp(-20, 20), B, C

    def decay(self, m: Tensor) -> Tensor:
        """a [batch, T, d_inner, d_state]."""
        numbers = self.base_decay_nums.to(m.dtype) + m[..., None]
        decay: Tensor = numbers.clamp(0, LARGEST_DECAY) / 2**DECAY_BITS
        return decay

    def scan(self, u: Tensor, mask: Tensor | None, state: Tensor | None) -> tuple[Tensor, Tensor]:
        c = self.config
        wide = torch.promote_types(u.dtype, torch.float32)
        m, B, C = (part.to(wide) for part in self.parts(u))
        with torch.autocast(u.device.type, enabled=False):
            decay = self.decay(m)
            values = u.to(wide) * step_size(m)
            update = (1 - decay) * values[..., None] * B[:, :, None]
            if mask is not None:
                decay = torch.where(mask[..., None, None], decay, 1.0)
                update = update * mask[..., None, None]
            start = None if state is None else state.flatten(1)
            h, last = RECURRENCES[c.scan_type](decay.flatten(2), update.flatten(2), start)
            y = (h.unflatten(2, (c.d_inner, c.d_state)) * C[:, :, None]).sum(-1)
        return y, last

    def state_shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
        c = self.config
        return self.conv_shapes() | {"ssm_state": ((c.d_inner, c.d_state), torch.float32)}


def step_size(m: Tensor) -> Tensor:
    """dt of version 1."""
    return (0.01 * activate(m, "squareplus")).clamp(0.001, 0.1)


@register_mixer("mamba_integer_v2")
class MambaIntegerV2Mixer(MambaIntegerMixer):
    """Heads with B and C of their own, of length one, and no step size on the values."""

    def __init__(self, config: MambaConfig) -> None:
        c = config
        super().__init__(c, c.n_heads * (1 + 2 * c.d_state))
        self.A_log = nn.Parameter(torch.full((c.n_heads,), math.log(0.5)))

    def parts(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """dt [batch, T, n_heads], B and C [batch, T, n_heads, d_state] before they are divided."""
        c = self.config
        heads = self.x_proj(u).unflatten(-1, (c.n_heads, 1 + 2 * c.d_state))
        dt, B, C = heads.split([1, c.d_state, c.d_state], -1)
        return dt[..., 0], B, C

    def exponent(self, dt: Tensor) -> Tensor:
        """-A > 0 [batch, T, n_heads]."""
        step = F.softplus(dt.clamp(-10, 10)).clamp(0.01, 10)
        return (-self.A_log.to(dt.dtype).clamp(-2.3, -0.01) * step).clamp(0.001, 20)

    def scan(self, u: Tensor, mask: Tensor | None, state: Tensor | None) -> tuple[Tensor, Tensor]:
        c = self.config
        wide = torch.promote_types(u.dtype, torch.float32)
        dt, B, C = (part.to(wide) for part in self.parts(u))
        with torch.autocast(u.device.type, enabled=False):
            exponent = self.exponent(dt)
            # The scan multiplies its values by the step that its exponent has; these have none.
            values = u.to(wide).unflatten(-1, (c.n_heads, c.headdim)) / exponent[..., None]
            if mask is not None:
                exponent = exponent * mask[..., None]
            rates = exponent.new_full((c.n_heads,), -1.0)
            y, last = STATE_SPACE_DUALITIES[c.scan_type](
                values, exponent, rates, unit(B), unit(C), None, None, False, state
            )
        return y.flatten(2), last

    def state_shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
        c = self.config
        return self.conv_shapes() | {"ssm_state": ((c.n_heads, c.headdim, c.d_state), torch.float32)}


def unit(v: Tensor) -> Tensor:
    """v / (|v| + 1e-6) along the last axis."""
    divided: Tensor = v / (torch.linalg.vector_norm(v, dim=-1, keepdim=True) + NORM_EPSILON)
    return divided
