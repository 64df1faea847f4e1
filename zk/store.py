"""The cache folder: where it is, locks, and folders that appear whole or not at all."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mamba_int.errors import MambaintError


def cache_folder(chosen: Path | None = None) -> Path:
    """The folder for SRS files and keys: ``chosen``, else $MAMBAINT_CACHE, else ~/.cache/mambaint."""
    if chosen is not None:
        return chosen
    configured = os.environ.get("MAMBAINT_CACHE")
    return Path(configured) if configured else Path.home() / ".cache" / "mambaint"


@contextmanager
def building(folder: Path) -> Iterator[Path | None]:
    """Hold the lock of ``folder``; yield a temporary folder to fill, or None if ``folder`` exists already.

    The temporary folder is renamed onto ``folder`` when the block succeeds and removed when it fails, so
    an interruption leaves nothing half-made. A second process waits for the first and then finds the
    folder made. What a killed process left behind is removed by the next one.

    Raises:
        MambaintError: if the cache folder cannot be written or the disk is full.
    """
    temporary: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with (folder.parent / f".{folder.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if folder.exists():
                yield None
                return
            for stale in folder.parent.glob(f".{folder.name}.*.part"):
                shutil.rmtree(stale, ignore_errors=True)
            temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=".part"))
            yield temporary
            temporary.chmod(0o755)
            temporary.rename(folder)
    except OSError as error:
        raise MambaintError(
            f"cannot write {folder}: {error.strerror or error}",
            "choose a writable cache folder with free space (environment variable MAMBAINT_CACHE)",
        ) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def sha256_file(path: Path) -> str:
    """SHA-256 (hex) of a file.

    Raises:
        MambaintError: if it cannot be read.
    """
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise MambaintError(f"cannot read {path}: {error.strerror or error}", "check the path") from error
