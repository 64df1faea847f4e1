"""The training loop: resumable to the bit, guarded against non-finite losses, stoppable at any step."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from mamba_int.datasets import ClassificationData, DataSource, TextData
from mamba_int.device import resolve_device
from mamba_int.errors import MambaintError
from mamba_int.float_models.config import MambaConfig
from mamba_int.training.config import TrainingConfig
from mamba_int.training.data_parallel import ALONE, Ranks
from mamba_int.training.metrics import append_metrics, plot_metrics
from mamba_int.training.model_config import ModelConfig
from mamba_int.training.protocol import TrainableModel
from mamba_int.training.run import CHECKPOINT_FILE, LAST_FILE, METRICS_FILE, PLOT_FILE, TrainingRun
from mamba_int.training.tensorboard import TensorBoardLog

LOG_EVERY = 10


@dataclass(frozen=True)
class Progress:
    """What the ``progress`` callback is told after every step.

    Attributes:
        step, steps: steps done, and in all.
        loss: training loss of the step in nats.
        learning_rate: peak rate times schedule.
        accuracy: training accuracy since the last log row (classification).
        bits_per_byte: the loss in bits per byte of text (language model).
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
        test_metric, validation_metric: accuracy, or bits per byte, of the kept checkpoint; None if the
            validation split was trained on.
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
    validation_metric: float | None
    metric_name: str
    train_seconds: float
    checkpoint: Path
    last_checkpoint: Path
    best_step: int
    steps: int
    seed: int
    resumed: bool


@contextmanager
def _stop_requests(ranks: Ranks) -> Iterator[Callable[[], bool]]:
    """Turn the first SIGINT or SIGTERM into a polite request; a second one acts as always.

    Under ``torchrun`` a Ctrl-C arrives twice, from the terminal and from ``torchrun``, which itself ends
    whoever does not stop within half a minute.
    """
    stopped = threading.Event()
    previous: dict[signal.Signals, Any] = {}

    def request(number: int, frame: FrameType | None) -> None:
        stopped.set()
        if ranks.count == 1:
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


def _run_loop(
    run: TrainingRun, log: Callable[[dict[str, Any]], None], progress: Callable[[Progress], None] | None
) -> None:
    """Train to the end, or to a request to stop.

    Raises:
        MambaintError: when stopped; the state is saved by then.
    """
    window = _Window(run, log)
    moment = time.perf_counter()
    run.model.train()
    with _stop_requests(run.ranks) as stop_requested:
        for step in range(run.progress.step, run.steps):
            began = time.perf_counter()
            if step >= run.freeze_step and not run.model.scales_frozen:
                run.model.freeze_scales()
            outcome = run.update(step, stop_requested())
            run.progress.step = step + 1
            if step >= run.average_step:
                run.accumulate_average()
            window.add(outcome.loss, outcome.correct, time.perf_counter() - began)
            last = run.progress.step == run.steps
            validated = last or run.progress.step % run.validate_every == 0
            if validated:
                run.restore_if_not_finite()
                run.validate(last)
            rate = run.config.learning_rate * run.rate_factor(step)
            if validated or run.progress.step % LOG_EVERY == 0:
                window.log(rate, validated)
            now = time.perf_counter()
            run.progress.seconds += now - moment
            moment = now
            if progress is not None:
                progress(window.progress(outcome.loss, rate))
            # Several processes stop when all know of it, a step later.
            stopping = (outcome.stopping if run.ranks.count > 1 else stop_requested()) and not last
            if last or stopping or run.progress.step % run.config.checkpoint_every == 0:
                run.restore_if_not_finite()
                run.save()
            if stopping:
                raise MambaintError(
                    f"training was interrupted after step {run.progress.step} of {run.steps}",
                    "run the same command again to resume",
                )


class _Window:
    """What happened since the last row of the log."""

    def __init__(self, run: TrainingRun, write: Callable[[dict[str, Any]], None]) -> None:
        self.run = run
        self.write = write
        self.classes = run.metric_name == "accuracy"
        self.losses: list[float] = []
        self.right = torch.zeros((), dtype=torch.int64, device=run.device)
        self.batches = 0
        self.seconds = 0.0
        self.speed = 0.0
        self.accuracy: float | None = 0.0 if self.classes else None

    def add(self, loss: float, correct: Tensor, seconds: float) -> None:
        self.batches += 1
        if math.isfinite(loss):
            self.losses.append(loss)
        self.right += correct
        self.seconds += seconds

    def bits_per_byte(self, loss: float) -> float:
        """A loss in nats per token in bits per byte of text, at the mean length of the training's tokens."""
        return loss / math.log(2) / self.run.batches.bytes_per_token

    def progress(self, loss: float, rate: float) -> Progress:
        """What there is to tell of the newest step."""
        return Progress(
            self.run.progress.step,
            self.run.steps,
            loss,
            rate,
            self.accuracy,
            None if self.classes else self.bits_per_byte(loss),
            self.speed,
            self.run.validation.metric if self.run.validation else None,
        )

    def log(self, rate: float, validated: bool) -> None:
        """Append a row and start anew; a window without one finite loss has nothing to say."""
        run = self.run
        self.speed = self.batches * run.batches.tokens_per_batch / max(self.seconds, 1e-9)
        if self.classes:
            self.accuracy = int(self.right) / (self.batches * run.batches.predictions_per_batch)
        if self.losses:
            loss = sum(self.losses) / len(self.losses)
            row: dict[str, Any] = {"step": run.progress.step, "loss": loss, "learning_rate": rate}
            row |= (
                {"train_accuracy": self.accuracy}
                if self.classes
                else {"bits_per_byte": self.bits_per_byte(loss)}
            )
            row["tokens_per_second"] = round(self.speed, 1)
            for fault in ("skipped_batches", "restored"):
                if getattr(run.progress, fault):
                    row[fault] = getattr(run.progress, fault)
            if validated and run.validation is not None:
                row[f"validation_{run.metric_name}"] = run.validation.metric
                row["validation_loss"] = run.validation.loss
            self.write(row)
        self.losses = []
        self.right.zero_()
        self.batches, self.seconds = 0, 0.0


