"""The training loop: resumable to the bit, guarded against non-finite losses, stoppable at any step."""

from __future__ import annotations

import dataclasses
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from mamba_int.datasets import ClassificationData, DataSource, TextData
from mamba_int.errors import MambaintError
from mamba_int.training.batches import make_batches
from mamba_int.training.checkpoint import DataDescription, save_checkpoint
from mamba_int.training.config import TrainingConfig, learning_rate_factor
from mamba_int.training.container import read_container
from mamba_int.training.evaluation import Score, evaluate
from mamba_int.training.metrics import append_metrics, plot_metrics, truncate_metrics
from mamba_int.training.protocol import ModelConfig, TrainableModel
from mamba_int.training.state import RunProgress, load_state, save_state

C = TypeVar("C", bound=ModelConfig)

LOG_EVERY = 10
VALIDATIONS = 20
NON_FINITE_LIMIT = 3

CHECKPOINT_FILE = "checkpoint.safetensors"
LAST_FILE = "last.safetensors"
STATE_FILE = "state.safetensors"
METRICS_FILE = "metrics.jsonl"
PLOT_FILE = "metrics.png"


@dataclass(frozen=True)
class Progress:
    """What the ``progress`` callback is told after every step.

    Attributes:
        step, steps: steps done, and in all.
        loss: training loss of the step in nats.
        learning_rate: peak rate times schedule.
        accuracy: training accuracy since the last log row (classification).
        bits_per_byte: the loss in bits (language model).
        tokens_per_second: training speed since the last log row.
        validation: newest validation metric, or None before the first.
    """

    step: int
    steps: int
    loss: float
    learning_rate: float
    accuracy: float | None
    bits_per_byte: float | None
    tokens_per_second: float
    validation: float | None


@dataclass(frozen=True)
class TrainingResult:
    """What a finished training achieved.

    Attributes:
        test_metric, validation_metric: accuracy, or bits per byte, of the kept checkpoint.
        metric_name: ``accuracy`` or ``bits_per_byte``.
        train_seconds: wall time of training, over all sittings.
        checkpoint: the best checkpoint after the scales were frozen.
        last_checkpoint: the checkpoint of the last step.
        best_step: step of ``checkpoint``.
        steps: steps in all.
        seed: seed of the run.
        resumed: whether an earlier sitting was continued.
    """

    test_metric: float
    validation_metric: float
    metric_name: str
    train_seconds: float
    checkpoint: Path
    last_checkpoint: Path
    best_step: int
    steps: int
    seed: int
    resumed: bool


