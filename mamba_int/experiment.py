"""A training to be done: preset, configuration file and overrides, resolved to three tables."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from mamba_int.config import MambaIntConfig
from mamba_int.datasets import TEXT_KINDS, ClassificationData, DataSource, TextData, source_from_path
from mamba_int.errors import MambaintError
from mamba_int.files import parse_toml, read_bytes
from mamba_int.float_models.config import MambaConfig
from mamba_int.training.config import TrainingConfig
from mamba_int.training.model_config import ModelConfig, model_config_from_dict, names_float_model

TABLES = ("model", "training", "data")
_FROM_DATA = ("task", "n_features", "n_classes", "num_labels", "vocab_size", "input_low", "input_high")
_DEFAULT_PRESETS = {
    # (float model, text): name
    (False, False): "digits",
    (False, True): "char",
    (True, False): "digits-mamba2",
    (True, True): "char-mamba2",
}
_PRESETS = resources.files("mamba_int") / "presets"

Table = dict[str, Any]


@dataclass(frozen=True)
class Experiment:
    """What to train, before the data is loaded.

    Attributes:
        name: name of the preset, or of the data file: the default run folder.
        model: keys of :class:`MambaIntConfig`, or with a ``mixer`` of
            :class:`~mamba_int.float_models.config.MambaConfig`, apart from those that the data decides.
        training: the recipe.
        source: the data.
    """

    name: str
    model: Table
    training: TrainingConfig
    source: DataSource

    @property
    def is_float(self) -> bool:
        """Whether the model is a float model rather than a native one."""
        return names_float_model(self.model)

    def model_config(self, data: ClassificationData | TextData) -> ModelConfig:
        """The model's configuration, with the shape that the data dictates."""
        if not self.is_float:
            return self._native_config(data, "integer")
        if isinstance(data, TextData):
            return MambaConfig.from_dict({**self.model, "vocab_size": data.vocab_size})
        shape = {"n_features": data.n_features, "num_labels": data.n_classes}
        return MambaConfig.from_dict({**self.model, **shape})

    def twin_config(self, data: ClassificationData | TextData) -> MambaIntConfig:
        """The configuration of the float twin of a native model.

        Raises:
            MambaintError: for a float model, which has none.
        """
        self.require_twin()
        return self._native_config(data, "float")

    def require_twin(self) -> None:
        """Refuse to make the float twin of a float model."""
        if self.is_float:
            raise MambaintError(
                f"the model has mixer = '{self.model['mixer']}', a float model without a twin",
                "leave out --twin",
            )

    def _native_config(self, data: ClassificationData | TextData, arithmetic: str) -> MambaIntConfig:
        # input_frac puts the largest input integer between 2 and 4, where the recipe was measured, unless
        # the experiment sets it.
        values: Table = {"arithmetic": arithmetic, **self.model}
        if isinstance(data, TextData):
            values |= {"task": "language_model", "vocab_size": data.vocab_size}
            values.setdefault("seq_len", self.training.sequence_length)
        else:
            largest = max(abs(data.input_low), abs(data.input_high))
            values.setdefault("input_frac", max(0, int(math.log2(largest)) - 1))
            values |= {
                "task": "classification",
                "seq_len": data.seq_len,
                "n_features": data.n_features,
                "n_classes": data.n_classes,
                "input_low": data.input_low,
                "input_high": data.input_high,
            }
        return MambaIntConfig.from_dict(values)


def preset_names() -> list[str]:
    """The presets that ship with the package."""
    return sorted(entry.name[:-5] for entry in _PRESETS.iterdir() if entry.name.endswith(".toml"))


def _parse(content: bytes, source: str) -> dict[str, Table]:
    document = parse_toml(content, source)
    for key, value in document.items():
        if key not in TABLES or not isinstance(value, dict):
            near = difflib.get_close_matches(key, TABLES, n=1)
            raise MambaintError(
                f"{source} has an unknown key '{key}'",
                f"did you mean the table [{near[0]}]?"
                if near
                else "use the tables [model], [training], [data]",
            )
    for key in document.get("model", {}):
        if key in _FROM_DATA:
            raise MambaintError(f"{source}: [model] {key} is read from the data", f"remove {key}")
    return document


