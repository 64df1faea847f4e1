"""What an operation is: its type rule, its meaning in int64, and its PyTorch form."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from mamba_int.graph import IntArray, Node, TensorType

if TYPE_CHECKING:
    from torch import Tensor

Record = Callable[[str, Any], None]
"""Called with the name and value of each intermediate inside an operation."""


class Operation(ABC):
    """One operation of the integer graph; the closed set is ``mamba_int.operations.OPERATIONS``."""

    name: ClassVar[str]

    @abstractmethod
    def infer(self, node: Node, inputs: Sequence[TensorType], seq_len: int) -> TensorType:
        """Shape and interval of the result; raises ValueError or KeyError if the node is malformed."""

    @abstractmethod
    def evaluate(self, node: Node, inputs: Sequence[IntArray], record: Record) -> IntArray:
        """The specification: NumPy int64, with a batch axis first."""

    @abstractmethod
    def execute(self, node: Node, inputs: Sequence[Tensor], record: Record, rounding: bool) -> Tensor:
        """The same on integer-valued floats, with gradients; ``rounding`` False is the float twin."""


def rounding_shift(x: IntArray, k: int) -> IntArray:
    """The one rounding rule: floor((x + 2^(k-1)) / 2^k); a negative k shifts left."""
    if k <= 0:
        return x << np.int64(-k)
    return (x + np.int64(1 << (k - 1))) >> np.int64(k)


def shifted(bound: int, k: int) -> int:
    """The rounding shift of one Python integer, for bounds."""
    return bound << -k if k <= 0 else (bound + (1 << (k - 1))) >> k


def shift_peak(magnitude: int, k: int) -> int:
    """Largest intermediate of a shift: |x| + 2^(k-1) to the right, the result to the left."""
    return magnitude + (1 << (k - 1)) if k > 0 else magnitude << -k


def check(condition: bool, message: str) -> None:
    """Raise ValueError(message) unless the node obeys the rule."""
    if not condition:
        raise ValueError(message)
