"""What the trainer needs of a model and nothing more."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn


class TrainableModel(Protocol):
    """A model the trainer can train: :class:`~mamba_int.model.MambaInt`, or a small stand-in in tests.

    ``forward`` maps int64 inputs to float32 logits: [n, T, C] to [n, classes], or (language model)
    [n, T] to [n, T, vocabulary]. While training it updates its own estimates of the activation
    scales, until ``freeze_scales``. ``state_dict`` holds everything, the estimates included.
    """

    @property
    def scales_frozen(self) -> bool: ...

    def __call__(self, inputs: Tensor) -> Tensor: ...

    def observe(self, inputs: Tensor) -> None: ...

    def freeze_scales(self) -> None: ...

    def frozen_integers(self) -> dict[str, Tensor]: ...

    def parameter_groups(self, learning_rate: float) -> list[dict[str, Any]]: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def buffers(self) -> Iterator[Tensor]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> Any: ...

    def to(self, device: torch.device) -> Self: ...

    def train(self, mode: bool = True) -> Self: ...

    def eval(self) -> Self: ...
