"""What a mixer is, and the registry of mixers: how to add one of your own.

@register_mixer("mine")
class MyMixer(Mixer): ...

MambaForCausalLM(MambaConfig(mixer="mine"))
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from mamba_int.errors import MambaintError
from mamba_int.float_models.config import MambaConfig
from triton_kernels.causal_conv1d import causal_conv1d

NO_STEP = -1e4
"""A step size before its softplus for which the step is exactly zero: the state stays as it is."""

MixerState = dict[str, Tensor]
"""What a mixer remembers of a sequence, [batch, ...] by name; it is overwritten in place."""


class Mixer(nn.Module):
    """The part of a block that mixes steps.

    Subclasses set ``conv_channels`` and implement :meth:`forward` and :meth:`state_shapes`.

    Args:
        config: of the model.
    """

    conv_channels: int

    def __init__(self, config: MambaConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, x: Tensor, mask: Tensor | None = None, state: MixerState | None = None) -> Tensor:
        """Mix the steps of [batch, T, d_model].

        Args:
            x: what the norm before the block gives.
            mask: bool [batch, T], False where a step is padding, which must change nothing that follows.
            state: of the steps before these; it is brought to the last of these that is no padding.
        """
        raise NotImplementedError

    def state_shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
        """Shape without batch of every state, and its least dtype (None: that of the activations)."""
        raise NotImplementedError

    def complexity(self, length: int) -> int:
        """Multiply-adds of the recurrence for one sequence of ``length`` steps."""
        raise NotImplementedError

    def new_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> MixerState:
        """The state before the first step: zeros."""
        return {
            name: torch.zeros(
                batch,
                *shape,
                device=device,
                dtype=dtype if least is None else torch.promote_types(least, dtype),
            )
            for name, (shape, least) in self.state_shapes().items()
        }

    # -- the convolution that every mixer here begins with ------------------------------------------------

    def make_conv1d(self, channels: int) -> nn.Conv1d:
        """The parameters of the depthwise convolution, under the names and in the shapes of all Mambas."""
        self.conv_channels = channels
        c = self.config
        return nn.Conv1d(channels, channels, c.d_conv, groups=channels, bias=c.conv_bias)

    def conv_shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
        """The state of the convolution: its last d_conv - 1 inputs."""
        return {"conv_state": ((self.config.d_conv - 1, self.conv_channels), None)}

    def convolve(self, conv1d: nn.Conv1d, x: Tensor, mask: Tensor | None, state: MixerState | None) -> Tensor:
        """The causal convolution and its activation; padding counts as zeros, as before the first step."""
        if mask is not None:
            x = x * mask[..., None].to(x.dtype)
        weight, activation = conv1d.weight[:, 0], self.config.activation
        if state is None:
            return causal_conv1d(x, weight, conv1d.bias, activation)
        memory = state["conv_state"]
        width = memory.shape[1]
        joined = torch.cat([memory.to(x.dtype), x], 1)
        y = causal_conv1d(joined, weight, conv1d.bias, activation)[:, width:]
        if mask is None:
            memory.copy_(joined[:, joined.shape[1] - width :].detach())
        elif width:
            memory.copy_(_last_inputs(joined, mask, width).detach())
        return y


def _last_inputs(joined: Tensor, mask: Tensor, width: int) -> Tensor:
    """The ``width`` inputs up to the last that is no padding; before the mask's are ``width`` older ones."""
    steps = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    last = (steps * mask).amax(1)
    places = last[:, None] + torch.arange(width, device=mask.device)
    return joined.gather(1, places[..., None].expand(-1, -1, joined.shape[2]))


def initial_step_bias(shape: int, config: MambaConfig) -> Tensor:
    """Biases whose softplus is log-uniform in [dt_min, dt_max], floored (arXiv 2312.00752, section 3.6)."""
    low, high = torch.tensor(config.dt_min).log(), torch.tensor(config.dt_max).log()
    step = torch.exp(torch.rand(shape) * (high - low) + low).clamp(min=config.dt_init_floor)
    # The inverse of softplus: log(e^x - 1) = x + log(1 - e^-x).
    return step + torch.log(-torch.expm1(-step))


def negative_exponential(A_log: Tensor) -> Tensor:
    """The rates A = -exp(A_log), in at least float32."""
    return -torch.exp(A_log.to(torch.promote_types(A_log.dtype, torch.float32)))


MIXERS: dict[str, type[Mixer]] = {}
"""Mixers by the name that ``MambaConfig.mixer`` gives."""

M = TypeVar("M", bound=Mixer)


def register_mixer(name: str) -> Callable[[type[M]], type[M]]:
    """Class decorator: make a mixer known by ``name``.

    Raises:
        MambaintError: if another mixer has the name.
    """

    def register(cls: type[M]) -> type[M]:
        if MIXERS.setdefault(name, cls) is not cls:
            raise MambaintError(f"there is a mixer '{name}' already", "choose another name")
        return cls

    return register


def build_mixer(config: MambaConfig) -> Mixer:
    """The mixer that a configuration names.

    Raises:
        MambaintError: if none is registered under that name.
    """
    if config.mixer not in MIXERS:
        near = difflib.get_close_matches(config.mixer, MIXERS, n=1)
        remedy = f"did you mean '{near[0]}'?" if near else f"choose one of {', '.join(MIXERS)}"
        raise MambaintError(f"there is no mixer '{config.mixer}'", remedy)
    return MIXERS[config.mixer](config)
