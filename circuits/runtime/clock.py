"""Where the sequences of a batch are, as ONNX nodes."""

from __future__ import annotations

import numpy as np

from circuits.runtime.builder import Builder
from mamba_int.graph import IntArray


class Clock:
    """The positions of the sequences: how many steps each has consumed.

    Args:
        b: receives the nodes.
        position: name of an int64 tensor [batch].
    """

    def __init__(self, b: Builder, position: str) -> None:
        self._b = b
        self._position = position
        self._within: dict[int, str] = {}
        self._places: dict[tuple[int, ...], str] = {}

    def within(self, period: int) -> str:
        """position mod period, int64 [batch]."""
        if period not in self._within:
            divisor = self._b.initializer(np.array(period, np.int64))
            self._within[period] = self._b.op("Mod", self._position, divisor)
        return self._within[period]

    def place(self, period: int) -> str:
        """1 where position mod period is, else 0: [batch, period, 1]."""
        return self._one_hot(np.arange(period)[:, None])

    def row(self, period: int) -> str:
        """The same after a 0: [batch, 1, 1 + period]."""
        return self._one_hot(np.arange(-1, period)[None])

    def _one_hot(self, offsets: IntArray) -> str:
        key = offsets.shape
        if key not in self._places:
            b = self._b
            here = b.reshape(self.within(int(offsets.max()) + 1), 0, 1, 1)
            self._places[key] = b.truth(b.op("Equal", here, b.initializer(offsets)))
        return self._places[key]

    def ended(self, period: int) -> str:
        """Whether the last step was the last of its period, bool [batch]."""
        return self._b.op("Equal", self.within(period), self._b.initializer(np.array(0, np.int64)))
