"""Which run a command means when it is given no path: the newest, as ``runs/latest.json`` says."""

from __future__ import annotations

import os
from pathlib import Path

from mamba_int.errors import MambaintError
from mamba_int.files import read_json, write_json

LATEST = Path("runs") / "latest.json"
CHECKPOINT_FILE = "checkpoint.safetensors"
MODEL_FILE = "model.mint"


def resolve_checkpoint(path: Path | None) -> Path:
    """The checkpoint that is meant: ``path``, the one in the folder ``path``, or that of the newest run.

    Raises:
        MambaintError: without a path and without a run.
    """
    return _resolve(path, "checkpoint", CHECKPOINT_FILE, "train one with 'mambaint train', or give its path")


def resolve_model(path: Path | None) -> Path:
    """The model that is meant: ``path``, the one in the folder ``path``, or the newest run's.

    Raises:
        MambaintError: without a path and without a quantized run.
    """
    return _resolve(path, "model", MODEL_FILE, "make one with 'mambaint quantize', or give its path")


def resolve_either(path: Path | None) -> Path:
    """What is meant by a path to a model or a checkpoint: the file itself, or of a folder the model, else the
    checkpoint; without a path the newest run's model.

    Raises:
        MambaintError: for a folder with neither; as :func:`resolve_model`.
    """
    if path is None:
        return resolve_model(None)
    if not path.is_dir():
        return path
    inside = [path / name for name in (MODEL_FILE, CHECKPOINT_FILE) if (path / name).is_file()]
    if not inside:
        raise MambaintError(
            f"{path} holds neither {MODEL_FILE} nor {CHECKPOINT_FILE}", "give the folder of a run, or a model"
        )
    return inside[0]


def remember_checkpoint(checkpoint: Path) -> None:
    """Make this the newest run, one without a model yet."""
    write_json(LATEST, {"checkpoint": str(checkpoint)})


def remember_model(checkpoint: Path, model: Path) -> None:
    """Make this the newest run."""
    write_json(LATEST, {"checkpoint": str(checkpoint), "model": str(model)})


def _resolve(path: Path | None, kind: str, file: str, remedy: str) -> Path:
    if path is not None:
        return path / file if os.path.isdir(path) else path
    if not os.path.exists(LATEST):
        raise MambaintError(f"there is no {kind} yet: {LATEST} does not exist", remedy)
    latest = read_json(LATEST, remedy)
    if not isinstance(latest, dict) or not all(isinstance(value, str) for value in latest.values()):
        raise MambaintError(f"{LATEST} is damaged", remedy)
    if kind not in latest:
        raise MambaintError(f"the newest run has no {kind} yet", remedy)
    return Path(latest[kind])
