"""A compiled circuit: the contract between ``circuits``, which builds it, and ``zk``, which proves it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PublicTensor:
    """One output of the circuit, in the order EZKL lists its instances.

    Attributes:
        name: name of the ONNX output.
        shape: shape; instances are its elements in row-major order.
        forced: the value every element has in any valid proof (anchors of range checks are 0);
            None where the value is part of the statement.
    """

    name: str
    shape: tuple[int, ...]
    forced: int | None = None

    @property
    def size(self) -> int:
        """Number of elements."""
        size = 1
        for extent in self.shape:
            size *= extent
        return size


@dataclass(frozen=True)
class Witness:
    """Values of one inference, as signed integers (field elements where a lie is told in tests).

    Attributes:
        private: every ONNX input by name, flattened row-major: the model input and all auxiliaries.
        public: every ONNX output by name, flattened row-major.
    """

    private: dict[str, list[int]]
    public: dict[str, list[int]]


@dataclass(frozen=True)
class Circuit:
    """A constraint graph ready for EZKL, independent of any particular input.

    Attributes:
        model_id: SHA-256 (hex) of the integer graph it constrains.
        onnx: the constraint graph as a serialised ONNX model; same integer graph, same bytes.
        logrows: log2 of the number of rows; the lookup table and all multipliers are built for it.
        rows: predicted number of rows (EZKL's ``num_rows``), at ``num_inner_cols`` 2.
        private: names and sizes of the ONNX inputs, in order.
        public: the ONNX outputs, in order.
    """

    model_id: str
    onnx: bytes
    logrows: int
    rows: int
    private: tuple[tuple[str, int], ...]
    public: tuple[PublicTensor, ...]

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
