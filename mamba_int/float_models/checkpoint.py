"""Reading folders of float models: ``config.json`` and weights as safetensors, whole or in shards.

The weights file has HuggingFace's names: ``model.safetensors``, or ``model.safetensors.index.json`` with a
``weight_map`` from tensors to files beside it. Tied weights are stored once. This module needs no PyTorch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from safetensors import SafetensorError, safe_open

from mamba_int.errors import MambaintError
from mamba_int.files import read_json
from mamba_int.float_models.config import MambaConfig

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
FORMAT = "mambaint-float"
VERSION = 1
MOST_NAMES = 8
"""Names of a long list that an error message shows."""


def listed(names: list[str]) -> str:
    """The first few names of a list."""
    rest = len(names) - MOST_NAMES
    return ", ".join(names[:MOST_NAMES]) + (f" and {rest} more" if rest > 0 else "")


class SafetensorsReader(Mapping[str, Any]):
    """The tensors of a folder or a file, each read when it is asked for.

    Args:
        path: a folder with one of the weights files, or a safetensors file.
        framework: ``pt`` for PyTorch tensors, ``np`` for arrays.

    Raises:
        MambaintError: if there are no weights, a shard is missing or damaged, or the index is none.
    """

    def __init__(self, path: Path, framework: str = "pt") -> None:
        self._framework = framework
        if path.is_dir():
            index = path / INDEX_FILE
            files = self._indexed(index) if index.exists() else {None: path / WEIGHTS_FILE}
        else:
            files = {None: path}
        self._handles: dict[Path, Any] = {}
        self._places: dict[str, Path] = {}
        for file in dict.fromkeys(files.values()):
            for name in self._open(file).keys():  # noqa: SIM118
                self._places[name] = file
        for name, file in files.items():
            if name is not None and self._places.get(name) != file:
                raise MambaintError(
                    f"{index} has {name} in {file.name}, which has no such tensor", "download the files again"
                )

    @staticmethod
    def _indexed(index: Path) -> dict[str | None, Path]:
        document = read_json(index)
        weight_map = document.get("weight_map") if isinstance(document, dict) else None
        if not isinstance(weight_map, dict) or not weight_map:
            raise MambaintError(f"{index} has no weight_map", "give the index that came with the weights")
        for file in weight_map.values():
            # A file may only be beside its index.
            if not isinstance(file, str) or PurePath(file).name != file or file in ("", ".", ".."):
                raise MambaintError(f"{index} names the file {file!r}", "name files beside the index")
        return {name: index.parent / file for name, file in weight_map.items()}

    def _open(self, file: Path) -> Any:
        if file not in self._handles:
            if not file.is_file():
                raise MambaintError(
                    f"there is no {file}",
                    f"give a folder with {WEIGHTS_FILE}, or with {INDEX_FILE} and shards",
                )
            try:
                self._handles[file] = safe_open(file, self._framework)
            except (SafetensorError, OSError) as error:
                raise MambaintError(
                    f"{file} is not a whole safetensors file ({error})", "download or save it again"
                ) from error
        return self._handles[file]

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Any:
        return iter(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it."""
        return tuple(self._open(self._places[name]).get_slice(name).get_shape())

    def __getitem__(self, name: str) -> Any:
        if name not in self._places:
            raise KeyError(name)
        try:
            return self._open(self._places[name]).get_tensor(name)
        except (SafetensorError, TypeError) as error:
            raise MambaintError(
                f"{name} in {self._places[name]} cannot be read ({error})", "save the model in float32"
            ) from error


def read_config(folder: Path) -> tuple[str, MambaConfig]:
    """The architecture and the configuration of a folder.

    Raises:
        MambaintError: if there is none, or it is not one of ours.
    """
    path = folder / CONFIG_FILE
    document = read_json(path, "give a folder that save_pretrained wrote")
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise MambaintError(
            f"{path} is not the configuration of a {FORMAT} model",
            "import checkpoints of other programs first",
        )
    if document.get("version") != VERSION:
        raise MambaintError(
            f"{path} has version {document.get('version')!r}, known is {VERSION}", "update mambaint"
        )
    unknown = sorted(set(document) - {"format", "version", "architecture", "model"})
    if unknown:
        raise MambaintError(f"{path} has unknown keys {listed(unknown)}", "remove them")
    architecture, values = document.get("architecture"), document.get("model")
    if not isinstance(architecture, str) or not isinstance(values, dict):
        raise MambaintError(f"{path} has no architecture or no model", "save the model again")
    return architecture, MambaConfig.from_dict(values, str(path))
