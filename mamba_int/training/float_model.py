"""A float model as the trainer sees it: integer inputs, no scales, nothing to freeze."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from mamba_int.datasets import ClassificationData, TextData
from mamba_int.errors import MambaintError
from mamba_int.float_models.config import MambaConfig
from mamba_int.float_models.models import MambaForCausalLM, MambaForSequenceClassification
from mamba_int.training.checkpoint import Checkpoint

TrainedFloatModel = MambaForCausalLM | MambaForSequenceClassification


def input_places(low: int, high: int) -> int:
    """Binary places of the input integers of a float classifier: the largest magnitude is in (1/2, 1].

    Part of what a checkpoint means: its model reads integer * 2**-input_places.
    """
    return (max(abs(low), abs(high)) - 1).bit_length()


class TrainableFloatModel:
    """A float classifier or language model, as :class:`~mamba_int.training.protocol.TrainableModel` asks.

    Parameters keep the names of ``mamba_int.float_models``; a configuration with ``n_features`` is that of a
    classifier.

    Args:
        config: of the model.
        seed: of its initial weights.
        input_frac: of a classifier: binary places of its input integers; see :func:`input_places`.

    Attributes:
        model: the float model itself.
    """

    observing = False
    scales_frozen = True

    def __init__(self, config: MambaConfig, seed: int = 0, input_frac: int = 0) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = _model_of(config)
        self._unit = 2.0**-input_frac

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether the layers are computed anew in the backward pass."""
        return self.model.backbone.gradient_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, value: bool) -> None:
        self.model.backbone.gradient_checkpointing = value

    def __call__(self, inputs: Tensor) -> Tensor:
        """float32 logits [n, classes] of integers [n, T, C], or [n, T, vocabulary] of token ids [n, T]."""
        if self.model.config.n_features:
            inputs = inputs * self._unit
        logits: Tensor = self.model(inputs).logits
        return logits.float()

    def scales(self) -> Mapping[str, int]:
        """None: floats need no scales."""
        return {}

    def observe(self, inputs: Tensor) -> None:
        """Nothing: there are no scales to estimate."""

    def freeze_scales(self) -> None:
        """Nothing: there are no scales to freeze."""

    def frozen_integers(self) -> dict[str, Tensor]:
        """None: integers come from a conversion (``quantize.float_mamba``)."""
        return {}

    def parameter_roles(self) -> Mapping[str, list[nn.Parameter]]:
        """See ``MambaModel.parameter_roles``."""
        return self.model.parameter_roles()

    def parameters(self) -> Iterator[nn.Parameter]:
        """Of the float model, tied ones once."""
        return self.model.parameters()

    def buffers(self) -> Iterator[Tensor]:
        """Of the float model."""
        return self.model.buffers()

    def state_dict(self) -> dict[str, Any]:
        """Of the float model."""
        return self.model.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> Any:
        """Into the float model."""
        return self.model.load_state_dict(state_dict)

    def to(self, device: torch.device) -> Self:
        """Move the float model."""
        self.model.to(device)
        return self

    def train(self, mode: bool = True) -> Self:
        """Set the float model's mode."""
        self.model.train(mode)
        return self

    def eval(self) -> Self:
        """Set the float model's mode."""
        return self.train(False)


def new_float_model(
    config: MambaConfig, data: ClassificationData | TextData, seed: int
) -> TrainableFloatModel:
    """An untrained float model that reads the integers of ``data``."""
    frac = 0 if isinstance(data, TextData) else input_places(data.input_low, data.input_high)
    return TrainableFloatModel(config, seed, frac)


def restored_float_model(checkpoint: Checkpoint) -> TrainableFloatModel:
    """The trained float model of a checkpoint, on the CPU, in eval mode.

    Raises:
        MambaintError: if the checkpoint is of a native model, or its weights do not fit its configuration.
    """
    config, data = checkpoint.model_config, checkpoint.data
    remedy = "give a checkpoint of a float model that 'mambaint train' wrote"
    if not isinstance(config, MambaConfig):
        raise MambaintError("the checkpoint is not of a float model", remedy)
    if bool(config.n_features) == (data.tokenizer is not None):
        raise MambaintError("the checkpoint's data does not fit its configuration", remedy)
    frac = input_places(data.input_low, data.input_high) if config.n_features else 0
    # Settings that lie must be found before memory is taken for them.
    with torch.device("meta"):
        wanted = {name: value.shape for name, value in _model_of(config).state_dict().items()}
    found = {name: value.shape for name, value in checkpoint.model_state.items()}
    if found != wanted:
        name = min(found.items() ^ wanted.items())[0]
        raise MambaintError(f"the weights '{name}' of the checkpoint do not fit its configuration", remedy)
    trainable = TrainableFloatModel(config, 0, frac)
    trainable.load_state_dict(checkpoint.model_state)
    return trainable.eval()


def _model_of(config: MambaConfig) -> TrainedFloatModel:
    return MambaForSequenceClassification(config) if config.n_features else MambaForCausalLM(config)
