"""What a float model remembers of the sequences it is given piece by piece: the size does not grow."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mamba_int.float_models.mixer import Mixer, MixerState


class MambaCache:
    """The states of all layers for a batch of sequences (state-spaces calls it ``InferenceParams``).

    Give it to a model with the first part of the sequences, of any length, then with the next, down to single
    steps: the outputs are those of the whole sequences, within float error. Tensors are overwritten in
    place, never replaced, so that a CUDA graph can hold them. Made by ``model.new_cache``.

    Args:
        mixers: of the layers, in order.
        batch: number of sequences.
        device, dtype: of the activations; states of scans have at least float32.

    Attributes:
        layers: the state of each layer.
        position: int64 [batch], the steps that each sequence has been given, padding left out.
    """

    def __init__(
        self, mixers: Sequence[nn.Module], batch: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.layers: list[MixerState] = []
        for mixer in mixers:
            assert isinstance(mixer, Mixer)
            self.layers.append(mixer.new_state(batch, device, dtype))
        self.position = torch.zeros(batch, dtype=torch.int64, device=device)

    @property
    def batch(self) -> int:
        """Number of sequences."""
        return len(self.position)

    def tensors(self) -> list[Tensor]:
        """All of it."""
        return [self.position, *(value for layer in self.layers for value in layer.values())]

    def reset(self, rows: Sequence[int] | None = None) -> None:
        """Forget everything, or the sequences with the numbers ``rows``."""
        for value in self.tensors():
            if rows is None:
                value.zero_()
            else:
                value[list(rows)] = 0

    def advance(self, steps: int, mask: Tensor | None) -> None:
        """Count ``steps`` steps, or those of the mask [batch, steps]."""
        self.position += steps if mask is None else mask.sum(1)

    def memory(self) -> dict[str, int]:
        """Bytes by state, all layers together, and in all (``total``)."""
        report: dict[str, int] = {}
        for layer in self.layers:
            for name, value in layer.items():
                report[name] = report.get(name, 0) + value.nbytes
        return report | {"position": self.position.nbytes, "total": sum(v.nbytes for v in self.tensors())}

    def copy(self) -> list[Tensor]:
        """What is remembered now, for :meth:`restore`."""
        return [value.clone() for value in self.tensors()]

    def restore(self, values: list[Tensor]) -> None:
        """Go back to what :meth:`copy` gave."""
        for value, old in zip(self.tensors(), values, strict=True):
            value.copy_(old)
