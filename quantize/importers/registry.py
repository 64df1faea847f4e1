"""Which importer reads a checkpoint: chosen by its settings and keys, or by name."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mamba_int.errors import MambaintError
from mamba_int.float_models.checkpoint import listed
from mamba_int.float_models.config import MambaConfig
from quantize.importers.capibara import Capibara
from quantize.importers.huggingface_falcon_mamba import HuggingFaceFalconMamba
from quantize.importers.huggingface_mamba import HuggingFaceMamba
from quantize.importers.huggingface_mamba2 import HuggingFaceMamba2
from quantize.importers.importer import Importer
from quantize.importers.mamba_integer import MambaInteger
from quantize.importers.mambaint import Mambaint
from quantize.importers.minimamba import MiniMamba
from quantize.importers.plan import FloatModel
from quantize.importers.quaternion import Quaternion
from quantize.importers.source import SourceCheckpoint
from quantize.importers.state_spaces_mamba import StateSpacesMamba
from quantize.importers.state_spaces_mamba2 import StateSpacesMamba2

IMPORTERS: dict[str, Importer] = {
    importer.name: importer
    for importer in (
        Mambaint(),
        HuggingFaceMamba(),
        HuggingFaceFalconMamba(),
        HuggingFaceMamba2(),
        StateSpacesMamba(),
        StateSpacesMamba2(),
        MiniMamba(),
        Capibara(),
        MambaInteger(),
        Quaternion(),
    )
}
"""Importers by the name that ``--format`` takes."""


@dataclass(frozen=True)
class FloatModelDescription:
    """What was imported.

    Attributes:
        format: key of ``IMPORTERS``. title: the same in words. source: the path.
        architecture: class of the model, or ``Mixer`` for a mixer alone.
        config: of the model.
        parameters: how many numbers it has, tied ones once.
        dtypes: how many tensors of each dtype the source had; the model is float32.
        notes: what differs from the source, or had to be assumed.
    """

    format: str
    title: str
    source: str
    architecture: str
    config: MambaConfig
    parameters: int
    dtypes: dict[str, int]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON-able values."""
        return vars(self) | {"config": self.config.to_dict(), "notes": list(self.notes)}


def load_float_model(path: Path, format: str | None = None) -> tuple[FloatModel, FloatModelDescription]:
    """Read a float Mamba that any of the known programs saved.

    Args:
        path: a folder (``config.json`` and weights), or a file of weights.
        format: key of ``IMPORTERS``; recognised by the settings and keys if not given.

    Returns:
        The model, float32, on the CPU, in eval mode, and what is known of it.

    Raises:
        MambaintError: for an unknown format, tensors missing, unknown or of another shape (listed), NaN,
            infinite or non-float weights (named), pickles, and damaged or lying files.
    """
    source = SourceCheckpoint(path)
    importer = _recognised(source) if format is None else _named(format)
    plan = importer.plan(source)
    model = plan.build(source)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return model, FloatModelDescription(
        importer.name,
        importer.title,
        str(path),
        plan.architecture,
        plan.config,
        parameters,
        source.dtypes,
        plan.notes,
    )


def _named(format: str) -> Importer:
    if format not in IMPORTERS:
        near = difflib.get_close_matches(format, IMPORTERS, n=1)
        remedy = f"did you mean '{near[0]}'?" if near else f"choose one of {', '.join(IMPORTERS)}"
        raise MambaintError(f"there is no format '{format}'", remedy)
    return IMPORTERS[format]


def _recognised(source: SourceCheckpoint) -> Importer:
    found = [importer for importer in IMPORTERS.values() if importer.recognises(source)]
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(importer.name for importer in found)
        raise MambaintError(f"{source.path} could be {names}", "choose one of them with --format")
    kind = source.settings.values.get("model_type")
    settings = "" if source.settings.present else f"; there is no {source.settings.source}"
    raise MambaintError(
        f"{source.path} is of no known architecture"
        + (f" (model_type {kind!r})" if kind is not None else "")
        + f": its keys are {listed(source.keys)}{settings}",
        f"choose one of {', '.join(IMPORTERS)} with --format",
    )
