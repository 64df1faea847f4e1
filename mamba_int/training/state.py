"""The state of an unfinished run, complete enough that resuming changes no bit of the result."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from mamba_int.errors import MambaintError
from mamba_int.training.container import read_container, require_keys, write_container

FORMAT = "mambaint-training-state"
VERSION = 2
_REMEDY = "start over with --restart, or give another --out folder"
_ENTRIES: dict[str, type] = {
    "format": str,
    "version": int,
    "identity": dict,
    "progress": dict,
    "good_averaged": int,
}
_PROGRESS: dict[str, type] = {
    "step": int,
    "averaged": int,
    "skipped_batches": int,
    "restored": int,
    "seconds": float,
    "best": list,
}


@dataclass
class RunProgress:
    """The scalars of a run.

    Attributes:
        step: steps done.
        averaged: weights in the running average so far.
        skipped_batches: batches left out because their loss or gradient was not finite.
        restored: how often the weights were not finite and those of an earlier step took their place.
        seconds: time spent, over all sittings.
        best: [metric, loss, step] of the best checkpoint, or empty.
    """

    step: int = 0
    averaged: int = 0
    skipped_batches: int = 0
    restored: int = 0
    seconds: float = 0.0
    best: tuple[float, float, int] | tuple[()] = ()


@dataclass(frozen=True, eq=False)
class Snapshot:
    """Model, optimizer and average of one step, on the CPU.

    Attributes:
        averaged: weights in the average.
        tensors: ``model.NAME``, ``optimizer.INDEX.NAME`` and ``average.INDEX``.
    """

    averaged: int
    tensors: dict[str, Tensor]

    @classmethod
    def take(
        cls,
        model_state: dict[str, Tensor],
        optimizer: torch.optim.Optimizer,
        average: list[Tensor],
        averaged: int,
    ) -> Self:
        """Copy the present state; the optimizer's hyperparameters come from the recipe."""
        tensors = {f"model.{name}": tensor for name, tensor in model_state.items()}
        for index, values in optimizer.state_dict()["state"].items():
            for name, tensor in values.items():
                tensors[f"optimizer.{index}.{name}"] = tensor
        for index, tensor in enumerate(average):
            tensors[f"average.{index}"] = tensor
        copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
        return cls(averaged, copies)

    def model_state(self) -> dict[str, Tensor]:
        """For ``model.load_state_dict``."""
        return {name[6:]: tensor for name, tensor in self.tensors.items() if name.startswith("model.")}

    def average(self, device: torch.device) -> list[Tensor]:
        """A copy of the averaged parameters, or an empty list."""
        count = sum(name.startswith("average.") for name in self.tensors)
        return [self.tensors[f"average.{index}"].to(device, copy=True) for index in range(count)]

    def restore(self, optimizer: torch.optim.Optimizer) -> None:
        """Load copies of the optimizer's tensors."""
        values: dict[int, dict[str, Tensor]] = {}
        for name, tensor in self.tensors.items():
            if name.startswith("optimizer."):
                _, index, key = name.split(".", 2)
                values.setdefault(int(index), {})[key] = tensor.clone()
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": values, "param_groups": groups})


def save_state(
    path: Path, identity: dict[str, Any], progress: RunProgress, present: Snapshot, good: Snapshot
) -> None:
    """Write everything atomically as one file: tensors, random generators, scalars.

    Args:
        path: the file.
        identity: what the run is (model, recipe, data); a state is only resumed by an equal one.
        progress: the scalars.
        present: the state at ``progress.step``.
        good: what the run would go back to; written too unless it is ``present``, so that a resumed run goes
            back to the same.

    Raises:
        MambaintError: if ``path`` cannot be written.
    """
    tensors = dict(present.tensors)
    if good is not present:
        tensors |= {f"good.{name}": tensor for name, tensor in good.tensors.items()}
    tensors["random.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    description = {
        "format": FORMAT,
        "version": VERSION,
        "identity": identity,
        "progress": {**vars(progress), "best": list(progress.best)},
        "good_averaged": good.averaged,
    }
    write_container(path, tensors, description)


@dataclass(frozen=True, eq=False)
class SavedState:
    """A state read back.

    Attributes:
        progress: the scalars.
        present: the state at ``progress.step``.
        good: what the run would go back to.
        random: states of the random generators, by device type.
    """

    progress: RunProgress
    present: Snapshot
    good: Snapshot
    random: dict[str, Tensor]

    def restore_random(self) -> None:
        """Put the random generators into force."""
        torch.set_rng_state(self.random["cpu"])
        if torch.cuda.is_available() and "cuda" in self.random:
            torch.cuda.set_rng_state(self.random["cuda"])


def load_state(path: Path, identity: dict[str, Any]) -> SavedState:
    """Read a state that was saved by a run of the same identity.

    Raises:
        MambaintError: if the file is damaged or foreign, or belongs to another model, recipe or data.
    """
    tensors, description = read_container(path, _REMEDY)
    if description.get("format") != FORMAT or description.get("version") != VERSION:
        raise MambaintError(f"{path} is not a training state of this version", _REMEDY)
    require_keys(description, _ENTRIES, str(path), _REMEDY)
    saved = description["identity"]
    if saved != identity:
        changed = sorted(
            f"{table}.{key}"
            for table in identity
            for key in identity[table].keys() | saved.get(table, {}).keys()
            if identity[table].get(key) != saved.get(table, {}).get(key)
        )
        raise MambaintError(
            f"{path.parent} holds another run (different: {', '.join(changed[:4]) or 'layout'})", _REMEDY
        )
    values = description["progress"]
    require_keys(values, _PROGRESS, f"the progress in {path}", _REMEDY)
    if "random.cpu" not in tensors:
        raise MambaintError(f"{path} lacks its random generator", _REMEDY)
    progress = RunProgress(**{**values, "best": tuple(values["best"])})
    random = {name[7:]: tensor for name, tensor in tensors.items() if name.startswith("random.")}
    behind = {name[5:]: tensor for name, tensor in tensors.items() if name.startswith("good.")}
    rest = {name: t for name, t in tensors.items() if not name.startswith(("random.", "good."))}
    present = Snapshot(progress.averaged, rest)
    good = Snapshot(description["good_averaged"], behind) if behind else present
    return SavedState(progress, present, good, random)