def resolve_device(device: str) -> torch.device:
    """``auto`` is CUDA where there is one, else the CPU; anything else is a PyTorch device name.

    Raises:
        MambaintError: if the device does not exist here.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise MambaintError(f"device '{device}' is not available here", "choose auto, cpu or cuda") from error
    return chosen


@contextmanager
def _stop_requests() -> Iterator[Callable[[], bool]]:
    """Turn the first SIGINT or SIGTERM into a polite request; a second one acts as always."""
    stopped = threading.Event()
    previous: dict[signal.Signals, Any] = {}

    def request(number: int, frame: FrameType | None) -> None:
        stopped.set()
        signal.signal(number, previous[signal.Signals(number)])

    # Only the main thread may set handlers; elsewhere the caller stops a run in its own way.
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, request)
    try:
        yield stopped.is_set
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    if count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Run:
    """One run in one folder: everything that lives while it trains."""

    def __init__(
        self,
        model: TrainableModel,
        model_config: ModelConfig,
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
        # Threads change speed only as far as a resumed run is concerned, so they do not identify it.
        recipe = {key: value for key, value in config.to_dict().items() if key != "threads"}
        self.identity = {
            "model": model_config.to_dict(),
            "training": recipe,
            "data": {"fingerprint": self.description.fingerprint, "device": device.type},
        }

    # -- state -----------------------------------------------------------------------------------

    def start(self, restart: bool) -> bool:
        """Resume the folder's state if there is one; return whether there was."""
        state_path = self.folder / STATE_FILE
        if restart:
            for name in (STATE_FILE, METRICS_FILE, CHECKPOINT_FILE, LAST_FILE, PLOT_FILE):
                _remove(self.folder / name)
        resumed = state_path.exists()
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
            if not (self.folder / CHECKPOINT_FILE).exists():
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

    # -- one step --------------------------------------------------------------------------------

    def update(self, step: int) -> tuple[float, Tensor]:
        """Train on the batch of a step; return its loss and its number of right answers.

        A batch with a non-finite loss or gradient is left out, and what the forward pass did to the
        buffers is undone, so one bad batch cannot spoil a run.

        Raises:
            MambaintError: at the third such batch.
        """
        factor = learning_rate_factor(step, self.steps, self.config.warmup_steps, self.config.schedule)
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
                    f"the loss or its gradient was not finite for the {NON_FINITE_LIMIT}rd time, at step {step + 1}",
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

    # -- validation and checkpoints --------------------------------------------------------------

    def score(self, split: str, max_tokens: int | None = None) -> Score:
        return evaluate(
            self.model, self.data, split, self.device, self.config.evaluation_length, max_tokens
        )

    def write_checkpoint(self, name: str, results: dict[str, float]) -> None:
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
        """Score the validation split; keep the weights if they are the best with frozen scales."""
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
        best = self.progress.best
        return Score(best[0], best[1], self.metric_name == "accuracy") if best else None

    # -- the loop --------------------------------------------------------------------------------

    def loop(self, progress: Callable[[Progress], None] | None) -> None:
        """Train to the end, or to a request to stop.

        Raises:
            MambaintError: when stopped; the state is saved by then.
        """
        classes = self.metric_name == "accuracy"
        right = torch.zeros((), dtype=torch.int64, device=self.device)
        losses: list[float] = []
        accuracy: float | None = None
        since, seconds = time.perf_counter(), 0.0
        speed = 0.0
        self.model.train()
        with _stop_requests() as stop_requested:
            for step in range(self.progress.step, self.steps):
                began = time.perf_counter()
                if step >= self.freeze_step and not self.model.scales_frozen:
                    self.model.freeze_scales()
                loss, correct = self.update(step)
                right += correct
                losses.append(loss)
                self.progress.step = step + 1
                if step >= self.average_step:
                    self.accumulate_average()
                seconds += time.perf_counter() - began
                last = self.progress.step == self.steps
                validated = last or self.progress.step % self.validate_every == 0
                if validated:
                    self.validate(last)
                rate = self.config.learning_rate * learning_rate_factor(
                    step, self.steps, self.config.warmup_steps, self.config.schedule
                )
                if validated or self.progress.step % LOG_EVERY == 0:
                    seen = len(losses) * self.batches.tokens_per_batch
                    speed = seen / max(seconds, 1e-9)
                    if classes:
                        accuracy = int(right) / (seen // self.data_steps)
                    self.log(losses, rate, accuracy, speed, validated)
                    right.zero_()
                    losses, seconds = [], 0.0
                now = time.perf_counter()
                self.progress.seconds += now - since
                since = now
                stopping = stop_requested() and not last
                if last or stopping or self.progress.step % self.config.checkpoint_every == 0:
                    self.save()
                if progress is not None:
                    progress(
                        Progress(
                            self.progress.step,
                            self.steps,
                            loss,
                            rate,
                            accuracy,
                            None if classes else loss / math.log(2),
                            speed,
                            self.validation.metric if self.validation else None,
                        )
                    )
                if stopping:
                    raise MambaintError(
                        f"training was interrupted after step {self.progress.step} of {self.steps}",
                        "run the same command again to resume",
                    )

    @property
    def data_steps(self) -> int:
        """Sequence length of a training sample."""
        return self.config.sequence_length if isinstance(self.data, TextData) else self.data.seq_len

    def log(
        self, losses: list[float], rate: float, accuracy: float | None, speed: float, validated: bool
    ) -> None:
        finite = [value for value in losses if math.isfinite(value)]
        if not finite:
            return
        loss = sum(finite) / len(finite)
        row: dict[str, Any] = {"step": self.progress.step, "loss": loss, "learning_rate": rate}
        if self.metric_name == "accuracy":
            row["train_accuracy"] = accuracy
        else:
            row["bits_per_byte"] = loss / math.log(2)
        row["tokens_per_second"] = round(speed, 1)
        if validated and self.validation is not None:
            row[f"validation_{self.metric_name}"] = self.validation.metric
            row["validation_loss"] = self.validation.loss
        append_metrics(self.folder / METRICS_FILE, row)

    def finish(self, resumed: bool) -> TrainingResult:
        """Test the best checkpoint, write the results into it, draw the picture."""
        best = self.progress.best
        if not best:
            self.validate(last=True)
            best = self.progress.best
        metric, _, step = best if best else (math.nan, math.nan, self.steps)
        tensors, _ = read_container(self.folder / CHECKPOINT_FILE, "start over with --restart")
        self.model.load_state_dict({n[6:]: t for n, t in tensors.items() if n.startswith("model.")})
        test = self.score("test").metric
        self.write_checkpoint(
            CHECKPOINT_FILE,
            {
                f"test_{self.metric_name}": test,
                f"validation_{self.metric_name}": metric,
                "step": step,
                "train_seconds": round(self.progress.seconds, 3),
            },
        )
        plot_metrics(self.folder / METRICS_FILE, self.folder / PLOT_FILE, self.data.name)
        return TrainingResult(
            test,
            metric,
            self.metric_name,
            self.progress.seconds,
            self.folder / CHECKPOINT_FILE,
            self.folder / LAST_FILE,
            step,
            self.steps,
            self.config.seed,
            resumed,
        )


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise MambaintError(
            f"cannot remove {path}: {error.strerror or error}", "choose a writable folder"
        ) from error
