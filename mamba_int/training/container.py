"""One safetensors file with a JSON description inside: the envelope of checkpoints and states."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from mamba_int.errors import MambaintError
from mamba_int.files import parse_json, read_bytes, write_bytes

METADATA_KEY = "mambaint"


def write_container(path: Path, tensors: dict[str, Tensor], description: dict[str, Any]) -> None:
    """Write tensors and their description atomically.

    Raises:
        MambaintError: if the folder cannot be written or the disk is full.
    """
    # A copy of each: safetensors refuses tensors that share memory, as tied weights do.
    separate = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    metadata = {METADATA_KEY: json.dumps(description, allow_nan=False)}
    write_bytes(path, safetensors.torch.save(separate, metadata))


def read_container(path: Path, remedy: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read back what :func:`write_container` wrote.

    Args:
        path: the file.
        remedy: what to do if the file is missing or is not such a file.

    Raises:
        MambaintError: if it is missing, truncated, damaged or not from mambaint. Nothing in the file
            is ever executed.
    """
    if path.suffix.lower() in (".pt", ".pth", ".bin", ".ckpt", ".pkl"):
        raise MambaintError(f"{path} is a pickle, which can run code when it is opened", remedy)
    content = read_bytes(path, remedy)
    try:
        tensors: dict[str, Tensor] = safetensors.torch.load(content)
    except (safetensors.SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise MambaintError(f"{path} is damaged or not a safetensors file ({error})", remedy) from error
    # The library has checked that the header is complete; it does not hand out the metadata of bytes.
    (length,) = struct.unpack("<Q", content[:8])
    header = parse_json(content[8 : 8 + length], f"the header of {path}")
    text = header.get("__metadata__", {}).get(METADATA_KEY)
    if text is None:
        raise MambaintError(f"{path} was not written by mambaint", remedy)
    description = parse_json(text.encode(), f"the description in {path}")
    if not isinstance(description, dict):
        raise MambaintError(f"the description in {path} is not an object", remedy)
    return tensors, description


def require_keys(description: dict[str, Any], keys: dict[str, type], source: str, remedy: str) -> None:
    """Check that a description has exactly these keys with values of these types.

    Raises:
        MambaintError: naming the first key that is missing, unknown or of another type.
    """
    for key in description:
        if key not in keys:
            raise MambaintError(f"{source} has an unknown entry '{key}'", remedy)
    for key, kind in keys.items():
        if key not in description:
            raise MambaintError(f"{source} lacks the entry '{key}'", remedy)
        if type(description[key]) is not kind:
            raise MambaintError(f"{source} has a {type(description[key]).__name__} as '{key}'", remedy)
