"""What other programs saved: named tensors and settings, read without running anything in the files.

Tensors come from safetensors (whole or in shards), from PyTorch's zip files through its weights-only
unpickler, or from NumPy's npz. Shapes are known before any tensor is read, and are held against the bytes
that are really there.
"""

from __future__ import annotations

import json
import math
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from mamba_int.errors import MambaintError
from mamba_int.files import read_bytes
from mamba_int.float_models.checkpoint import (
    CONFIG_FILE,
    INDEX_FILE,
    WEIGHTS_FILE,
    SafetensorsReader,
    listed,
)

TORCH_FILE = "pytorch_model.bin"
TORCH_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
_SUFFIXES = (".safetensors", *TORCH_SUFFIXES, ".npz")
_CONTAINERS = ("model_state_dict", "state_dict", "model")
"""Under which of these a training checkpoint keeps its weights."""
_WRAPPERS = ("_orig_mod.", "module.")
"""What torch.compile and DistributedDataParallel put before the names."""
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_REMEDY = "give a folder with config.json and model.safetensors, or a safetensors, PyTorch or npz file"


class TensorReader(Protocol):
    """Named tensors of a file or of several."""

    def __iter__(self) -> Iterator[str]: ...

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it."""
        ...

    def __getitem__(self, name: str) -> Any: ...


class TorchReader:
    """The tensors of a file that ``torch.save`` wrote, mapped into memory.

    Raises:
        MambaintError: if the file is damaged, from before PyTorch 1.6, holds anything but tensors and plain
            values, or has a tensor larger than its bytes.
    """

    def __init__(self, path: Path) -> None:
        if not zipfile.is_zipfile(path):
            raise MambaintError(
                f"{path} is damaged, or a bare pickle, which can run code when it is opened",
                "save the weights as safetensors",
            )
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:
            # The zip reader, the unpickler and the allocator each raise kinds of their own.
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise MambaintError(
                f"{path} is not a file of weights alone ({reason})", "save the weights as safetensors"
            ) from error
        self._tensors = _state_dict(content, path)
        for name, value in self._tensors.items():
            if value.layout != torch.strided or value.untyped_storage().nbytes() < value.nbytes:
                raise MambaintError(
                    f"{path}: {name} {list(value.shape)} is larger than its bytes in the file",
                    "save the weights again, contiguous and dense",
                )

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]


def _state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    def all_tensors(value: Any) -> bool:
        return (
            isinstance(value, dict)
            and bool(value)
            and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())
        )

    if all_tensors(content):
        return dict(content)
    if isinstance(content, dict):
        inside = [key for key in _CONTAINERS if all_tensors(content.get(key))]
        if len(inside) == 1:
            return dict(content[inside[0]])
    raise MambaintError(
        f"{path} holds no dictionary of tensors, also not under {', '.join(_CONTAINERS)}",
        "save model.state_dict()",
    )


class NpzReader:
    """The arrays of an npz file; pickled ones are refused.

    Raises:
        MambaintError: if the file is damaged, or an array has objects or a size other than its bytes.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._shapes: dict[str, tuple[int, ...]] = {}
        try:
            with zipfile.ZipFile(path) as archive:
                for info in archive.infolist():
                    with archive.open(info) as member:
                        version = np.lib.format.read_magic(member)
                        header = (
                            np.lib.format.read_array_header_1_0
                            if version == (1, 0)
                            else np.lib.format.read_array_header_2_0
                        )
                        shape, _, dtype = header(member)
                        size = math.prod(shape) * dtype.itemsize + member.tell()
                    name = info.filename.removesuffix(".npy")
                    if dtype.hasobject:
                        raise MambaintError(
                            f"{path}: {name} holds pickled objects, which can run code", "save plain arrays"
                        )
                    if size != info.file_size:
                        raise MambaintError(
                            f"{path}: {name} {list(shape)} has another size than its bytes in the file",
                            "save it again",
                        )
                    self._shapes[name] = tuple(shape)
        except MambaintError:
            raise
        # zipfile, zlib and numpy's header parser each raise kinds of their own on damaged bytes.
        except Exception as error:
            raise MambaintError(f"{path} is not a whole npz file ({error})", "save it again") from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def __getitem__(self, name: str) -> Tensor:
        try:
            with np.load(self._path, allow_pickle=False) as archive:
                return torch.from_numpy(np.ascontiguousarray(archive[name]))
        except TypeError as error:
            # bfloat16 among others: NumPy saves it as bytes without a meaning.
            raise MambaintError(
                f"{self._path}: {name} has a dtype that PyTorch does not know ({error})", "save it as float32"
            ) from error
        # The CRC is checked only while the bytes are inflated, by zipfile and zlib with kinds of their own.
        except Exception as error:
            raise MambaintError(
                f"{self._path}: {name} cannot be read ({error})", "save the file again"
            ) from error


