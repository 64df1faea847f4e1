"""What the trainer needs of a model and nothing more."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn


class TrainableModel(Protocol):
    """A model the trainer can train: :class:`~mamba_int.model.MambaInt`, a float model
    (:class:`~mamba_int.training.float_model.TrainableFloatModel`), or a small stand-in in tests.

    ``forward`` maps int64 inputs to float32 logits: [n, T, C] to [n, classes], or (language model)
    [n, T] to [n, T, vocabulary]. While training it updates its own estimates of the activation
    scales, until ``freeze_scales``: buffers, of which those of floats are linear in the mean over the batch
    and not read after their update, so that the trainer may average them over the parts of a batch.
    ``state_dict`` holds everything, the estimates included. ``parameter_roles`` has every parameter
    once, under ``matrices``, ``embeddings``, ``decays`` or ``small``. With ``gradient_checkpointing`` set,
    the layers are computed anew in the backward pass. ``observing`` False suspends the estimates, so that
    a step reads nothing on the host; ``scales`` are what they have led to.
    """

    gradient_checkpointing: bool
    observing: bool

    @property
    def scales_frozen(self) -> bool: ...

    def scales(self) -> Mapping[str, int]: ...

    def __call__(self, inputs: Tensor) -> Tensor: ...

    def observe(self, inputs: Tensor) -> None: ...

    def freeze_scales(self) -> None: ...

    def frozen_integers(self) -> dict[str, Tensor]: ...

    def parameter_roles(self) -> Mapping[str, list[nn.Parameter]]: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def buffers(self) -> Iterator[Tensor]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> Any: ...

    def to(self, device: torch.device) -> Self: ...

    def train(self, mode: bool = True) -> Self: ...

    def eval(self) -> Self: ...
