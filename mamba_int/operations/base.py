"""What an operation is: its type rule, its meaning in int64, and its PyTorch form."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from mamba_int.graph import IntArray, Node, TensorType

if TYPE_CHECKING:
    from torch import Tensor

Record = Callable[[str, Any], None]
"""Called with the name and value of each intermediate inside an operation."""
Memory = dict[str, Any]
"""What an operation remembers from step to step: arrays or tensors [batch, ...] by name, updated in place."""


def nobody(name: str, value: Any) -> None:
    """The :data:`Record` of runs in which nobody looks at intermediates."""


Trace = MutableMapping[str, Any]
"""Receives tensors by name: a dictionary, or something that looks at each and lets it go."""


def recorder(node: Node, trace: Trace | None) -> Record:
    """Enters the intermediates of a node into a trace, if there is one, as ``node.intermediate``."""
    if trace is None:
        return nobody

    def record(name: str, value: Any) -> None:
        trace[f"{node.name}.{name}"] = value

    return record


class Operation(ABC):
    """One operation of the integer graph; the closed set is ``mamba_int.operations.OPERATIONS``."""

    name: ClassVar[str]
    causal: ClassVar[bool] = True
    """Whether step t of the result depends on the steps 0..t alone, so that it can be had as they come."""

    @abstractmethod
    def infer(self, node: Node, inputs: Sequence[TensorType], seq_len: int) -> TensorType:
        """Shape and interval of the result; raises ValueError or KeyError if the node is malformed."""

    @abstractmethod
    def evaluate(self, node: Node, inputs: Sequence[IntArray], record: Record) -> IntArray:
        """The specification: NumPy int64, with a batch axis first."""

    @abstractmethod
    def execute(self, node: Node, inputs: Sequence[Tensor], record: Record, rounding: bool) -> Tensor:
        """The same on integer-valued floats, with gradients; ``rounding`` False is the float twin."""

    # -- one step at a time -------------------------------------------------------------------------------
    #
    # An operation without memory needs none of this: a step is a sequence of one.

    def initial_memory(self, node: Node, inputs: Sequence[TensorType]) -> dict[str, IntArray]:
        """What is remembered before the first step, of one sequence: int64 arrays by name."""
        return {}

    def evaluate_step(
        self, node: Node, inputs: Sequence[IntArray], memory: Memory, position: IntArray, record: Record
    ) -> IntArray:
        """:meth:`evaluate` of the next step alone, equal to it in every integer.

        Args:
            node: the node.
            inputs: its operands at this step, [batch, 1, ...].
            memory: of int64 arrays; receives what later steps need.
            position: int64 [batch], the steps before this one; rows may differ.
            record: receives the intermediates, without a time axis.

        Returns:
            The result, [batch, 1, ...].
        """
        return self.evaluate(node, inputs, record)

    def execute_step(
        self, node: Node, inputs: Sequence[Tensor], memory: Memory, position: Tensor, record: Record
    ) -> Tensor:
        """:meth:`evaluate_step` on integer-valued floats.

        Nothing in it reads a value on the host or makes a shape depend on one, so that a CUDA graph can
        hold it.
        """
        return self.execute(node, inputs, record, True)

    def chunk(self, node: Node) -> int | None:
        """After how many steps :meth:`evaluate_chunk_end` is due; None if never."""
        return None

    def longest(self, node: Node) -> int | None:
        """The most steps a sequence can have; None if any number."""
        return None

    def evaluate_chunk_end(
        self, node: Node, memory: Memory, ended: NDArray[np.bool_], record: Record
    ) -> None:
        """Bring the memory over the end of a chunk.

        Args:
            node: the node.
            memory: changes in place.
            ended: bool [batch], the rows whose chunk is full; the others stay as they are.
            record: receives the intermediates, meaningful in the rows that ended.
        """
        raise NotImplementedError(f"{self.name} has no chunks")

    def execute_chunk_end(self, node: Node, memory: Memory, ended: Tensor, record: Record) -> None:
        """:meth:`evaluate_chunk_end` on integer-valued floats, under the rules of :meth:`execute_step`."""
        raise NotImplementedError(f"{self.name} has no chunks")

    def memorize(
        self,
        node: Node,
        inputs: Sequence[Any],
        internals: Mapping[str, Any],
        source: Any,
        length: int,
        memory: Memory,
        rows: Any,
    ) -> None:
        """Take from a run over whole sequences what its first ``length`` steps leave, their last chunk still
        to be ended if it is full.

        Args:
            node: the node.
            inputs, internals: its operands [batch, T, ...] and intermediates in that run: NumPy or PyTorch.
            source: indices of the sequences in that run.
            length: at least 1; later steps are padding.
            memory: as before the first step in ``rows``, which are written.
            rows: indices into the memory, as many as ``source``.
        """
        raise NotImplementedError(f"{self.name} has no memory")


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
