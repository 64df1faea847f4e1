"""What a circuit will cost on this machine: a linear model of its size, fitted to a short measurement.

halo2's work is set by 2^logrows and by the number of columns, which is the same for all our circuits but
for committed inputs. Rows that are used, public values and the nodes of the constraint graph add a little.
The proof's length does not depend on the model at all.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from circuits.circuit import Circuit
from mamba_int.errors import MambaintError
from zk.jobs import committed_inputs

COMMITTED_BYTES = 128
"""Proof bytes of one committed input column: its commitment, its evaluation, one of its permutation."""
CHUNK_BYTES = 160
COLUMNS_PER_CHUNK = 3
"""Of every three more columns the first also opens another product of the permutation argument."""
COMMITTED_SHARE = 1 / 20
"""Work and memory of one committed column over those of a circuit without one; exact for proving keys."""

QUANTITIES = ("keygen_seconds", "prove_seconds", "verify_seconds", "setup_peak_bytes", "prove_peak_bytes")
"""What is fitted."""


@dataclass(frozen=True)
class Size:
    """What of a circuit decides its cost.

    Attributes:
        logrows: log2 of the rows of each column.
        rows: of them used.
        public_values: number of public field elements.
        nodes: of the constraint graph.
        committed_columns: input columns that the proof commits to one by one.
    """

    logrows: int
    rows: int
    public_values: int
    nodes: int
    committed_columns: int = 0

    @classmethod
    def of(cls, circuit: Circuit) -> Size:
        """Size of a finished circuit."""
        import onnx

        return cls(
            logrows=circuit.logrows,
            rows=circuit.rows,
            public_values=sum(tensor.size for tensor in circuit.public),
            nodes=len(onnx.load_from_string(circuit.onnx).graph.node),
            committed_columns=len(committed_inputs(circuit)),
        )

    def terms(self) -> list[float]:
        """What the fitted quantities are linear in; the second is the length of the columns."""
        return [1.0, float(1 << self.logrows), float(self.rows), float(self.public_values), float(self.nodes)]


@dataclass(frozen=True)
class Measurement:
    """What one circuit did cost.

    Attributes:
        size: of the circuit.
        keygen_seconds: making the keys, without the sample proof.
        prove_seconds: one proof, without its witness.
        verify_seconds: one verification.
        setup_peak_bytes: largest memory of the process that made the keys and tried them.
        prove_peak_bytes: largest memory of the process that proved.
        proof_bytes: length of the proof.
        proving_key_bytes: size of the proving key.
    """

    size: Size
    keygen_seconds: float
    prove_seconds: float
    verify_seconds: float
    setup_peak_bytes: int
    prove_peak_bytes: int
    proof_bytes: int
    proving_key_bytes: int


@dataclass(frozen=True)
class Prediction:
    """What a circuit will cost; fields as in :class:`Measurement`."""

    keygen_seconds: float
    prove_seconds: float
    verify_seconds: float
    setup_peak_bytes: int
    prove_peak_bytes: int
    proof_bytes: int
    proving_key_bytes: int

    @property
    def peak_bytes(self) -> int:
        """The most memory that setup or proving will need."""
        return max(self.setup_peak_bytes, self.prove_peak_bytes)


@dataclass(frozen=True)
class Calibration:
    """The fitted model.

    Attributes:
        machine: what it holds for; see :func:`zk.calibration.machine`.
        coefficients: of :meth:`Size.terms`, by quantity.
        proof_bytes: of a circuit without committed inputs.
        key_bytes_per_row: of the proving key, over 2^logrows.
    """

    machine: dict[str, Any]
    coefficients: dict[str, tuple[float, ...]]
    proof_bytes: int
    key_bytes_per_row: float

    def predict(self, size: Size) -> Prediction:
        """What a circuit of this size will cost here."""
        columns = size.committed_columns
        terms = np.array(size.terms())
        terms[1] *= 1 + COMMITTED_SHARE * columns
        fitted = {name: float(np.dot(self.coefficients[name], terms)) for name in QUANTITIES}
        chunks = (columns + 1) // COLUMNS_PER_CHUNK
        key = self.key_bytes_per_row * (1 + COMMITTED_SHARE * columns) * (1 << size.logrows)
        return Prediction(
            keygen_seconds=fitted["keygen_seconds"],
            prove_seconds=fitted["prove_seconds"],
            verify_seconds=fitted["verify_seconds"],
            setup_peak_bytes=round(fitted["setup_peak_bytes"]),
            prove_peak_bytes=round(fitted["prove_peak_bytes"]),
            proof_bytes=self.proof_bytes + COMMITTED_BYTES * columns + CHUNK_BYTES * chunks,
            proving_key_bytes=round(key),
        )


def fit(machine: dict[str, Any], measurements: Sequence[Measurement]) -> Calibration:
    """The model with the least relative errors over measurements of circuits without committed inputs."""
    terms = np.array([measured.size.terms() for measured in measurements])
    coefficients = {
        name: tuple(non_negative_fit(terms, np.array([float(getattr(m, name)) for m in measurements])))
        for name in QUANTITIES
    }
    largest = max(measurements, key=lambda measured: measured.size.logrows)
    return Calibration(
        machine=machine,
        coefficients=coefficients,
        proof_bytes=largest.proof_bytes,
        key_bytes_per_row=largest.proving_key_bytes / (1 << largest.size.logrows),
    )


def non_negative_fit(terms: np.ndarray[Any, Any], values: np.ndarray[Any, Any]) -> list[float]:
    """Coefficients >= 0 with the least sum of squared relative errors.

    Negative ones would be noise, and would grow into nonsense beyond the measured sizes.

    Args:
        terms: (n, m) with few columns m. values: (n,), all positive.
    """
    weighted = terms / values[:, None]
    best, least = [0.0] * terms.shape[1], np.inf
    for count in range(1, terms.shape[1] + 1):
        for chosen in itertools.combinations(range(terms.shape[1]), count):
            picked = weighted[:, chosen]
            solution = np.linalg.lstsq(picked, np.ones(len(values)), rcond=None)[0]
            error = float(np.square(picked @ solution - 1).sum())
            if (solution >= 0).all() and error < least:
                least, best = error, [0.0] * terms.shape[1]
                for index, value in zip(chosen, solution.tolist(), strict=True):
                    best[index] = value
    return best


def available_memory() -> int | None:
    """Bytes a new process could take without swapping; None where the system does not say (not Linux)."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    free = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
    group = Path("/sys/fs/cgroup")
    try:
        # In a container the group's limit is met long before the machine's.
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return free
    left = limit - used + int(statistics.get("inactive_file", 0))
    return left if free is None else min(free, left)


def memory_shortage(needed: int) -> MambaintError | None:
    """The fault that a process which needs this many bytes would run into, if there is not enough memory."""
    available = available_memory()
    if available is None or needed <= available:
        return None
    return MambaintError(
        f"this circuit needs about {needed / 1e6:,.0f} MB and {available / 1e6:,.0f} MB of memory are free",
        "use a smaller model, a shorter sequence or a machine with more memory, or close other programs",
    )


def require_memory(needed: int) -> None:
    """Refuse to begin what would end for lack of memory.

    Raises:
        MambaintError: if ``needed`` bytes are more than there are now.
    """
    shortage = memory_shortage(needed)
    if shortage is not None:
        raise shortage
