"""Reading and writing files so that nothing is ever left half-written."""

from __future__ import annotations

import json
import math
import os
import tempfile
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mamba_int.errors import MambaintError


@contextmanager
def replacing(path: Path, mode: int = 0o644) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; rename it onto ``path`` if the block succeeds.

    The parent folder is made. On any failure (full disk, interruption, error in the block)
    the temporary file is removed and an existing ``path`` is left as it was.

    Args:
        path: the file.
        mode: its permissions; nobody else can read it before it has them.

    Raises:
        MambaintError: if the folder cannot be made or written, or the disk is full.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        os.close(handle)
        temporary = Path(name)
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.chmod(mode)
        temporary.replace(path)
    except OSError as error:
        raise MambaintError(
            f"cannot write {path}: {error.strerror or error}",
            "choose a writable folder with free space",
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes, mode: int = 0o644) -> None:
    """Write ``content`` to ``path`` atomically."""
    with replacing(path, mode) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path, value: Any, mode: int = 0o644) -> None:
    """Write ``value`` to ``path`` atomically as indented JSON with a final newline."""
    write_bytes(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode(), mode)


def move(source: Path, path: Path) -> None:
    """Rename a finished file onto ``path``, in a folder of the same disk.

    Raises:
        MambaintError: if it cannot be.
    """
    try:
        source.replace(path)
    except OSError as error:
        raise MambaintError(
            f"cannot write {path}: {error.strerror or error}", "choose a writable folder"
        ) from error


def remove(path: Path) -> None:
    """Remove a file if it is there.

    Raises:
        MambaintError: if it cannot be removed.
    """
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise MambaintError(
            f"cannot remove {path}: {error.strerror or error}", "choose a writable folder"
        ) from error


def canonical_json(value: Any) -> bytes:
    """The one byte string for a JSON value: sorted keys, no spaces, ASCII, no NaN."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    ).encode()


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("duplicate key")
    return result


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is beyond any float")
    return value


def parse_json(content: bytes, source: str) -> Any:
    """Parse strict JSON: UTF-8, no duplicate keys, no NaN or Infinity.

    Raises:
        MambaintError: naming ``source`` if the text is not such JSON.
    """
    try:
        return json.loads(
            content.decode(),
            object_pairs_hook=_refuse_duplicates,
            parse_constant=_refuse_constant,
            parse_float=_finite,
        )
    except (ValueError, RecursionError) as error:
        raise MambaintError(
            f"{source} is not valid JSON ({error})", "check that the file is complete and unmodified"
        ) from error


def read_bytes(path: Path, remedy: str = "check the path") -> bytes:
    """Read a file whole.

    Raises:
        MambaintError: if it is missing, a folder or unreadable; ``remedy`` says what to do.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise MambaintError(f"cannot read {path}: {error.strerror or error}", remedy) from error


def read_json(path: Path, remedy: str = "check the path") -> Any:
    """Read and parse a strict JSON file; see :func:`read_bytes` and :func:`parse_json`."""
    return parse_json(read_bytes(path, remedy), str(path))


def parse_toml(content: bytes, source: str) -> dict[str, Any]:
    """Parse TOML.

    Raises:
        MambaintError: naming ``source`` if the text is not TOML.
    """
    try:
        return tomllib.loads(content.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise MambaintError(f"{source} is not valid TOML ({error})", "correct the file") from error


def read_toml(path: Path, remedy: str = "check the path") -> dict[str, Any]:
    """Read and parse a TOML file; see :func:`read_bytes` and :func:`parse_toml`."""
    return parse_toml(read_bytes(path, remedy), str(path))
