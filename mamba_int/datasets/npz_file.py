"""NPZ: arrays ``inputs`` [n, T, C] and ``labels`` [n], optionally ``test_inputs`` and ``test_labels``."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mamba_int.datasets.assembly import Samples, split_and_assemble
from mamba_int.datasets.records import ClassificationData
from mamba_int.errors import MambaintError
from mamba_int.files import read_bytes


def _samples(path: Path, arrays: dict[str, npt.NDArray[Any]], prefix: str) -> Samples:
    for key in (f"{prefix}inputs", f"{prefix}labels"):
        if key not in arrays:
            raise MambaintError(
                f"{path} has no array '{key}' (it holds: {', '.join(arrays) or 'nothing'})",
                "save it with numpy.savez(path, inputs=[n, T, C], labels=[n])",
            )
    inputs, labels = arrays[f"{prefix}inputs"], arrays[f"{prefix}labels"]
    if inputs.ndim != 3 or inputs.dtype.kind not in "biuf":
        raise MambaintError(
            f"{prefix}inputs of {path} is {inputs.dtype} {list(inputs.shape)}, not numbers [n, T, C]",
            "reshape it to samples x steps x features (a single feature still needs its axis)",
        )
    if labels.shape != inputs.shape[:1] or labels.dtype.kind not in "biuUS":
        raise MambaintError(
            f"{prefix}labels of {path} is {labels.dtype} {list(labels.shape)}, not one integer or text for "
            f"each of {inputs.shape[0]} samples",
            "save one label per sample",
        )
    values = inputs.astype(np.float64)
    if not np.isfinite(values).all():
        index = [int(i) for i in np.argwhere(~np.isfinite(values))[0]]
        raise MambaintError(
            f"{prefix}inputs{index} of {path} is not a finite number", "replace or remove missing values"
        )
    texts = labels.astype(str) if labels.dtype.kind != "b" else labels.astype(np.int64).astype(str)
    return Samples(values, tuple(texts.tolist()))


def load_npz(path: Path, split_seed: int = 0) -> ClassificationData:
    """Read an NPZ file without ever unpickling; other arrays in it are ignored.

    Raises:
        MambaintError: for a damaged file, a missing array, a wrong shape or dtype, or NaN.
    """
    content = read_bytes(path, "give the path of an .npz file")
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as archive:
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ValueError("a single array, not an archive")
            wanted = ("inputs", "labels", "test_inputs", "test_labels")
            arrays = {key: archive[key] for key in archive.files if key in wanted}
    # zipfile, zlib, numpy's header parser and its allocator each raise kinds of their own on damaged bytes.
    except Exception as error:
        raise MambaintError(
            f"{path} is not a readable .npz archive ({error})",
            "save plain numeric arrays with numpy.savez(path, inputs=..., labels=...)",
        ) from error
    has_test = "test_inputs" in arrays or "test_labels" in arrays
    test = _samples(path, arrays, "test_") if has_test else None
    return split_and_assemble(path.stem, _samples(path, arrays, ""), test, split_seed)
