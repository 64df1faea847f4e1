"""Steps of training: cut into micro-batches, by groups of parameters, and past faults."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mamba_int.config import MambaIntConfig
from mamba_int.datasets import DataSource
from mamba_int.datasets.text_file import split_text
from mamba_int.errors import MambaintError
from mamba_int.model import MambaInt
from mamba_int.training import Ranks, TrainingConfig, load_checkpoint
from mamba_int.training.metrics import read_metrics
from mamba_int.training.optimizer import make_optimizer
from mamba_int.training.run import LAST_FILE, METRICS_FILE, STATE_FILE, TrainingRun
from tests.mamba_int.stand_in import (
    RECIPE,
    TEXT_RECIPE,
    StandIn,
    assert_same_tensors,
    fit,
    interrupt_at,
    make_config,
    make_data,
    tensors_of,
)


class Still(StandIn):
    """Without dropout, whose mask depends on how a batch is cut."""

    dropout = 0.0


def weights_after(folder: Path, config: TrainingConfig, **options: Any) -> dict[str, Tensor]:
    fit(folder, config, **options)
    return tensors_of(folder / STATE_FILE)


# -- micro-batches --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["classes", "text"])
@pytest.mark.parametrize("parts", [2, 3, 16])
def test_micro_batches_train_as_the_whole_batch_does(tmp_path: Path, kind: str, parts: int) -> None:
    config, data = (
        (RECIPE, None) if kind == "classes" else (TEXT_RECIPE, split_text(bytes(range(256)) * 8, "t"))
    )
    whole = weights_after(tmp_path / "whole", config, data=data, build_model=Still)
    cut = dataclasses.replace(config, micro_batches=parts)
    cut_weights = weights_after(tmp_path / "cut", cut, data=data, build_model=Still)
    # Adam divides by the gradient's size: the rounding of a gradient near zero shows at that of a step.
    for name in ("model.weight", "model.bias", "model.running"):
        torch.testing.assert_close(cut_weights[name], whole[name], rtol=2e-4, atol=2e-4)
    rows = [read_metrics(tmp_path / name / METRICS_FILE) for name in ("whole", "cut")]
    for one, other in zip(*rows, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-4)


def run_of(folder: Path, config: TrainingConfig, **forms: Any) -> TrainingRun:
    torch.set_num_threads(1)
    data = make_data()
    model_config = make_config(data, d_model=8, headdim=4, d_state=4, **forms)
    model = MambaInt(model_config, 0)
    run = TrainingRun(model, model_config, config, data, DataSource(), folder, torch.device("cpu"), Ranks())
    run.start(restart=True)
    model.train()
    return run


@settings(deadline=None, max_examples=8)
@given(parts=st.integers(2, 15), form=st.sampled_from(["ternary", "int8"]))
def test_gradients_and_scale_statistics_of_micro_batches_are_those_of_the_batch(
    tmp_path_factory: pytest.TempPathFactory, parts: int, form: str
) -> None:
    """Estimates taken once per micro-batch would have a memory that many times shorter."""
    folder = tmp_path_factory.mktemp("run")
    runs = [
        run_of(folder / str(count), dataclasses.replace(RECIPE, micro_batches=count), weights=form)
        for count in (1, parts)
    ]
    before = [buffer.clone() for buffer in runs[0].model.buffers()]
    losses = [run.update(0, False).loss for run in runs]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    for one, other in zip(runs[0].parameters, runs[1].parameters, strict=True):
        assert one.grad is not None and other.grad is not None
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-4, atol=1e-6)
    models: list[Any] = [run.model for run in runs]
    assert not torch.equal(models[0].statistics, before[0])
    torch.testing.assert_close(models[1].statistics, models[0].statistics, rtol=1e-5, atol=0)
    assert torch.equal(models[0].fracs, models[1].fracs)


def test_frozen_estimates_do_not_move_with_micro_batches(tmp_path: Path) -> None:
    run = run_of(tmp_path, dataclasses.replace(RECIPE, micro_batches=3))
    model: Any = run.model
    model.freeze_scales()
    before = model.statistics.clone()
    run.update(0, False)
    assert torch.equal(model.statistics, before)


def test_more_parts_than_sequences_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MambaintError, match=r"batch of 16 sequences cannot be cut into 17 parts"):
        fit(tmp_path, dataclasses.replace(RECIPE, micro_batches=17))


@pytest.mark.parametrize("step", [1, 17, 20])
def test_interrupted_training_with_micro_batches_ends_with_the_same_bits(tmp_path: Path, step: int) -> None:
    config = dataclasses.replace(
        RECIPE, micro_batches=3, schedule="one_cycle", final_rate=0.1, decay_rate_factor=0.5, weight_decay=0.1
    )
    fit(tmp_path / "whole", config)
    with pytest.raises(MambaintError, match="interrupted"):
        fit(tmp_path / "parts", config, progress=interrupt_at(step))
    fit(tmp_path / "parts", config)
    assert_same_tensors(tmp_path / "whole" / STATE_FILE, tmp_path / "parts" / STATE_FILE)


# -- groups of parameters -------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["classification", "language_model"])
def test_every_parameter_has_one_role(task: Any) -> None:
    model = MambaInt(MambaIntConfig(task=task, n_layer=2, chunk_size=16))
    roles = model.parameter_roles()
    named = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {role: {named.pop(id(p)).rsplit("/", 1)[1] for p in group} for role, group in roles.items()}
    assert not named
    assert found == {
        "matrices": {"weight"},
        "embeddings": {"table"} if task == "language_model" else set(),
        "decays": {"decay_bias"},
        "small": {"taps", "bias", "tau", "D"},
    }


def test_decays_have_their_rate_and_only_matrices_decay_if_asked() -> None:
    model = MambaInt(MambaIntConfig(task="language_model", chunk_size=16))
    config = TrainingConfig(decay_rate_factor=0.25, weight_decay=0.3, weight_decay_on="matrices")
    groups = make_optimizer(model, config).param_groups
    assert [(g["lr"], g["peak"], g["weight_decay"]) for g in groups] == [
        (2e-2, 2e-2, 0.3),
        (2e-2, 2e-2, 0.0),
        (5e-3, 5e-3, 0.0),
        (2e-2, 2e-2, 0.0),
    ]
    assert [
        g["weight_decay"] for g in make_optimizer(model, TrainingConfig(weight_decay=0.3)).param_groups
    ] == [0.3] * 4


def test_the_rate_of_the_decays_follows_the_schedule(tmp_path: Path) -> None:
    config = dataclasses.replace(RECIPE, decay_rate_factor=0.5)
    moved = weights_after(tmp_path / "half", config)["model.bias"]
    same = weights_after(tmp_path / "one", RECIPE)["model.bias"]
    run = run_of(tmp_path / "run", config)
    run.update(20, False)
    rates = {group["lr"] for group in run.optimizer.param_groups}
    assert rates == {2e-2 * run.rate_factor(20), 1e-2 * run.rate_factor(20)}
    assert not torch.equal(moved, same)


# -- weights that are no longer finite ------------------------------------------------------------------


class Explodes(Still):
    """The update after some training batches makes a weight infinite, as an overflow would."""

    at = frozenset({21})

    def forward(self, inputs: Tensor) -> Tensor:
        logits = super().forward(inputs)
        if self.training:
            self.calls += 1
            if self.calls in self.at:
                # Spoils the weight while the loss and the gradients of this batch are fine.
                self.weight.register_post_accumulate_grad_hook(self._spoil)
        return logits

    def _spoil(self, weight: Tensor) -> None:
        if self.calls in self.at:
            with torch.no_grad():
                weight.view(-1)[0] = math.inf


class AlwaysExplodes(Explodes):
    at = frozenset(range(21, 1000))


def test_weights_that_are_no_longer_finite_are_replaced_by_the_last_good_ones(tmp_path: Path) -> None:
    config = dataclasses.replace(RECIPE, average_from=0.5, validate_every=5)
    result = fit(tmp_path, config, build_model=Explodes)
    assert load_checkpoint(result.last_checkpoint).results["step"] == config.steps
    row = read_metrics(tmp_path / METRICS_FILE)[-1]
    assert row["restored"] == 1
    for name, tensor in tensors_of(tmp_path / STATE_FILE).items():
        assert tensor.isfinite().all(), name
    assert tensors_of(tmp_path / LAST_FILE)["model.weight"].isfinite().all()


def test_what_is_restored_is_the_state_of_the_last_multiple_of_checkpoint_every(tmp_path: Path) -> None:
    run = run_of(tmp_path, dataclasses.replace(RECIPE, checkpoint_every=4))
    for step in range(6):
        run.update(step, False)
        run.progress.step = step + 1
        if run.progress.step == 4:
            run.save()
            kept = {name: value.clone() for name, value in run.model.state_dict().items()}
            moments = [v["exp_avg"].clone() for v in run.optimizer.state.values()]
    with torch.no_grad():
        run.parameters[0].fill_(math.nan)
    outcome = run.update(6, False)
    assert not math.isfinite(outcome.loss)
    assert (run.progress.skipped_batches, run.progress.restored) == (1, 1)
    for name, value in run.model.state_dict().items():
        assert torch.equal(value, kept[name]), name
    for values, moment in zip(run.optimizer.state.values(), moments, strict=True):
        assert torch.equal(values["exp_avg"], moment)
    assert math.isfinite(run.update(7, False).loss)
    # The step after it must not have written into what is kept.
    for index, moment in enumerate(moments):
        assert torch.equal(run.good.tensors[f"optimizer.{index}.exp_avg"], moment)
    assert all(torch.equal(run.good.model_state()[name], kept[name]) for name in kept)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("frozen", [False, True])
def test_the_real_model_with_any_weight_not_finite_is_restored(
    tmp_path: Path, value: float, frozen: bool
) -> None:
    """A scale that is no number once ended the forward pass before there was a loss to look at."""
    run = run_of(tmp_path, dataclasses.replace(RECIPE, non_finite_limit=100))
    model: Any = run.model
    if frozen:
        model.freeze_scales()
        run.save()
    good = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            parameter.view(-1)[-1] = value
        run.update(30, False)
        run.restore_if_not_finite()
        assert run.progress.restored >= 1, name
        assert all(tensor.isfinite().all() for tensor in model.state_dict().values()), name
        assert torch.equal(model.state_dict()["frozen"], good["frozen"])
        run.progress.restored = 0
    assert math.isfinite(run.update(31, False).loss)


def test_lasting_explosions_stop_with_one_line_and_a_finite_state(tmp_path: Path) -> None:
    with pytest.raises(MambaintError, match=r"3 (times|batches).*lower learning_rate"):
        fit(tmp_path, build_model=AlwaysExplodes)
    assert all(tensor.isfinite().all() for tensor in tensors_of(tmp_path / STATE_FILE).values())


class ExplodesByCount(Still):
    """Explodes at a step that a resumed run recognises too: by a buffer that counts the steps."""

    def __init__(self, config: MambaIntConfig, seed: int) -> None:
        super().__init__(config, seed)
        self.register_buffer("steps", torch.tensor(0))

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training:
            steps: Any = self.steps
            steps += 1
            if int(steps) == 24:
                with torch.no_grad():
                    self.weight[0, 0] = math.nan
        return super().forward(inputs)


@pytest.mark.parametrize("step", [20, 22, 23])
def test_resumed_training_goes_back_to_the_same_state(tmp_path: Path, step: int) -> None:
    """The state to go back to is older than the one the run resumes from."""
    # Going back rewinds the counter too, so the same step comes again.
    recipe = dataclasses.replace(RECIPE, non_finite_limit=10)
    options: dict[str, Any] = {"config": recipe, "build_model": ExplodesByCount}
    fit(tmp_path / "whole", **options)
    with pytest.raises(MambaintError, match=f"interrupted after step {step}"):
        fit(tmp_path / "parts", progress=interrupt_at(step), **options)
    assert any(name.startswith("good.") for name in tensors_of(tmp_path / "parts" / STATE_FILE))
    fit(tmp_path / "parts", **options)
    assert_same_tensors(tmp_path / "whole" / STATE_FILE, tmp_path / "parts" / STATE_FILE)
    assert not any(name.startswith("good.") for name in tensors_of(tmp_path / "parts" / STATE_FILE))
    assert int(tensors_of(tmp_path / "whole" / STATE_FILE)["model.steps"]) < RECIPE.steps


# -- TensorBoard ----------------------------------------------------------------------------------------


def test_missing_tensorboard_is_one_line_with_its_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(MambaintError, match=r"pip install 'mambaint\[tensorboard\]'"):
        fit(tmp_path, tensorboard=True)


def test_tensorboard_gets_every_row(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    fit(tmp_path, tensorboard=True)
    log = EventAccumulator(str(tmp_path / "tensorboard"))
    log.Reload()
    rows = read_metrics(tmp_path / METRICS_FILE)
    assert [event.step for event in log.Scalars("loss")] == [row["step"] for row in rows]
    assert [event.value for event in log.Scalars("loss")] == pytest.approx([row["loss"] for row in rows])
