"""The opening of a commitment: the salts behind a hidden input, which its prover keeps.

Whoever has the opening can test guesses of the input, and can show a third party which input was committed.
With it, another proof can show the same commitment for the same input.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from circuits.circuit import SALTS
from mamba_int.errors import MambaintError
from mamba_int.files import read_json, write_json
from zk import field
from zk.challenge import POINT_BYTES
from zk.identity import is_sha256
from zk.package import Package

FORMAT = "mambaint-opening"
VERSION = 1
PURPOSE = "secret: with these salts anyone can test guesses of the committed input"
MAX_PROOFS = SALTS - 1
"""Proofs that may share salts.

Each shows one more equation in input and salts, and all of them the commitment: with more equations than
salts, a guessed input could be confirmed.
"""

_FIELDS = {"format", "version", "purpose", "commitment", "logrows", "size", "srs_sha256", "salts", "proofs"}


@dataclass(frozen=True)
class Opening:
    """Content of an opening file.

    Attributes:
        salts: of the committed input.
        commitment: the point (hex) at the head of the proofs.
        logrows, size, srs_sha256: what it depends on besides input and salts: rows, values and salts, SRS.
        proofs: how many proofs were made with these salts.
    """

    salts: tuple[int, ...]
    commitment: str
    logrows: int
    size: int
    srs_sha256: str
    proofs: int

    def write(self, path: Path) -> None:
        """Write the file, readable by its owner alone."""
        content = {
            "format": FORMAT,
            "version": VERSION,
            "purpose": PURPOSE,
            "commitment": self.commitment,
            "logrows": self.logrows,
            "size": self.size,
            "srs_sha256": self.srs_sha256,
            "salts": [field.encode(salt) for salt in self.salts],
            "proofs": self.proofs,
        }
        write_json(path, content, mode=0o600)

    def check_reusable(self, package: Package) -> None:
        """Refuse salts that cannot, or must not, be used for one more proof.

        Raises:
            MambaintError: if the package's circuit would give another commitment, or the salts are used up.
        """
        if self.logrows != package.logrows:
            raise MambaintError(
                f"the opening is for 2^{self.logrows} rows and this circuit has 2^{package.logrows}: the "
                "commitments would differ",
                "bring both circuits to the same number of rows with --logrows",
            )
        if self.srs_sha256 != package.srs_sha256:
            raise MambaintError(
                "the opening is for another SRS: the commitments would differ",
                "give the SRS of the earlier proof with --srs",
            )
        if package.committed[0][1] != self.size:
            raise MambaintError(
                "the opening is for an input of another size: the commitments would differ",
                "prove without --reuse-opening",
            )
        if self.proofs >= MAX_PROOFS:
            raise MambaintError(
                f"{self.proofs} proofs were made with this opening; one more would let guesses be confirmed",
                "prove without --reuse-opening",
            )


def _salt(text: Any) -> int:
    if not isinstance(text, str):
        raise ValueError("a salt is not a text")
    return field.decode(text)


def read_opening(path: Path) -> Opening:
    """Read an opening file strictly.

    Raises:
        MambaintError: if it is missing or malformed.
    """
    remedy = "give the opening that prove --commit-input wrote"
    value = read_json(path, remedy)
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise MambaintError(f"{path} is not an opening of mambaint", remedy)
    if value.get("version") != VERSION:
        raise MambaintError(f"the opening {path} has another format version than {VERSION}", remedy)
    damaged = MambaintError(f"the opening {path} is damaged", remedy)
    if set(value) != _FIELDS or not isinstance(value["salts"], list) or len(value["salts"]) != SALTS:
        raise damaged
    commitment, counts = value["commitment"], {name: value[name] for name in ("logrows", "size", "proofs")}
    try:
        salts = tuple(_salt(text) for text in value["salts"])
        whole = len(bytes.fromhex(commitment)) == POINT_BYTES
    except (ValueError, TypeError) as error:
        raise damaged from error
    if (
        not whole
        or not is_sha256(value["srs_sha256"])
        or any(type(count) is not int or count < 1 for count in counts.values())
    ):
        raise damaged
    return Opening(salts=salts, commitment=commitment, srs_sha256=value["srs_sha256"], **counts)
