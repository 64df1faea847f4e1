"""A mixer with complex diagonal states whose decay, input and output the input modulates.

The idea is that of the Triton Mamba among the project's sources, whose own code never ran: a diagonal complex
system, discretized with a step size from the input, every part of which the input then modulates. With
d a channel and n a state, a scalar step D_t = softplus(s_dt), m_t = sigmoid(s_A) per state, and raw b_t, c_t
per channel:

    a_t,n   = exp(D_t A_n) m_t,n                        A_n = -exp(A_log_n) + i A_imag_n
    h_t,dn  = a_t,n h_{t-1},dn + ((exp(D_t A_n) - 1) / A_n B_dn + b_t,d) u_t,d
    y_t,d   = Re sum_n (C_dn + c_t,d) h_t,dn + D_d u_t,d

The first factor of B is the zero-order hold. Since Re A < 0 and m < 1, |a| < 1 always.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mamba_int.float_models.config import MambaConfig
from mamba_int.float_models.mixer import Mixer, MixerState, initial_step_bias, register_mixer
from mamba_int.float_models.scans import RECURRENCES
from triton_kernels.activation import activate

INITIAL_MODULATION = 4.0
"""sigmoid(4) = 0.98: the decays are hardly modulated before training."""


@register_mixer("complex_mamba")
class ComplexMambaMixer(Mixer):
    """(u, z) = in_proj x; u = act(conv u); (s_dt, s_A, b, c) = s_proj u; y as above; out_proj(y act(z))."""

    def __init__(self, config: MambaConfig) -> None:
        super().__init__(config)
        c = config
        self.in_proj = nn.Linear(c.d_model, 2 * c.d_inner, bias=c.bias)
        self.conv1d = self.make_conv1d(c.d_inner)
        self.s_proj = nn.Linear(c.d_inner, 1 + c.d_state + 2 * c.d_inner)
        # S4D-Lin: -1/2 + i pi n (Gu et al. 2022, arXiv 2206.11893, equation 9)
        self.A_log = nn.Parameter(torch.full((c.d_state,), math.log(0.5)))
        self.A_imag = nn.Parameter(math.pi * torch.arange(float(c.d_state)))
        # Real and imaginary parts, so that optimizers and files see reals only.
        self.B = nn.Parameter(torch.randn(c.d_inner, c.d_state, 2) * 0.5**0.5)
        self.C = nn.Parameter(torch.randn(c.d_inner, c.d_state, 2) * (0.5 / c.d_state) ** 0.5)
        self.D = nn.Parameter(torch.ones(c.d_inner))
        self.out_proj = nn.Linear(c.d_inner, c.d_model, bias=c.bias)
        with torch.no_grad():
            self.s_proj.bias.zero_()
            self.s_proj.bias[:1] = initial_step_bias(1, c)
            self.s_proj.bias[1 : 1 + c.d_state] = INITIAL_MODULATION

    def forward(self, x: Tensor, mask: Tensor | None = None, state: MixerState | None = None) -> Tensor:
        c = self.config
        u, z = self.in_proj(x).chunk(2, -1)
        u = self.convolve(self.conv1d, u, mask, state)
        s = self.s_proj(u)
        with torch.autocast(x.device.type, enabled=False):
            y, last = self._scan(u, s, mask, None if state is None else state["ssm_state"].flatten(1))
        if state is not None:
            state["ssm_state"].copy_(last.detach().view_as(state["ssm_state"]))
        out: Tensor = self.out_proj(y.to(u.dtype) * activate(z, c.gate_activation))
        return out

    def _scan(self, u: Tensor, s: Tensor, mask: Tensor | None, state: Tensor | None) -> tuple[Tensor, Tensor]:
        c = self.config
        wide = torch.promote_types(u.dtype, torch.float32)
        u = u.to(wide)
        step, modulation, b, c_t = s.to(wide).split([1, c.d_state, c.d_inner, c.d_inner], -1)
        step = nn.functional.softplus(step)
        rates = torch.complex(-torch.exp(self.A_log.to(wide)), self.A_imag.to(wide))
        held = torch.exp(step * rates)
        decay = held * torch.sigmoid(modulation)
        gain = ((held - 1) / rates)[:, :, None] * torch.view_as_complex(self.B.to(wide)) + b[..., None]
        update = gain * u[..., None]
        if mask is not None:
            decay = torch.where(mask[..., None], decay, 1.0)
            update = update * mask[..., None, None]
        decay = decay[:, :, None].expand_as(update)
        h, last = RECURRENCES[c.scan_type](decay.flatten(2), update.flatten(2), state)
        h = h.unflatten(2, (c.d_inner, c.d_state))
        weight = torch.view_as_complex(self.C.to(wide)) + c_t[..., None]
        return (weight * h).real.sum(-1) + self.D.to(wide) * u, last

    def state_shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
        c = self.config
        return self.conv_shapes() | {"ssm_state": ((c.d_inner, c.d_state), torch.complex64)}

    def complexity(self, length: int) -> int:
        # four real products for each complex one: decay, gain of the input, and the real part of C h
        return 10 * length * self.config.d_inner * self.config.d_state
