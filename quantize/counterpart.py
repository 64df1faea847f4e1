"""Which tensor of a float model a tensor of its integer graph stands for."""

from __future__ import annotations

from dataclasses import dataclass

from quantize.scales import FloatArray


@dataclass(frozen=True)
class Counterpart:
    """A tensor of the integer graph: integer * 2**-frac / scales are reals of the float model.

    Attributes:
        node: its name.
        scales: how many times larger than those reals each of its channels is [channels]; None for once.
    """

    node: str
    scales: FloatArray | None = None
