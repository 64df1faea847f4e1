"""Steps replayed as CUDA graphs train the same bits as steps launched kernel by kernel."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mamba_int.config import MambaIntConfig
from mamba_int.datasets.text_file import load_text
from mamba_int.model import MambaInt
from mamba_int.training import TrainingConfig, train
from mamba_int.training.captured import CapturedBackward
from mamba_int.training.data_parallel import Ranks
from mamba_int.training.run import TrainingRun
from tests.mamba_int.stand_in import RECIPE, SOURCE, StandIn, make_config, make_data, tensors_of

TEXT = MambaIntConfig(
    task="language_model", seq_len=32, d_model=32, n_layer=2, headdim=16, d_state=16, chunk_size=8
)


def test_scales_are_looked_at_only_in_the_steps_that_say_so(tmp_path: Path) -> None:
    data = make_data()
    config = dataclasses.replace(RECIPE, steps=8, observe_every=3, freeze_at=0.9)
    model = StandIn(make_config(data), 0)
    cpu = torch.device("cpu")
    run = TrainingRun(model, make_config(data), config, data, SOURCE, tmp_path, cpu, Ranks())
    run.start(restart=False)
    seen = []
    for step in range(7):
        before = model.running.clone()
        run.update(step, False)
        seen.append(not torch.equal(model.running, before))
    assert seen == [True, False, False, True, False, False, True]


def trained(folder: Path, micro_batches: int) -> dict[str, Tensor]:
    folder.mkdir()
    noise = torch.randint(97, 123, (4000,), generator=torch.Generator().manual_seed(5))
    (folder / "noise.txt").write_bytes(bytes(noise.tolist()))
    config = TrainingConfig(
        steps=12,
        batch_size=6,
        sequence_length=32,
        micro_batches=micro_batches,
        observe_every=3,
        freeze_at=0.6,
        evaluation_length=64,
    )
    data = load_text(folder / "noise.txt")
    return tensors_of(train(TEXT, config, data, SOURCE, folder, device="cuda").last_checkpoint)


@pytest.mark.gpu
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_replayed_steps_train_the_same_bits(
    micro_batches: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replayed = trained(tmp_path / "replayed", micro_batches)

    def eager(self: CapturedBackward, inputs: Tensor, targets: Tensor, share: float, version: object) -> Any:
        return self._backward(inputs, targets, share)

    monkeypatch.setattr(CapturedBackward, "__call__", eager)
    launched = trained(tmp_path / "launched", micro_batches)
    assert replayed.keys() == launched.keys()
    assert all(torch.equal(replayed[name], launched[name]) for name in replayed)


@pytest.mark.gpu
def test_a_changed_scale_is_captured_anew() -> None:
    """A replay with the shifts of the former scales would compute another model."""
    model = MambaInt(TEXT, 0).cuda()
    inputs = torch.randint(0, 256, (2, 32)).cuda()
    model.observe(inputs)
    model.freeze_scales()

    def backward(inputs: Tensor, targets: Tensor, share: float) -> tuple[Tensor, Tensor]:
        loss = share * model(inputs).square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach(), targets.sum()

    captured = CapturedBackward(backward, list(model.parameters()))
    for change in (0, 1):
        model.fracs[0] -= change
        version = tuple(model.scales().values())
        loss, _ = captured(inputs, inputs, 1.0, version)
        assert float(loss) == float(backward(inputs, inputs, 1.0)[0])