@contextmanager
def _log(run: TrainingRun, tensorboard: bool) -> Iterator[Callable[[dict[str, Any]], None]]:
    """What process 0 does with a row of metrics; the others do nothing."""
    path = run.folder / METRICS_FILE
    with run.ranks.agreed():
        board = TensorBoardLog(run.folder, run.progress.step) if tensorboard and run.ranks.first else None

    def write(row: dict[str, Any]) -> None:
        if run.ranks.first:
            append_metrics(path, row)
        if board is not None:
            board.add(row)

    try:
        yield write
    finally:
        if board is not None:
            board.close()


def _new_model(config: ModelConfig, data: ClassificationData | TextData, seed: int) -> TrainableModel:
    # Imported late so that the trainer can be used (and tested) without the models.
    if isinstance(config, MambaConfig):
        from mamba_int.training.float_model import new_float_model

        return new_float_model(config, data, seed)
    from mamba_int.model import MambaInt

    return MambaInt(config, seed)


def train(
    model_config: ModelConfig,
    training_config: TrainingConfig,
    data: ClassificationData | TextData,
    source: DataSource,
    folder: Path,
    *,
    restart: bool = False,
    device: torch.device | str = "auto",
    ranks: Ranks = ALONE,
    tensorboard: bool = False,
    progress: Callable[[Progress], None] | None = None,
    build_model: Callable[[Any, int], TrainableModel] | None = None,
) -> TrainingResult:
    """Train a model in a folder, or finish the training an earlier call began there.

    The folder gets ``checkpoint.safetensors`` (best by validation after the scales were frozen),
    ``last.safetensors``, ``state.safetensors`` (for resuming), ``metrics.jsonl`` and ``metrics.png``, and
    ``tokenizer.json`` where the data has a BPE.
    Interrupted at any step and resumed, a run on the same machine ends with the same bits. The float
    twin is the same call with ``arithmetic="float"``, ``training_config.twin()`` and another folder.

    Args:
        model_config: the model, native or float; its shape must fit the data.
        training_config: the recipe.
        data: what :func:`~mamba_int.datasets.load_data` returned for ``source``.
        source: where the data came from, for the checkpoint.
        folder: folder of the run; made if missing.
        restart: forget what an earlier run left in the folder.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``, or one as resolved.
        ranks: the processes that train together (:func:`~mamba_int.training.data_parallel.joined`), all of
            which make this call, see the same folder and return the same. The result is that of one process
            up to the rounding of sums, and the same bits in every run with as many processes.
        tensorboard: also log for TensorBoard, into ``tensorboard/``.
        progress: called after every step, in this thread.
        build_model: makes another model than the configuration's own, from that and a seed.

    Returns:
        Test and validation metric of the kept checkpoint, and where it is.

    Raises:
        MambaintError: if the folder cannot be written, holds another run or a damaged state; if the
            data does not fit the model; if the loss stays non-finite; or when interrupted by SIGINT
            or SIGTERM (the state is saved by then).
    """
    _check_fit(model_config, data)
    if training_config.autocast != "none" and not isinstance(model_config, MambaConfig):
        raise MambaintError(
            f"[training] autocast = {training_config.autocast} would round the integers of a native model",
            "set autocast = none",
        )
    chosen = device if isinstance(device, torch.device) else resolve_device(device)
    cuda_devices = [chosen] if chosen.type == "cuda" else []
    with _threads(training_config.threads), torch.random.fork_rng(devices=cuda_devices):
        torch.manual_seed(training_config.seed)
        seed = training_config.seed
        model = build_model(model_config, seed) if build_model else _new_model(model_config, data, seed)
        model = model.to(chosen)
        run = TrainingRun(model, model_config, training_config, data, source, folder, chosen, ranks)
        resumed = run.start(restart)
        with _log(run, tensorboard) as log:
            _run_loop(run, log, progress)
        test_metric, validation_metric, best_step = run.test()
    if ranks.first:
        plot_metrics(folder / METRICS_FILE, folder / PLOT_FILE, data.name)
    return TrainingResult(
        test_metric,
        validation_metric,
        run.metric_name,
        run.progress.seconds,
        folder / CHECKPOINT_FILE,
        folder / LAST_FILE,
        best_step,
        run.steps,
        training_config.seed,
        resumed,
    )


def _check_fit(config: ModelConfig, data: ClassificationData | TextData) -> None:
    """Refuse a model of another task or shape before the first tensor does it less clearly."""
    wanted: dict[str, Any]
    if isinstance(config, MambaConfig):
        wanted = (
            {"n_features": 0, "vocab_size": data.vocab_size}
            if isinstance(data, TextData)
            else {"n_features": data.n_features, "num_labels": data.n_classes}
        )
    elif isinstance(data, TextData):
        wanted = {"task": "language_model", "vocab_size": data.vocab_size}
    else:
        wanted = {
            "task": "classification",
            "seq_len": data.seq_len,
            "n_features": data.n_features,
            "n_classes": data.n_classes,
            "input_low": data.input_low,
            "input_high": data.input_high,
        }
    for key, value in wanted.items():
        if getattr(config, key) != value:
            raise MambaintError(
                f"the model has {key} = {getattr(config, key)}, the data {data.name} has {value}",
                f"set {key} to {value}, or leave it to be read from the data",
            )