def read_preset(name: str) -> dict[str, Table]:
    """The tables of a preset.

    Raises:
        MambaintError: if there is no such preset, naming the nearest.
    """
    names = preset_names()
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        remedy = f"did you mean '{near[0]}'?" if near else f"choose one of {', '.join(names)}"
        raise MambaintError(f"there is no preset '{name}'", remedy)
    return _parse((_PRESETS / f"{name}.toml").read_bytes(), f"the preset {name}")


def _data_table(config_path: Path | None, tables: dict[str, Table], data_path: Path | None) -> Table:
    """What the user says about the data; a path in a configuration file is relative to that file."""
    table = dict(tables.get("data", {}))
    path = table.get("path")
    if data_path is not None:
        described = source_from_path(data_path)
        table |= {"path": described.path}
        table.setdefault("kind", described.kind)
    elif isinstance(path, str) and path and config_path is not None:
        described = source_from_path(config_path.parent / path)
        table |= {"path": described.path}
        table.setdefault("kind", described.kind)
    return table


def resolve(
    preset: str | None = None,
    config_path: Path | None = None,
    data_path: Path | None = None,
    seed: int | None = None,
    steps: int | None = None,
) -> Experiment:
    """Lay a configuration file over a preset, key by key, and single overrides over both.

    Args:
        preset: name of a preset; None for ``char`` if the data is text, else ``digits``; with a ``mixer``
            in the file for ``char-mamba2`` or ``digits-mamba2``.
        config_path: TOML file with any of the tables [model], [training], [data].
        data_path: data file instead of the preset's data.
        seed: seed of the run.
        steps: length of the run, instead of steps or epochs.

    Raises:
        MambaintError: for unknown presets, keys or values, naming the key and the nearest valid one.
    """
    tables: dict[str, Table] = {}
    if config_path is not None:
        content = read_bytes(config_path, "give the path of a TOML file")
        tables = _parse(content, str(config_path))
    data = _data_table(config_path, tables, data_path)
    own_data = bool(data.keys() & {"kind", "path"})
    own_model = tables.get("model", {})
    if preset is None:
        preset = _DEFAULT_PRESETS[names_float_model(own_model), data.get("kind") in TEXT_KINDS]
    base = read_preset(preset)
    if names_float_model(own_model) and not names_float_model(base.get("model", {})):
        raise MambaintError(
            f"{config_path}: [model] mixer is of float models, the preset {preset} of native ones",
            f"use --preset {_DEFAULT_PRESETS[True, DataSource.from_dict(base.get('data', {})).is_text]}",
        )
    model = {**base.get("model", {}), **own_model}
    overrides = dict(tables.get("training", {}))
    if steps is not None:
        overrides.pop("epochs", None)
        overrides["steps"] = steps
    if seed is not None:
        overrides["seed"] = seed
    training = dict(base.get("training", {}))
    if own_data:
        # Shifting by a pixel is right for the preset's images and wrong for most other sequences.
        for key in ("shift_augmentation", "noise_augmentation", "train_on_validation"):
            training.pop(key, None)
    if "epochs" in overrides:
        if "steps" in overrides:
            raise MambaintError(f"{config_path}: [training] has both steps and epochs", "remove one of them")
        # Steps take precedence over epochs, so those of the preset must go.
        training.pop("steps", None)
    source = DataSource.from_dict(data if own_data else {**base.get("data", {}), **data})
    config = TrainingConfig.from_dict({**training, **overrides})
    # Keys are checked here, before any data is loaded; the shape is filled in by the data later.
    model_config_from_dict(model)
    _check_task(preset, source, base)
    return Experiment(Path(source.path).stem if own_data and source.path else preset, model, config, source)


def _check_task(preset: str, source: DataSource, base: dict[str, Table]) -> None:
    wanted, found = (
        "text" if described.is_text else "labelled sequences"
        for described in (DataSource.from_dict(base.get("data", {})), source)
    )
    if wanted != found:
        raise MambaintError(
            f"the preset {preset} trains on {wanted}, the data is {found}",
            f"use --preset {_DEFAULT_PRESETS[names_float_model(base.get('model', {})), source.is_text]}",
        )
