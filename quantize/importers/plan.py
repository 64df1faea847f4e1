"""From the tensors of a checkpoint to the parameters of a float model, every one accounted for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mamba_int.errors import MambaintError
from mamba_int.float_models.checkpoint import listed
from mamba_int.float_models.config import MambaConfig
from mamba_int.float_models.mixer import Mixer, build_mixer
from mamba_int.float_models.models import (
    MambaForCausalLM,
    MambaForFeatureExtraction,
    MambaForSequenceClassification,
    MambaModel,
)
from quantize.importers.source import SourceCheckpoint

FloatModel = MambaModel | Mixer

ARCHITECTURES: dict[str, Callable[[MambaConfig], FloatModel]] = {
    "MambaForCausalLM": MambaForCausalLM,
    "MambaForSequenceClassification": MambaForSequenceClassification,
    "MambaForFeatureExtraction": MambaForFeatureExtraction,
    "Mixer": build_mixer,
}
"""What a checkpoint can be of: a whole model, or one mixer without norm and residual."""


@dataclass(frozen=True)
class Form:
    """How a source keeps a parameter.

    Attributes:
        shape: its shape in the source, from that of the parameter.
        parameter: the parameter, from the tensor in the source.
    """

    shape: Callable[[tuple[int, ...]], tuple[int, ...]]
    parameter: Callable[[Tensor], Tensor]


AS_IS = Form(lambda shape: shape, lambda value: value)
TRANSPOSED = Form(lambda shape: shape[::-1], lambda value: value.permute(*range(value.ndim)[::-1]))
"""All axes in the other order: Flax's kernels [in, out] and taps [width, 1, channels]."""
DOUBLED = Form(lambda shape: shape, lambda value: 2 * value)
"""The source adds it twice."""


@dataclass(frozen=True)
class Plan:
    """How the tensors of a source become a model.

    Attributes:
        architecture: key of ``ARCHITECTURES``.
        config: of the model.
        key: name of a tensor in the source, from that of the parameter.
        forms: of parameters that are kept in another form, by their names within the mixer.
        constants: parameters that the source does not have and what fills them, by the same names or, outside
            of a mixer, by their full ones.
        copies: tensors of the source that may be there and then equal another one: tied weights.
        buffers: tensors of the source that are no parameters; the importer has looked at them.
        notes: what a reader of the model should know.
    """

    architecture: str
    config: MambaConfig
    key: Callable[[str], str] = lambda name: name
    forms: Mapping[str, Form] = field(default_factory=dict)
    constants: Mapping[str, Callable[[Tensor], object]] = field(default_factory=dict)
    copies: Mapping[str, str] = field(default_factory=dict)
    buffers: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()

    def build(self, source: SourceCheckpoint) -> FloatModel:
        """The model with the weights of the source, in float32 and eval mode.

        Raises:
            MambaintError: listing tensors that are missing, unknown or of another shape; naming one that is
                no float or not finite; for tied weights that differ.
        """
        make = ARCHITECTURES[self.architecture]
        # Settings that lie must be found before memory is taken for them.
        with torch.device("meta"):
            self._account(make(self.config), source)
        with torch.random.fork_rng(devices=[]):
            model = make(self.config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                constant = self.constants.get(_within_mixer(name))
                if constant is not None:
                    constant(parameter)
                else:
                    form = self.forms.get(_within_mixer(name), AS_IS)
                    parameter.copy_(form.parameter(source.read(self.key(name))))
        for copy, original in self.copies.items():
            if copy in source.keys and not torch.equal(source.read(copy), source.read(original)):
                raise MambaintError(
                    f"{source.path}: {copy} is tied to {original} and has other values",
                    "correct tie_embeddings in its settings",
                )
        return model.eval()

    def _account(self, model: nn.Module, source: SourceCheckpoint) -> None:
        shapes = {}
        for name, parameter in model.named_parameters():
            if _within_mixer(name) not in self.constants:
                form = self.forms.get(_within_mixer(name), AS_IS)
                shapes[self.key(name)] = form.shape(tuple(parameter.shape))
        shapes |= {copy: shapes[original] for copy, original in self.copies.items() if copy in source.keys}
        present = set(source.keys)
        missing = [key for key in shapes if key not in present]
        unknown = sorted(present - set(shapes) - self.buffers)
        misshapen = [
            f"{key} {list(source.shape(key))} instead of {list(shape)}"
            for key, shape in shapes.items()
            if key in present and source.shape(key) != shape
        ]
        faults = [
            f"{what} {listed(keys)}"
            for what, keys in (
                ("lacks", missing),
                ("has unknown", unknown),
                ("has of another shape", misshapen),
            )
            if keys
        ]
        if faults:
            raise MambaintError(
                f"{source.path} {', '.join(faults)}",
                "give the settings that came with these weights, or another --format",
            )


def _within_mixer(name: str) -> str:
    return name.rpartition(".mixer.")[2]


def count_layers(source: SourceCheckpoint, layers: str) -> int:
    """One more than the highest layer that has a tensor; a gap is then found as missing tensors.

    Args:
        source: the checkpoint.
        layers: what comes before a layer's number in its keys.
    """
    numbers = (key.removeprefix(layers).split(".")[0] for key in source.keys if key.startswith(layers))
    return 1 + max((int(number) for number in numbers if number.isdecimal()), default=0)


def expansion(d_inner: int, d_model: int) -> float:
    """``MambaConfig.expand`` for so many channels inside a block."""
    expand = d_inner / d_model
    # A quotient rounded down would lose a channel.
    return expand if int(expand * d_model) == d_inner else (d_inner + 0.5) / d_model
