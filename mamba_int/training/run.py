"""One training run in one folder: model, optimizer and data, its steps, its state and its checkpoints."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from mamba_int.config import MambaIntConfig
from mamba_int.datasets import ClassificationData, DataSource, TextData
from mamba_int.errors import MambaintError
from mamba_int.training.batches import make_batches
from mamba_int.training.checkpoint import DataDescription, load_checkpoint, save_checkpoint
from mamba_int.training.config import TrainingConfig, learning_rate_factor
from mamba_int.training.evaluation import Score, evaluate
from mamba_int.training.metrics import truncate_metrics
from mamba_int.training.protocol import TrainableModel
from mamba_int.training.state import RunProgress, load_state, save_state

VALIDATIONS = 20
NON_FINITE_LIMIT = 3

CHECKPOINT_FILE = "checkpoint.safetensors"
LAST_FILE = "last.safetensors"
STATE_FILE = "state.safetensors"
METRICS_FILE = "metrics.jsonl"
PLOT_FILE = "metrics.png"


class TrainingRun:
    """Everything that lives while a model trains.

    Attributes:
        steps: length of the run.
        freeze_step, average_step: first step with frozen scales, and with averaged weights.
        validate_every: steps between validations.
        progress: what has been done; part of the saved state.
        validation: newest score on the validation split.
        metric_name: ``accuracy`` or ``bits_per_byte``.
    """

    def __init__(
        self,
        model: TrainableModel,
        model_config: MambaIntConfig,
        config: TrainingConfig,
        data: ClassificationData | TextData,
        source: DataSource,
        folder: Path,
        device: torch.device,
    ) -> None:
        self.model = model
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
        self.optimizer = torch.optim.AdamW(
            model.parameter_groups(config.learning_rate),
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.base_rates = [group["lr"] for group in self.optimizer.param_groups]
        self.average: list[Tensor] = []
        self.progress = RunProgress()
        self.validation: Score | None = None
        self.metric_name = "bits_per_byte" if isinstance(data, TextData) else "accuracy"
        # The number of threads is no part of what a run is: it may resume on a machine with others.
        recipe = {key: value for key, value in config.to_dict().items() if key != "threads"}
        self.identity = {
            "model": model_config.to_dict(),
            "training": recipe,
            "data": {"fingerprint": self.description.fingerprint, "device": device.type},
        }

    def start(self, restart: bool) -> bool:
        """Resume the folder's state if there is one; return whether there was."""
        state_path = self.folder / STATE_FILE
        if restart:
            for name in (STATE_FILE, METRICS_FILE, CHECKPOINT_FILE, LAST_FILE, PLOT_FILE):
                _remove(self.folder / name)
        # Unlike Path.exists this does not raise where the folder may not be searched; saving will say so.
        resumed = os.path.exists(state_path)
        if resumed:
            saved = load_state(state_path, self.identity)
            try:
                self.model.load_state_dict(saved.model_state())
                saved.restore(self.optimizer)
            except (RuntimeError, KeyError, ValueError, IndexError) as error:
                raise MambaintError(
                    f"{state_path} does not fit the model", "start over with --restart"
                ) from error
            self.average = saved.average(self.device)
            self.progress = saved.progress
            if self.progress.step > self.freeze_step and not self.model.scales_frozen:
                self.model.freeze_scales()
            if not os.path.exists(self.folder / CHECKPOINT_FILE):
                self.progress.best = ()
        else:
            self.model.train()
            with torch.no_grad():
                self.model.observe(self.batches.calibration())
            self.save()
        truncate_metrics(self.folder / METRICS_FILE, self.progress.step)
        return resumed

    def save(self) -> None:
        """Save the state for resuming."""
        save_state(
            self.folder / STATE_FILE,
            self.identity,
            self.progress,
            self.model.state_dict(),
            self.optimizer,
            self.average,
        )

    def rate_factor(self, step: int) -> float:
        """Share of the peak learning rate at a step."""
        return learning_rate_factor(step, self.steps, self.config.warmup_steps, self.config.schedule)

    def update(self, step: int) -> tuple[float, Tensor]:
        """Train on the batch of a step; return its loss and its number of right answers.

        A batch with a non-finite loss or gradient is left out, and what the forward pass did to the
        buffers is undone, so one bad batch cannot spoil a run.

        Raises:
            MambaintError: at the third such batch.
        """
        factor = self.rate_factor(step)
        for group, rate in zip(self.optimizer.param_groups, self.base_rates, strict=True):
            group["lr"] = rate * factor
        inputs, targets = self.batches.at(step)
        buffers = [buffer.clone() for buffer in self.model.buffers()]
        self.optimizer.zero_grad(set_to_none=True)
        logits = self.model(inputs)
        loss = functional.cross_entropy(
            logits.flatten(0, -2), targets.flatten(), label_smoothing=self.config.label_smoothing
        )
        loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.gradient_clip)
        # One transfer for both: on a GPU every transfer waits for the device.
        loss_value, norm_value = torch.stack([loss.detach(), norm]).tolist()
        if math.isfinite(loss_value) and math.isfinite(norm_value):
            self.optimizer.step()
        else:
            with torch.no_grad():
                for buffer, before in zip(self.model.buffers(), buffers, strict=True):
                    buffer.copy_(before)
            self.progress.skipped_batches += 1
            if self.progress.skipped_batches >= NON_FINITE_LIMIT:
                raise MambaintError(
                    f"{NON_FINITE_LIMIT} batches had a loss or gradient that is not finite, the last of them "
                    f"at step {step + 1}",
                    "lower learning_rate, or lengthen warmup_steps, and --restart",
                )
        return loss_value, (logits.detach().argmax(-1) == targets).sum()

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
        return evaluate(self.model, self.data, split, self.device, self.config.evaluation_length, max_tokens)

    def write_checkpoint(self, name: str, results: dict[str, float]) -> None:
        """Write the present weights and their integers; leaves the model in eval mode."""
        self.model.eval()
        integral = self.model_config.arithmetic == "integer"
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
        kept = load_checkpoint(path)
        self.model.load_state_dict(kept.model_state)
        metric = self.score("test").metric
        validation = kept.results.get(f"validation_{self.metric_name}")
        step = int(kept.results["step"])
        results = kept.results | {
            f"test_{self.metric_name}": metric,
            "train_seconds": round(self.progress.seconds, 3),
        }
        # The integers are copied, not computed anew: they are the model.
        save_checkpoint(
            path, self.model_config, self.config, self.description, results, kept.model_state, kept.integers
        )
        return metric, validation, step


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise MambaintError(
            f"cannot remove {path}: {error.strerror or error}", "choose a writable folder"
        ) from error
