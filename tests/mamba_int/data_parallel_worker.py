"""What every process of ``test_data_parallel`` does; started by ``torchrun``, once for all of its tests."""

from __future__ import annotations

import dataclasses
import json
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from mamba_int.datasets.text_file import split_text
from mamba_int.errors import MambaintError
from mamba_int.training import Progress, Ranks, TrainingConfig, joined
from mamba_int.training.run import STATE_FILE
from tests.mamba_int.stand_in import RECIPE, TEXT_RECIPE, StandIn, fit, tensors_of


class Still(StandIn):
    dropout = 0.0


class BreaksInOneProcess(Still):
    """NaN in one process's share of one batch, spoiling its estimate too."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        logits = super().forward(inputs)
        if self.training:
            self.calls += 1
            if self.calls == 5 and torch.distributed.get_rank() == 1:
                self.running.fill_(torch.nan)
                return logits * torch.nan
        return logits


class Kept:
    """Keeps the model that a run builds."""

    def __init__(self, kind: type[StandIn]) -> None:
        self.kind = kind

    def __call__(self, *arguments: Any) -> StandIn:
        self.model = self.kind(*arguments)
        return self.model


def weights(model: StandIn) -> dict[str, list[float]]:
    """Every tensor as numbers: JSON keeps all bits of a float32."""
    return {name: tensor.double().flatten().tolist() for name, tensor in model.state_dict().items()}


def run(
    folder: Path, ranks: Ranks, config: TrainingConfig, kind: type[StandIn] = Still, **options: Any
) -> Any:
    kept = Kept(kind)
    try:
        result = fit(folder, config, build_model=kept, ranks=ranks, **options)
    except MambaintError as error:
        return {"error": str(error)}
    return {
        "weights": weights(kept.model),
        "test": result.test_metric,
        "validation": result.validation_metric,
    }


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    text = split_text(bytes(range(256)) * 8, "t")
    with joined("cpu") as (ranks, device):
        assert device.type == "cpu" and ranks.count == 2

        def interrupt(now: Progress) -> None:
            # The first process alone is asked to stop; the others must learn of it.
            if now.step == 20 and ranks.first:
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)

        uneven = dataclasses.replace(RECIPE, batch_size=15, micro_batches=2)
        found = {
            "classes": run(folder / "classes", ranks, RECIPE),
            "uneven": run(folder / "uneven", ranks, uneven),
            "text": run(folder / "text", ranks, TEXT_RECIPE, data=text),
            "broken": run(folder / "broken", ranks, RECIPE, BreaksInOneProcess),
            "interrupted": run(folder / "resumed", ranks, RECIPE, progress=interrupt),
            "resumed": run(folder / "resumed", ranks, RECIPE),
            "another": run(folder / "resumed", ranks, dataclasses.replace(RECIPE, seed=5)),
            "unwritable": run(folder / "file" / "run", ranks, RECIPE),
        }
        try:
            with ranks.agreed():
                if not ranks.first:
                    raise MambaintError("only the second process fails", "try again")
            found["agreed"] = None
        except MambaintError as error:
            found["agreed"] = str(error)
        try:
            ranks.require_equal([torch.tensor([1.0 + ranks.rank * 2**-20])])
            found["drift"] = None
        except MambaintError as error:
            found["drift"] = str(error)
        found["state"] = {
            name: tensors_of(folder / which / STATE_FILE)["model.weight"].double().flatten().tolist()
            for name, which in (("whole", "classes"), ("resumed", "resumed"))
        }
        (folder / f"rank{ranks.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
