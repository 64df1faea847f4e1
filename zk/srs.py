"""SRS files: generated for development, or from a ceremony and checked by hash.

Whoever knows s can forge proofs. EZKL's generator chooses s in this process: development only.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mamba_int.errors import MambaintError
from mamba_int.files import canonical_json, read_json
from zk import store
from zk.process import run_job
from zk.srs_format import SrsKind, srs_bytes, verifying_part


@dataclass(frozen=True)
class Srs:
    """An SRS file that was checked when this object was made.

    Attributes:
        path: the file.
        kind: "development" (this machine could forge proofs) or "ceremony".
        sha256: hash of the whole file (hex).
        logrows: log2 of the number of points; equal to the circuit's.
    """

    path: Path
    kind: SrsKind
    sha256: str
    logrows: int

    def verifying(self) -> bytes:
        """The 388 bytes a verifier needs."""
        return verifying_part(self.path, self.logrows)


def _check_shape(path: Path, logrows: int, remedy: str) -> None:
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            stored = int.from_bytes(stream.read(4), "little")
    except OSError as error:
        raise MambaintError(f"cannot read the SRS {path}: {error.strerror or error}", remedy) from error
    if size != srs_bytes(logrows):
        raise MambaintError(f"the SRS {path} has {size} bytes and must have {srs_bytes(logrows)}", remedy)
    if stored != logrows:
        raise MambaintError(f"the SRS {path} is for 2^{stored} rows and must be for 2^{logrows}", remedy)


def development_srs(logrows: int, cache: Path | None = None, timeout: float = 3600) -> Srs:
    """The development SRS of this cache, generated on first use (about 6 s for 2^14 rows).

    Raises:
        MambaintError: if it is damaged or cannot be made.
    """
    folder = store.cache_folder(cache) / "srs" / f"development-{logrows}"
    remedy = f"delete the folder {folder} (its keys are then made again)"
    with store.building(folder) as fresh:
        if fresh is not None:
            job = {"path": str(fresh / "srs"), "logrows": logrows}
            run_job("development_srs", job, what="generating the SRS", timeout=timeout)
            _check_shape(fresh / "srs", logrows, remedy)
            about = {"kind": "development", "sha256": store.sha256_file(fresh / "srs"), "logrows": logrows}
            (fresh / "about.json").write_bytes(canonical_json(about))
    path = folder / "srs"
    _check_shape(path, logrows, remedy)
    digest = store.sha256_file(path)
    if read_json(folder / "about.json", remedy) != {
        "kind": "development",
        "sha256": digest,
        "logrows": logrows,
    }:
        raise MambaintError(f"the SRS {path} is damaged", remedy)
    return Srs(path, "development", digest, logrows)


def find_srs(sha256: str, logrows: int, path: Path | None = None, cache: Path | None = None) -> Path:
    """The full SRS file that a verifier package names: ``path``, or the cache's; none is made.

    Raises:
        MambaintError: if it is not there, or another one.
    """
    found = path or store.cache_folder(cache) / "srs" / f"development-{logrows}" / "srs"
    remedy = "give with --srs the SRS file that the proof was made with"
    if path is None and not found.exists():
        raise MambaintError(
            f"the SRS for 2^{logrows} rows with SHA-256 {sha256} is needed and is not in the cache", remedy
        )
    _check_shape(found, logrows, remedy)
    digest = store.sha256_file(found)
    if digest != sha256:
        raise MambaintError(f"the SRS {found} has SHA-256 {digest}, not the package's {sha256}", remedy)
    return found


def ceremony_srs(path: Path, sha256: str, logrows: int) -> Srs:
    """An SRS file from a public ceremony, in halo2's raw format and exactly for 2^logrows rows.

    Args:
        path: the file.
        sha256: its hash (hex) as published by a source you trust.
        logrows: the circuit's.

    Raises:
        MambaintError: if it is missing, of another size or not the published file.
    """
    remedy = f"download the ceremony's file for 2^{logrows} rows again"
    _check_shape(path, logrows, remedy)
    digest = store.sha256_file(path)
    if digest != sha256.strip().lower():
        raise MambaintError(f"the SRS {path} has SHA-256 {digest}, not {sha256}", remedy)
    return Srs(path, "ceremony", digest, logrows)


def check_choice(path: Path | None, sha256: str | None) -> None:
    """Refuse a ceremony's file without its hash, or the reverse.

    Raises:
        MambaintError: saying so.
    """
    if (path is None) != (sha256 is None):
        raise MambaintError(
            "--srs and --srs-sha256 belong together", "give the ceremony file and the hash it is known by"
        )


def chosen_srs(path: Path | None, sha256: str | None, logrows: int) -> Srs:
    """The SRS of a ceremony, or without a path one made on this machine.

    Raises:
        MambaintError: if only one of file and hash is given, or the file is not what it has to be.
    """
    check_choice(path, sha256)
    if path is not None and sha256 is not None:
        return ceremony_srs(path, sha256, logrows)
    return development_srs(logrows)
