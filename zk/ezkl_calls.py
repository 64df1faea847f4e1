"""Every call of EZKL, and the only module that imports it.

EZKL fails with RuntimeError or with a Rust panic (a BaseException); both become :class:`EzklError`.
All calls but :func:`verify` belong in the worker process: they print, may hang and take much memory.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mamba_int.errors import MambaintError
from zk.settings import chosen_run_arguments


class EzklError(Exception):
    """EZKL refused or crashed; the text is EZKL's own, on one line."""


def installed_version() -> str:
    """Version of the installed EZKL, without importing it.

    Raises:
        MambaintError: if it is not installed.
    """
    try:
        return version("ezkl")
    except PackageNotFoundError as error:
        raise MambaintError("EZKL is not installed", "run: pip install mambaint") from error


def _call(function: str, *arguments: Any, **options: Any) -> Any:
    try:
        # The import stays here: it costs 30 ms, and a broken installation is a fault like any other.
        import ezkl

        return getattr(ezkl, function)(*arguments, **options)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        text = " ".join(str(error).split())
        raise EzklError(text[:500] or type(error).__name__) from error


_ARGUMENT_NAMES = {"KZGCommit": "polycommit"}
"""Values that settings files and run arguments write differently."""


def _run_args(logrows: int, committed: bool) -> Any:
    arguments = _call("PyRunArgs")
    for name, value in chosen_run_arguments(logrows, committed).items():
        if name == "lookup_range":
            value = tuple(value)
        elif isinstance(value, str):
            value = _ARGUMENT_NAMES.get(value, value.lower())
        setattr(arguments, name, value)
    return arguments


def gen_settings(onnx: Path, settings: Path, logrows: int, committed: bool) -> None:
    """Write EZKL's settings for a constraint graph; EZKL picks ``run_args.logrows`` itself."""
    _call("gen_settings", str(onnx), str(settings), py_run_args=_run_args(logrows, committed))


def compile_circuit(onnx: Path, compiled: Path, settings: Path) -> None:
    """Compile the constraint graph under finished settings."""
    _call("compile_circuit", str(onnx), str(compiled), str(settings))


def gen_srs(srs: Path, logrows: int) -> None:
    """Write a fresh SRS whose secret this process knew: for development only."""
    _call("gen_srs", str(srs), logrows)


def commit(values: list[str], settings: Path, vk: Path, srs: Path) -> bytes:
    """Commitment of a committed input, as it will stand in the proof.

    Args:
        values: field elements as 64 hex digits.
    """
    points = _call("kzg_commit", values, str(vk), str(settings), str(srs))
    coordinates = [coordinate for point in points for coordinate in (point.x, point.y)]
    return b"".join(bytes.fromhex(coordinate)[::-1] for coordinate in coordinates)


def setup(compiled: Path, vk: Path, pk: Path, srs: Path) -> None:
    """Write the verifying and the proving key; deterministic for the same circuit and SRS."""
    _call("setup", str(compiled), str(vk), str(pk), str(srs), disable_selector_compression=False)


def gen_witness(inputs: Path, compiled: Path, witness: Path) -> list[list[str]]:
    """Evaluate the circuit and write EZKL's witness; returns the outputs as field elements."""
    outputs: list[list[str]] = _call("gen_witness", str(inputs), str(compiled), str(witness))["outputs"]
    return outputs


def mock(witness: Path, compiled: Path) -> bool:
    """Whether the witness satisfies every constraint (no keys, no proof)."""
    try:
        return _call("mock", str(witness), str(compiled)) is True
    except EzklError as error:
        if "verification failed" in str(error):
            return False
        raise


def prove(witness: Path, compiled: Path, pk: Path, proof: Path, srs: Path) -> None:
    """Write EZKL's proof file. May not return at all if the witness is invalid."""
    _call("prove", str(witness), str(compiled), str(pk), str(proof), str(srs))


def verify(proof: Path, settings: Path, vk: Path, srs: Path) -> bool:
    """Whether EZKL accepts; ``srs`` may be a verifying SRS (see ``zk.srs``).

    Raises:
        EzklError: EZKL's way of saying no.
    """
    # Anything but True itself is a rejection.
    return _call("verify", str(proof), str(settings), str(vk), str(srs), reduced_srs=True) is True