class Settings:
    """Values of a ``config.json``, with their types checked.

    Args:
        values: the settings; None if there is no such file.
        source: what to call them in an error.
    """

    def __init__(self, values: dict[str, Any] | None, source: str) -> None:
        self.values = values if values is not None else {}
        self.present = values is not None
        self.source = source

    def __contains__(self, name: str) -> bool:
        return self.values.get(name) is not None

    def _get(self, name: str, kinds: tuple[type, ...], what: str, default: Any) -> Any:
        value = self.values.get(name)
        if value is None:
            if default is not None:
                return default
            if not self.present:
                raise MambaintError(f"there is no {self.source}", "give the folder with the settings")
            raise MambaintError(f"{self.source} lacks {name}", "give the settings that came with the weights")
        if type(value) not in kinds:
            raise MambaintError(f"{self.source} has {name} = {value!r}", f"give {what}")
        return value

    def integer(self, name: str, default: int | None = None) -> int:
        """A whole number; MambaintError if it is missing without a default, or is none."""
        value = self._get(name, (int, float), "a whole number", default)
        if value != value or value in (math.inf, -math.inf) or value != int(value):
            raise MambaintError(f"{self.source} has {name} = {value!r}", "give a whole number")
        return int(value)

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number."""
        value = float(self._get(name, (int, float), "a number", default))
        if not math.isfinite(value):
            raise MambaintError(f"{self.source} has {name} = {value!r}", "give a finite number")
        return value

    def boolean(self, name: str, default: bool | None = None) -> bool:
        """True or false."""
        return bool(self._get(name, (bool,), "true or false", default))

    def text(self, name: str, default: str | None = None) -> str:
        """A text."""
        return str(self._get(name, (str,), "a text", default))

    def limits(self, name: str) -> tuple[float, float]:
        """Least and most step size as ``MambaConfig`` has them, the most 0 for none. Absent: none."""
        pair = self._get(name, (list,), "a pair of numbers", [0.0, math.inf])
        # HuggingFace writes what JSON cannot as {"__float__": "Infinity"}.
        pair = [v.get("__float__") if isinstance(v, dict) else v for v in pair]
        try:
            low, high = (float(v) for v in pair)
        except (TypeError, ValueError) as error:
            raise MambaintError(f"{self.source} has {name} = {pair!r}", "give a pair of numbers") from error
        if not 0 <= low < high:
            raise MambaintError(f"{self.source} has {name} = {pair!r}", "give 0 <= least < most")
        return low, 0.0 if high == math.inf else high

    def rank(self, name: str, default: int) -> int:
        """The rank of the step sizes: a whole number, or "auto" for the default."""
        return default if self.values.get(name) == "auto" else self.integer(name, default)

    def within(self, name: str) -> Settings:
        """The settings of a table inside; none if it is missing."""
        return Settings(self._get(name, (dict,), "a table", {}), f"{self.source} {name}")


class SourceCheckpoint:
    """A checkpoint of any program: its settings and its tensors, by their names without wrappers.

    Args:
        path: a folder with weights and mostly ``config.json``, or a file of weights, perhaps beside one.

    Raises:
        MambaintError: if there are no weights, or the files are damaged, pickles, or lie about sizes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.exists():
            raise MambaintError(f"there is no {path}", "check the path")
        self._reader = _open(path)
        folder = path if path.is_dir() else path.parent
        self.settings = Settings(_read_settings(folder / CONFIG_FILE), str(folder / CONFIG_FILE))
        self._names: dict[str, str] = {}
        for name in self._reader:
            plain = _unwrapped(name)
            if plain in self._names:
                raise MambaintError(
                    f"{path} has both {self._names[plain]} and {name}", "keep one of each tensor"
                )
            self._names[plain] = name
        self._dtypes: dict[str, str] = {}

    @property
    def dtypes(self) -> dict[str, int]:
        """How many of the tensors that were read have each dtype."""
        return dict(Counter(self._dtypes.values()))

    @property
    def keys(self) -> list[str]:
        """Names of the tensors."""
        return list(self._names)

    def shape(self, key: str, axes: int | None = None) -> tuple[int, ...]:
        """The shape of a tensor.

        Args:
            key: its name.
            axes: how many axes it must have, if that matters.

        Raises:
            MambaintError: if it is missing, or has other axes.
        """
        if key not in self._names:
            raise MambaintError(f"{self.path} lacks {key}", "give a complete checkpoint, or another --format")
        shape = self._reader.shape(self._names[key])
        if axes is not None and len(shape) != axes:
            raise MambaintError(
                f"{self.path}: {key} has the shape {list(shape)}, not {axes} axes", "give another --format"
            )
        return shape

    def read_buffer(self, key: str) -> Tensor:
        """A tensor of any dtype, as it is, that becomes no parameter."""
        value: Tensor = self._reader[self._names[key]]
        return value

    def read(self, key: str) -> Tensor:
        """A tensor in float32.

        Raises:
            MambaintError: naming it if it is no float, or has a value that is not a finite float32.
        """
        value = self.read_buffer(key)
        dtype = str(value.dtype).removeprefix("torch.")
        if value.dtype not in _FLOATS:
            raise MambaintError(
                f"{self.path}: {key} has dtype {dtype}",
                "give weights as they were trained: float16, bfloat16, float32 or float64",
            )
        self._dtypes[key] = dtype
        value = value.to(torch.float32)
        finite = torch.isfinite(value)
        if not finite.all():
            raise MambaintError(
                f"{self.path}: {key} has {int((~finite).sum())} values that are NaN or infinite",
                "give a checkpoint from before the training diverged",
            )
        return value


