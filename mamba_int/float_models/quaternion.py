"""Mixers whose states are quaternions that the input turns: Quaternion Mamba-2.

The block, for u [batch, T, d_model] and with products of quaternions from the left (the quaternion source,
mambaqc; ``triton_kernels.quaternion`` has the algebra):

    (x, z) = in_proj u;  x = act(conv x);  dt = softplus(dt_proj x);  (B, C) = (B_proj x, C_proj x)
    S = sigmoid(gate_proj x) x                                       real channels: quaternions (S, 0, 0, 0)
    Lambda = (-softplus(Lambda_alpha), Im Lambda);  q_t = cayley(dt_t Lambda)           |q_t| < 1
    h_t = q_t h_{t-1} + B_t S_t;  y_t = sum_k C_t,k h_t,k + D S_t
    out = sigmoid(z) out_proj(norm y)

``quaternion_full`` is that block as its source has it: dt for every channel; Lambda, B and C for every
channel and state, 8 d_inner d_state outputs, which makes 2.2 billion parameters of what is called 50 million
there; Im Lambda = tanh(Lambda_imag), the centered norm that flips channels; z has d_inner channels, of which
d_model are used. It is for small checkpoints of that program.

``quaternion`` is our change, which makes its presets as large as they are called and its scan products of
matrices:

- The d_inner / n_groups channels of a group share q, B and C, as those of a head of Mamba-2 share B and C.
  Each of the d_state states of a group has its own dt, so that the input turns and fades every one of them
  by itself.
- B_t is dt_t B_t, the step of Euler's method: slow states do not outweigh fast ones.
- Im Lambda is not bounded, and the norm keeps directions.
- ``selective_axis``: Im(dt_t Lambda) + axis_proj x takes the place of Im(dt_t Lambda). With the fixed
  axis all q_t of a state commute, so that it sees turns but not their order; with this one they do not, and
  h composes rotations.

The ``_lite`` forms have real states: Im Lambda = 0, and only the real part of B.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamba_int.float_models.config import MambaConfig
from mamba_int.float_models.mixer import Mixer, MixerState, initial_step_bias, register_mixer
from mamba_int.float_models.scans import QUATERNION_RECURRENCES, QUATERNION_SCANS
from triton_kernels.quaternion import cayley, quaternion_product
from triton_kernels.quaternion_layer_norm import quaternion_layer_norm
from triton_kernels.sigmoid_gate import sigmoid_gate


class QuaternionLayerNorm(nn.Module):
    """Magnitudes of quaternions normalized over channels, directions kept.

    Args:
        width: channels. eps: added to the mean square. centered: the source's form, see
            ``triton_kernels.quaternion_layer_norm``.
    """

    def __init__(self, width: int, eps: float = 1e-5, centered: bool = False) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))
        self.beta = nn.Parameter(torch.zeros(width, 4))
        self.eps, self.centered = eps, centered

    def forward(self, y: Tensor) -> Tensor:
        """[..., D, 4] to the same."""
        return quaternion_layer_norm(y, self.gamma, self.beta, self.eps, self.centered)


class _QuaternionMixer(Mixer):
    """What the forms share: projections, convolution, gates and norm.

    Args:
        config: of the model. gate_width: channels of z. centered: the norm's form. real: real states.
    """

    def __init__(self, config: MambaConfig, gate_width: int, centered: bool, real: bool) -> None:
        super().__init__(config)
        c = config
        self.real = real
        self.in_proj = nn.Linear(c.d_model, c.d_inner + gate_width, bias=c.bias)
        self.conv1d = self.make_conv1d(c.d_inner)
        self.gate_proj = nn.Linear(c.d_inner, c.d_inner, bias=False)
        self.D = nn.Parameter(torch.ones(c.d_inner))
        self.norm = QuaternionLayerNorm(c.d_inner, c.norm_epsilon, centered)
        self.out_proj = nn.Linear(4 * c.d_inner, c.d_model, bias=c.bias)

    def forward(self, x: Tensor, mask: Tensor | None = None, state: MixerState | None = None) -> Tensor:
        c = self.config
        x, z = self.in_proj(x).split([c.d_inner, self.in_proj.out_features - c.d_inner], -1)
        x = self.convolve(self.conv1d, x, mask, state)
        S = sigmoid_gate(self.gate_proj(x), x)
        y, last = self.scan(x, S, mask, None if state is None else state["ssm_state"])
        if state is not None:
            state["ssm_state"].copy_(last.detach())
        # Components in planes, as the scan leaves them in memory: nothing is copied.
        y = self.norm(y).transpose(-1, -2).flatten(-2)
        return sigmoid_gate(z[..., : c.d_model], self.out_proj(y))

    def scan(self, x: Tensor, S: Tensor, mask: Tensor | None, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """y [batch, T, d_inner, 4] of the dtype of ``S``, and the final state."""
        raise NotImplementedError

    def step_sizes(self, dt_proj: nn.Linear, x: Tensor, mask: Tensor | None) -> Tensor:
        """softplus of the projection in at least float32; zero where a step is padding."""
        raw = F.linear(x, dt_proj.weight)
        dt = F.softplus(raw.to(torch.promote_types(raw.dtype, torch.float32)) + dt_proj.bias)
        return dt if mask is None else dt * mask[..., None]

    def rates(self, alpha: Tensor, imaginary: Tensor | None) -> Tensor:
        """Lambda [..., 4]."""
        real = -F.softplus(alpha.to(torch.promote_types(alpha.dtype, torch.float32)))[..., None]
        if imaginary is None:
            return F.pad(real, (0, 3))
        return torch.cat([real, imaginary.to(real.dtype)], -1)

    def complexity(self, length: int) -> int:
        # q h, B S and C h
        products = 1 + 1 + 4 if self.real else 16 + 4 + 16
        return products * length * self.config.d_inner * self.config.d_state


@register_mixer("quaternion")
class QuaternionMamba2Block(_QuaternionMixer):
    """The mixer with groups of channels; see the module."""

    def __init__(self, config: MambaConfig, real: bool = False) -> None:
        super().__init__(config, config.d_model, centered=False, real=real)
        c = config
        states = c.n_groups * c.d_state
        components = 1 if real else 4
        self.dt_proj = nn.Linear(c.d_inner, states)
        self.B_proj = nn.Linear(c.d_inner, components * states, bias=False)
        self.C_proj = nn.Linear(c.d_inner, 4 * states, bias=False)
        rates = torch.empty(c.n_groups, c.d_state).uniform_(c.A_min, c.A_max)
        # The inverse of softplus
        self.Lambda_alpha = nn.Parameter(rates + torch.log(-torch.expm1(-rates)))
        if not real:
            axes = F.normalize(torch.randn(c.n_groups, c.d_state, 3), dim=-1)
            self.Lambda_imag = nn.Parameter(axes * torch.rand(c.n_groups, c.d_state, 1) * c.A_max)
        if c.selective_axis:
            self.axis_proj = nn.Linear(c.d_inner, 3 * states, bias=False)
        with torch.no_grad():
            self.dt_proj.bias.copy_(initial_step_bias(states, c))

    def scan(self, x: Tensor, S: Tensor, mask: Tensor | None, state: Tensor | None) -> tuple[Tensor, Tensor]:
        c = self.config

        def planes(v: Tensor, components: int) -> Tensor:
            """[batch, T, components G N] as [batch, T, G, components, N]."""
            shaped: Tensor = v.unflatten(-1, (c.n_groups, components, c.d_state))
            return shaped

        dt = planes(self.step_sizes(self.dt_proj, x, mask), 1)
        rates = self.rates(self.Lambda_alpha, None if self.real else self.Lambda_imag)
        z = dt * rates.transpose(-1, -2)
        if c.selective_axis:
            turn = planes(self.axis_proj(x), 3).to(z.dtype)
            if mask is not None:
                turn = turn * mask[..., None, None, None]
            z = z + F.pad(turn, (0, 0, 1, 0))
        B = planes(self.B_proj(x), 1 if self.real else 4) * dt.to(x.dtype)
        if self.real:
            B = F.pad(B, (0, 0, 0, 3))
        C = planes(self.C_proj(x), 4)
        with torch.autocast(x.device.type, enabled=False):
            y, last = QUATERNION_SCANS[c.scan_type](
                cayley(z.transpose(-1, -2)),
                B.transpose(-1, -2),
                C.transpose(-1, -2),
                S.unflatten(-1, (c.n_groups, -1)),
                self.D.view(c.n_groups, -1),
                state,
            )
        return y.flatten(2, 3), last

    def state_shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
        c = self.config
        shape = (c.n_groups, c.d_inner // c.n_groups, c.d_state, 4)
        return self.conv_shapes() | {"ssm_state": (shape, torch.float32)}


@register_mixer("quaternion_lite")
class QuaternionLiteBlock(QuaternionMamba2Block):
    """The same with real states."""

    def __init__(self, config: MambaConfig) -> None:
        super().__init__(config, real=True)


@register_mixer("quaternion_full")
class QuaternionFullBlock(_QuaternionMixer):
    """The mixer of the source, with its names and, but for out_proj, its shapes; see the module.

    Columns of out_proj are (component, channel) here and (channel, component) there.
    """

    def __init__(self, config: MambaConfig, real: bool = False) -> None:
        super().__init__(config, config.d_inner, centered=True, real=real)
        c = config
        self.dt_proj = nn.Linear(c.d_inner, c.d_inner)
        self.B_proj = nn.Linear(c.d_inner, 4 * c.d_inner * c.d_state, bias=False)
        self.C_proj = nn.Linear(c.d_inner, 4 * c.d_inner * c.d_state, bias=False)
        self.Lambda_alpha = nn.Parameter(1.0 + 0.5 * torch.randn(c.d_inner, c.d_state))
        if not real:
            self.Lambda_imag = nn.Parameter(0.1 * torch.randn(c.d_inner, c.d_state, 3))
        nn.init.zeros_(self.dt_proj.bias)

    def scan(self, x: Tensor, S: Tensor, mask: Tensor | None, state: Tensor | None) -> tuple[Tensor, Tensor]:
        c = self.config
        shape = (c.d_inner, c.d_state, 4)
        dt = self.step_sizes(self.dt_proj, x, mask)
        B, C = (proj(x).to(dt.dtype).unflatten(-1, shape) for proj in (self.B_proj, self.C_proj))
        values = S.to(dt.dtype)
        if mask is not None:
            values = values * mask[..., None]
        with torch.autocast(x.device.type, enabled=False):
            imaginary = None if self.real else torch.tanh(self.Lambda_imag)
            q = cayley(dt[..., None, None] * self.rates(self.Lambda_alpha, imaginary))
            if self.real:
                B = F.pad(B[..., :1], (0, 3))
            update = B * values[..., None, None]
            h, last = QUATERNION_RECURRENCES[c.scan_type](
                q.flatten(2, 3), update.flatten(2, 3), None if state is None else state.flatten(1, 2)
            )
            y = quaternion_product(C, h.unflatten(2, shape[:2])).sum(-2)
            y = y + F.pad((self.D * values)[..., None], (0, 3))
        # in planes, as the norm and out_proj read them
        y = y.to(S.dtype).transpose(-1, -2).contiguous().transpose(-1, -2)
        return y, last.unflatten(1, shape[:2])

    def state_shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
        c = self.config
        return self.conv_shapes() | {"ssm_state": ((c.d_inner, c.d_state, 4), torch.float32)}


@register_mixer("quaternion_full_lite")
class QuaternionFullLiteBlock(QuaternionFullBlock):
    """The lite mixer of the source."""

    def __init__(self, config: MambaConfig) -> None:
        super().__init__(config, real=True)
