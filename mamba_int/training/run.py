"""One training run in one folder: model, optimizer and data, its steps, its state and its checkpoints."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from mamba_int.datasets import ClassificationData, DataSource, TextData, save_tokenizer
from mamba_int.errors import MambaintError
from mamba_int.files import remove
from mamba_int.training.batches import make_batches
from mamba_int.training.captured import CapturedBackward
from mamba_int.training.checkpoint import DataDescription, load_checkpoint, save_checkpoint
from mamba_int.training.config import TrainingConfig
from mamba_int.training.data_parallel import Ranks
from mamba_int.training.evaluation import Score, evaluate
from mamba_int.training.metrics import truncate_metrics
from mamba_int.training.model_config import ModelConfig, arithmetic_of
from mamba_int.training.optimizer import make_optimizer
from mamba_int.training.protocol import TrainableModel
from mamba_int.training.schedule import learning_rate_factor
from mamba_int.training.state import RunProgress, Snapshot, load_state, save_state

VALIDATIONS = 20

CHECKPOINT_FILE = "checkpoint.safetensors"
LAST_FILE = "last.safetensors"
STATE_FILE = "state.safetensors"
METRICS_FILE = "metrics.jsonl"
PLOT_FILE = "metrics.png"


@dataclass(frozen=True)
class StepOutcome:
    """What a step did, the same in all processes.

    Attributes:
        loss: mean cross entropy over the batch in nats; perhaps not finite.
        correct: right answers (classification), int64 on the device.
        stopping: whether a process had been asked to stop before the step.
    """

    loss: float
    correct: Tensor
    stopping: bool


class TrainingRun:
    """Everything that lives while a model trains.

    Attributes:
        steps: length of the run.
        freeze_step, average_step: first step with frozen scales, and with averaged weights.
        validate_every: steps between validations.
        progress: what has been done; part of the saved state.
        good: the state to go back to; see :meth:`save`.
        validation: newest score on the validation split.
        metric_name: ``accuracy`` or ``bits_per_byte``.
    """

    good: Snapshot

    def __init__(
        self,
        model: TrainableModel,
        model_config: ModelConfig,
        config: TrainingConfig,
        data: ClassificationData | TextData,
        source: DataSource,
        folder: Path,
        device: torch.device,
        ranks: Ranks,
    ) -> None:
        self.ranks = ranks
        self.model = model
        model.gradient_checkpointing = config.gradient_checkpointing
        self.model_config = model_config
        self.config = config
        self.data = data
        self.description = DataDescription.of(data, source)
        self.folder = folder
        self.device = device
        self.batches = make_batches(data, config, device)
        self.steps = config.steps or config.epochs * self.batches.steps_per_epoch
        # At least one step is trained with frozen scales: those are the ones the result has.
        self.freeze_step = min(int(config.freeze_at * self.steps), self.steps - 1)
        self.average_step = int(config.average_from * self.steps) if config.average_from else self.steps
        self.validate_every = config.validate_every or max(1, self.steps // VALIDATIONS)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(model, config)
        parts = config.micro_batches * ranks.count
        if self.batches.sequences_per_batch < parts:
            raise MambaintError(
                f"a batch of {self.batches.sequences_per_batch} sequences cannot be cut into {parts} parts, "
                f"{config.micro_batches} micro_batches in each of {ranks.count} processes",
                "raise batch_size, or lower micro_batches",
            )
        self._captured = CapturedBackward(self._add_gradients, self.parameters)
        self.average: list[Tensor] = []
        self.progress = RunProgress()
        self.validation: Score | None = None
        self.metric_name = "bits_per_byte" if isinstance(data, TextData) else "accuracy"
        # The number of threads is no part of what a run is: it may resume on a machine with others.
        # Nor is that of the processes; each gives its own rounding of the same sums.
        recipe = {key: value for key, value in config.to_dict().items() if key != "threads"}
        self.identity = {
            "model": model_config.to_dict(),
            "training": recipe,
            "data": {"fingerprint": self.description.fingerprint, "device": device.type},
        }

    def start(self, restart: bool) -> bool:
        """Resume the folder's state if there is one; return whether there was."""
        state_path = self.folder / STATE_FILE
        with self.ranks.agreed():
            if restart and self.ranks.first:
                for name in (STATE_FILE, METRICS_FILE, CHECKPOINT_FILE, LAST_FILE, PLOT_FILE):
                    remove(self.folder / name)
        with self.ranks.agreed():
            # Unlike Path.exists this does not raise where the folder may not be searched; saving will say so.
            resumed = os.path.exists(state_path)
            if resumed:
                self._resume(state_path)
        if not resumed:
            self.model.train()
            with torch.no_grad():
                self.model.observe(self.batches.calibration())
        self.ranks.share(_tensors(self.model))
        with self.ranks.agreed():
            if not resumed:
                self.save()
            if self.ranks.first:
                save_tokenizer(self.description.tokenizer, self.folder)
                truncate_metrics(self.folder / METRICS_FILE, self.progress.step)
        return resumed

    def _resume(self, path: Path) -> None:
        saved = load_state(path, self.identity)
        try:
            self.model.load_state_dict(saved.present.model_state())
            saved.present.restore(self.optimizer)
        except (RuntimeError, KeyError, ValueError, IndexError) as error:
            raise MambaintError(f"{path} does not fit the model", "start over with --restart") from error
        saved.restore_random()
        self.average = saved.present.average(self.device)
        self.good = saved.good
        self.progress = saved.progress
        if self.progress.step > self.freeze_step and not self.model.scales_frozen:
            self.model.freeze_scales()
        if not os.path.exists(self.folder / CHECKPOINT_FILE):
            self.progress.best = ()

    def snapshot(self) -> Snapshot:
        """A copy of the present state."""
        return Snapshot.take(self.model.state_dict(), self.optimizer, self.average, self.progress.averaged)

    def save(self) -> None:
        """Save the state for resuming.

        At the end and at every multiple of ``checkpoint_every``, where every run gets to, the state is
        also the one to go back to.
        """
        self.ranks.require_equal(_tensors(self.model))
        present = self.snapshot()
        if self.progress.step % self.config.checkpoint_every == 0 or self.progress.step == self.steps:
            self.good = present
        if self.ranks.first:
            save_state(self.folder / STATE_FILE, self.identity, self.progress, present, self.good)

    def rate_factor(self, step: int) -> float:
        """Share of the peak learning rate at a step."""
        c = self.config
        return learning_rate_factor(step, self.steps, c.warmup_steps, c.schedule, c.final_rate)

    def update(self, step: int, stop_requested: bool) -> StepOutcome:
        """Train on the batch of a step.

        A batch with a non-finite loss or gradient is left out, and what the forward pass did to the
        buffers is undone, so one bad batch cannot spoil a run.

        Raises:
            MambaintError: when that has happened ``non_finite_limit`` times.
        """
        factor = self.rate_factor(step)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        buffers = [buffer.clone() for buffer in self.model.buffers()]
        self.model.observing = step % self.config.observe_every == 0
        self.optimizer.zero_grad(set_to_none=self.device.type != "cuda")
        loss, correct, stopping = self._backward(step, buffers, stop_requested)
        self.ranks.sum_gradients(self.parameters)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.gradient_clip)
        # One transfer for all: on a GPU every transfer waits for the device.
        loss_value, norm_value, stop_value = torch.stack([loss, norm, stopping]).tolist()
        if math.isfinite(loss_value) and math.isfinite(norm_value):
            self.optimizer.step()
        else:
            with torch.no_grad():
                for buffer, before in zip(self.model.buffers(), buffers, strict=True):
                    buffer.copy_(before)
            self.progress.skipped_batches += 1
            if self.progress.skipped_batches >= self.config.non_finite_limit:
                raise MambaintError(
                    f"{self.config.non_finite_limit} batches had a loss or gradient that is not finite, the "
                    f"last of them at step {step + 1}",
                    "lower learning_rate, or lengthen warmup_steps, and --restart",
                )
            self.restore_if_not_finite()
        return StepOutcome(loss_value, correct, stop_value > 0)

    def _backward(
        self, step: int, buffers: list[Tensor], stop_requested: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of this process's share of a batch, and of the whole batch: loss, right answers, stop.

        Every part starts from the same estimates of the scales, ``buffers``; the mean of what the parts make
        of them is what the whole batch would.
        """
        inputs, targets = self.batches.at(step)
        rows = len(inputs)
        parts = self.config.micro_batches * self.ranks.count
        first = self.config.micro_batches * self.ranks.rank
        bounds = [(first + part) * rows // parts for part in range(self.config.micro_batches + 1)]
        loss = torch.zeros((), device=self.device)
        correct = torch.zeros((), dtype=torch.int64, device=self.device)
        estimates = [buffer for buffer in self.model.buffers() if buffer.is_floating_point()]
        observing = self.model.observing and not self.model.scales_frozen
        merged = parts > 1 and observing
        # Sums in float64: shares like 1/3 of equal numbers add up to that number in float32.
        means = [torch.zeros_like(estimate, dtype=torch.float64) for estimate in estimates] if merged else []
        for index, (low, high) in enumerate(pairwise(bounds)):
            if merged and index:
                with torch.no_grad():
                    for buffer, before in zip(self.model.buffers(), buffers, strict=True):
                        buffer.copy_(before)
            share = (high - low) / rows
            part = inputs[low:high], targets[low:high]
            if self.device.type == "cuda" and not observing:
                version = tuple(self.model.scales().values())
                part_loss, part_correct = self._captured(*part, share, version)
            else:
                part_loss, part_correct = self._add_gradients(*part, share)
            loss += part_loss
            correct += part_correct
            if merged:
                for mean, estimate in zip(means, estimates, strict=True):
                    mean.add_(estimate, alpha=share)
        stopping = torch.full((), float(stop_requested), device=self.device)
        if self.ranks.count > 1:
            # All of it in one call: each one waits for the slowest process.
            sums = torch.cat([t.double().flatten() for t in (loss, correct, stopping, *means)])
            self.ranks.sum(sums)
            loss, correct, stopping = sums[0].float(), sums[1].long(), sums[2].float()
            flat = torch.split(sums[3:], [mean.numel() for mean in means])
            means = [new.view_as(old) for new, old in zip(flat, means, strict=True)]
        if merged:
            with torch.no_grad():
                for estimate, mean in zip(estimates, means, strict=True):
                    estimate.copy_(mean)
        return loss, correct, stopping

    def _add_gradients(self, inputs: Tensor, targets: Tensor, share: float) -> tuple[Tensor, Tensor]:
        """Add the gradients of a part of a batch; its share in the loss, and its right answers."""
        half = self.config.autocast == "bfloat16" and self.device.type == "cuda"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=half):
            logits = self.model(inputs)
        loss = share * functional.cross_entropy(
            logits.flatten(0, -2), targets.flatten(), label_smoothing=self.config.label_smoothing
        )
        loss.backward()  # type: ignore[no-untyped-call]
        classes = self.metric_name == "accuracy"
        right = logits.detach().argmax(-1) == targets if classes else logits.new_zeros((), dtype=torch.bool)
        return loss.detach(), right.sum()

    def restore_if_not_finite(self) -> None:
        """Go back to the last state worth it if the weights, estimates or moments are no longer finite.

        The run goes on with the next batch. Losses show non-finite weights one step late, and not before
        they would be validated and saved: those ask here first.

        Raises:
            MambaintError: when that has happened ``non_finite_limit`` times.
        """
        moments = [t for values in self.optimizer.state.values() for t in values.values()]
        tensors = [t for t in (*_tensors(self.model), *moments, *self.average) if t.is_floating_point()]
        if bool(torch.stack([tensor.isfinite().all().to(self.device) for tensor in tensors]).all()):
            return
        self.progress.restored += 1
        if self.progress.restored >= self.config.non_finite_limit:
            raise MambaintError(
                f"the weights became non-finite {self.config.non_finite_limit} times in "
                f"{self.progress.step} steps",
                "lower learning_rate, or lengthen warmup_steps, and --restart",
            )
        self.model.load_state_dict(self.good.model_state())
        self.good.restore(self.optimizer)
        self.average = self.good.average(self.device)
        self.progress.averaged = self.good.averaged

    def accumulate_average(self) -> None:
        """Take the present weights into the uniform average."""
        with torch.no_grad():
            if not self.average:
                self.average = [p.detach().clone() for p in self.parameters]
            else:
                weight = 1.0 / (self.progress.averaged + 1)
                for mean, parameter in zip(self.average, self.parameters, strict=True):
                    mean.lerp_(parameter, weight)
        self.progress.averaged += 1

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Put the average (if there is one) in place of the weights for a while."""
        if not self.average:
            yield
            return
        present = [p.detach().clone() for p in self.parameters]
        with torch.no_grad():
            for parameter, mean in zip(self.parameters, self.average, strict=True):
                parameter.copy_(mean)
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, value in zip(self.parameters, present, strict=True):
                    parameter.copy_(value)

    def score(self, split: str, max_tokens: int | None = None) -> Score:
        """Score a split with the present weights; leaves the model in eval mode."""
        length = self.config.evaluation_length
        return evaluate(self.model, self.data, split, self.device, length, max_tokens, self.ranks)

    def write_checkpoint(self, name: str, results: dict[str, float]) -> None:
        """Write the present weights and their integers; leaves the model in eval mode."""
        self.model.eval()
        if not self.ranks.first:
            return
        integral = arithmetic_of(self.model_config) == "integer"
        save_checkpoint(
            self.folder / name,
            self.model_config,
            self.config,
            self.description,
            results,
            self.model.state_dict(),
            self.model.frozen_integers() if integral else {},
        )

    def validate(self, last: bool) -> None:
        """Score the validation split; keep the weights if they are the best with frozen scales.

        A run that trains on that split scores nothing and keeps its last weights.
        """
        if self.config.train_on_validation:
            if last:
                with self.averaged_weights():
                    for name in (CHECKPOINT_FILE, LAST_FILE):
                        self.write_checkpoint(name, {"step": self.progress.step})
                self.progress.best = (0.0, 0.0, self.progress.step)
            return
        with self.averaged_weights():
            self.validation = self.score("validation", self.config.validation_tokens)
            results = {f"validation_{self.metric_name}": self.validation.metric, "step": self.progress.step}
            if self.model.scales_frozen and self.validation.better_than(self.best_score()):
                self.write_checkpoint(CHECKPOINT_FILE, results)
                self.progress.best = (self.validation.metric, self.validation.loss, self.progress.step)
            if last:
                self.write_checkpoint(LAST_FILE, results)
        self.model.train()

    def best_score(self) -> Score | None:
        """Validation score of the checkpoint kept so far."""
        best = self.progress.best
        return Score(best[0], best[1], self.metric_name == "accuracy") if best else None

    def test(self) -> tuple[float, float | None, int]:
        """Test the kept checkpoint and write the results into it.

        Returns:
            Test metric, validation metric (None if that split was trained on), and the checkpoint's step.
        """
        if not self.progress.best:
            # The checkpoint of a finished run was deleted: its last weights take its place.
            self.validate(last=True)
        path = self.folder / CHECKPOINT_FILE
        # Nobody reads before process 0 has written, and it writes again only when all have read.
        with self.ranks.agreed():
            pass
        with self.ranks.agreed():
            kept = load_checkpoint(path)
        self.model.load_state_dict(kept.model_state)
        metric = self.score("test").metric
        validation = kept.results.get(f"validation_{self.metric_name}")
        step = int(kept.results["step"])
        results = kept.results | {
            f"test_{self.metric_name}": metric,
            "train_seconds": round(self.progress.seconds, 3),
        }
        if self.ranks.first:
            # The integers are copied, not computed anew: they are the model.
            save_checkpoint(
                path,
                self.model_config,
                self.config,
                self.description,
                results,
                kept.model_state,
                kept.integers,
            )
        return metric, validation, step


def _tensors(model: TrainableModel) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]
