"""A compiled circuit: the contract between ``circuits``, which builds it, and ``zk``, which proves it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class PublicTensor:
    """One output of the circuit, in the order EZKL lists its instances.

    Attributes:
        name: name of the ONNX output.
        shape: shape; instances are its elements in row-major order.
        forced: the value every element has in any valid proof (anchors of range checks and claims are 0,
            say); None where the value is part of the statement, or the challenge.
        challenge: whether it is the challenge, which a verifier derives from the proof's commitments.
    """

    name: str
    shape: tuple[int, ...]
    forced: int | None = None
    challenge: bool = False

    @property
    def stated(self) -> bool:
        """Whether its values are part of the statement: neither forced nor derived."""
        return self.forced is None and not self.challenge

    @property
    def size(self) -> int:
        """Number of elements."""
        size = 1
        for extent in self.shape:
            size *= extent
        return size


SMALLEST_LOGROWS = 8
LARGEST_LOGROWS = 20
COMMITTED_INPUT = "input"
"""ONNX input that holds the model input alone, where a proof commits to it."""
CHAIN = "chain"
"""Public values that bind a segment to its place: the number of its chain, its position, and of the last
segment its steps, else 0."""
CHAIN_VALUES = 3
CHAIN_BITS = 128
"""Of the number of a chain, which is drawn at random."""
STATE_IN, STATE_OUT = "state_in", "state_out"
"""Names of the states before and after a segment, as public values or as committed inputs."""
ACTIVATIONS_IN, ACTIVATIONS_OUT = "activations_in", "activations_out"
"""Names of what crosses from stage to stage of a segment, likewise."""
GENERATED, TOKENS = "generated", "tokens"
"""Of a segment that shows what a language model generated: which steps, and their tokens (0 elsewhere)."""
SALTS = 8
"""Random field elements behind the values of a committed input.

A proof shows the commitment of a committed input and its value at one random point: two linear equations in
the values. With fewer salts than equations, a guessed input could be confirmed; eight leave room.
"""


def committed_values(values: Sequence[int], salts: Sequence[int]) -> list[int]:
    """What a committed model input holds: its values, a spare 0 that makes their number even, the salts."""
    return [*values, *[0] * (len(values) % 2), *salts]


@dataclass(frozen=True)
class InputTensor:
    """One ONNX input: private tensors one after the other.

    Attributes:
        name: of the ONNX input.
        members: names and sizes of the private tensors, in order.
        committed: whether the proof commits to it; then ``SALTS`` random field elements follow the members.
    """

    name: str
    members: tuple[tuple[str, int], ...]
    committed: bool = False

    @property
    def size(self) -> int:
        """Number of elements, salts included."""
        return sum(size for _, size in self.members) + (SALTS if self.committed else 0)


@dataclass(frozen=True)
class Witness:
    """Values of one inference, as signed integers (field elements where a lie is told in tests).

    Attributes:
        private: every private tensor by name, flattened row-major: the model input and all auxiliaries.
        public: every ONNX output but the challenge by name, flattened row-major.
        salts: of committed inputs, by name; those left out are drawn when the proof is made.
    """

    private: dict[str, list[int]]
    public: dict[str, list[int]]
    salts: dict[str, list[int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Circuit:
    """A constraint graph ready for EZKL, independent of any particular input.

    Attributes:
        model_id: SHA-256 (hex) of the integer graph it constrains.
        onnx: the constraint graph as a serialised ONNX model; same integer graph, same bytes.
        logrows: log2 of the number of rows; the lookup table and its multipliers are built for it.
        rows: predicted number of rows (EZKL's ``num_rows``), at ``num_inner_cols`` 2.
        inputs: the ONNX inputs, in order; a challenged circuit has one more, ``challenge``, of 2 elements.
        public: the ONNX outputs, in order.
        lookups: whether range checks read a lookup table, or are polynomial constraints.
    """

    model_id: str
    onnx: bytes
    logrows: int
    rows: int
    inputs: tuple[InputTensor, ...]
    public: tuple[PublicTensor, ...]
    lookups: bool = True

    @property
    def private(self) -> tuple[tuple[str, int], ...]:
        """Names and sizes of all private tensors."""
        return tuple(member for group in self.inputs for member in group.members)

    @property
    def challenged(self) -> bool:
        """Whether claims are checked at a random point."""
        return any(tensor.challenge for tensor in self.public)

    @property
    def lookup_low(self) -> int:
        """Lowest entry of the signed identity table, -2^(logrows-1)."""
        return table_low(self.logrows)

    @property
    def lookup_high(self) -> int:
        """Highest entry the table *really* has; EZKL fills the column up to the blinding rows."""
        return table_high(self.logrows)


BLINDING_ROWS = 8
"""Rows at the end of each column that EZKL keeps for blinding (measured, asserted per circuit)."""


def table_low(logrows: int) -> int:
    """Lowest entry of the lookup table: -2^(logrows-1)."""
    return -(1 << (logrows - 1))


def table_high(logrows: int) -> int:
    """Highest entry of the lookup table as EZKL fills it: low + 2^logrows - 8 - 1."""
    return table_low(logrows) + (1 << logrows) - BLINDING_ROWS - 1