def _unwrapped(name: str) -> str:
    for wrapper in _WRAPPERS:
        # torch.compile may wrap the model or any layer; DistributedDataParallel only the whole.
        name = name.removeprefix(wrapper)
    return name.replace("._orig_mod.", ".").removeprefix("_orig_mod.")


def _open(path: Path) -> TensorReader:
    if path.name == INDEX_FILE:
        path = path.parent
    if path.is_dir():
        if (path / INDEX_FILE).exists() or (path / WEIGHTS_FILE).exists():
            return SafetensorsReader(path)
        files = [path / TORCH_FILE]
        if not files[0].exists():
            files = sorted(p for p in path.iterdir() if p.suffix in _SUFFIXES)
        if len(files) != 1:
            found = f"{len(files)} files of weights ({listed([p.name for p in files])})" if files else "none"
            raise MambaintError(f"{path} should have one file of weights and has {found}", _REMEDY)
        path = files[0]
    suffix = path.suffix.lower()
    if suffix == ".safetensors":
        return SafetensorsReader(path)
    if suffix in TORCH_SUFFIXES:
        return TorchReader(path)
    if suffix == ".npz":
        return NpzReader(path)
    if suffix in (".pkl", ".pickle"):
        raise MambaintError(f"{path} is a pickle, which can run code when it is opened", _REMEDY)
    raise MambaintError(f"{path} is of no known kind", _REMEDY)


def _read_settings(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        # Not mambaint's strict JSON: HuggingFace writes Infinity.
        values = json.loads(read_bytes(path).decode())
    except (ValueError, RecursionError) as error:
        raise MambaintError(f"{path} is not valid JSON ({error})", "download it again") from error
    if not isinstance(values, dict):
        raise MambaintError(f"{path} is no table of settings", "give the settings that came with the weights")
    return values
