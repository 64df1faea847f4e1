"""A float Mamba-2 of bytes of Moby Dick, converted: bits per byte of the float model and of integer graphs.

``python -m benchmarks.char_conversion`` trains the preset ``char-mamba2`` first; with a checkpoint that
``mambaint train`` wrote, it takes that one. Results go to ``benchmarks/results/char_conversion.json`` after
every stage.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.hardware import hardware
from mamba_int.datasets import TextData, load_data
from mamba_int.device import resolve_device
from mamba_int.executor import GraphPredictor
from mamba_int.experiment import resolve
from mamba_int.files import write_json
from mamba_int.float_models.models import MambaForCausalLM
from mamba_int.training import Progress, evaluate, load_checkpoint, train
from mamba_int.training.batches import make_batches
from mamba_int.training.config import TrainingConfig
from mamba_int.training.evaluation import Predictor
from mamba_int.training.float_model import restored_float_model
from quantize.calibration import Observations, calibrate
from quantize.finetuning import FinetuneConfig, finetune
from quantize.float_mamba import ConversionConfig, build

RESULT = Path(__file__).parent / "results" / "char_conversion.json"
PRESET = "char-mamba2"
BARS = {"int8": 0.02, "ternary, fine-tuned": 0.08}
"""Most bits per byte beyond the float model, as a share of it."""
FORMS = {
    "int8": ConversionConfig(),
    "int8, reconstructed": ConversionConfig(reconstruct=True),
    "ternary": ConversionConfig(weights="ternary"),
    "ternary, reconstructed": ConversionConfig(weights="ternary", reconstruct=True),
}
FINETUNE = FinetuneConfig(steps=1000)
WINDOWS, WINDOW = 32, 256
"""Calibration inputs, spread over the training text."""


class FloatPredictor:
    """A float model as something that can be scored."""

    def __init__(self, model: MambaForCausalLM) -> None:
        self._model = model

    def __call__(self, inputs: Tensor) -> Tensor:
        """float32 logits [batch, T, vocab_size]."""
        return self._model(inputs).logits.float()

    def eval(self) -> None:
        self._model.eval()


def trained(data: TextData) -> tuple[MambaForCausalLM, dict[str, Any]]:
    """The float model of the preset at its best validation, and how it was trained."""
    experiment = resolve(PRESET)

    def report(progress: Progress) -> None:
        if progress.step % 100 == 0:
            print(f"  float step {progress.step}: {progress.bits_per_byte} bits per byte", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        config = experiment.model_config(data)
        result = train(config, experiment.training, data, experiment.source, Path(folder), progress=report)
        model = loaded(result.checkpoint)
    return model, experiment.training.to_dict() | {"seconds": result.train_seconds, "best": result.best_step}


def loaded(checkpoint: Path) -> MambaForCausalLM:
    """The float language model of a checkpoint."""
    model = restored_float_model(load_checkpoint(checkpoint)).model
    assert isinstance(model, MambaForCausalLM), f"{checkpoint} is no language model"
    return model


class Scores:
    """The result file, written after each of its rows.

    Args:
        data: the text. device: where to compute. path: of the file. tokens: scored, None for all.
    """

    def __init__(self, data: TextData, device: torch.device, path: Path, tokens: int | None = None) -> None:
        self._data, self._device, self._path, self._tokens = data, device, path, tokens
        self._content: dict[str, Any] = {"hardware": hardware(), "bars": BARS, "rows": {}}
        self._float = 0.0

    def note(self, **content: Any) -> None:
        """Enter something beside the rows."""
        self._content |= content
        write_json(self._path, self._content)

    def score(self, name: str, model: Predictor, **more: Any) -> None:
        """Bits per byte on the held-out text; the first model is the float one."""
        start = time.perf_counter()
        found = evaluate(model, self._data, "test", self._device, max_tokens=self._tokens).metric
        self._float = self._float or found
        seconds = round(time.perf_counter() - start, 2)
        row = {"bits_per_byte": found, "above_float": found / self._float - 1, **more}
        self._content["rows"][name] = row | {"evaluation_seconds": seconds}
        write_json(self._path, self._content)
        print(f"{name}: {found:.4f} bits per byte, {row['above_float']:+.2%}, {seconds} s", flush=True)

    def convert(self, name: str, model: MambaForCausalLM, seen: Observations, form: str) -> None:
        """Build the integer graph of a calibrated model in a form, and score it."""
        start = time.perf_counter()
        graph = build(model, seen, None, dataclasses.replace(FORMS[form], seq_len=WINDOW)).graph
        seconds = round(time.perf_counter() - start, 2)
        predictor = GraphPredictor(graph, self._device)
        self.score(name, predictor, build_seconds=seconds, max_bits=graph.max_bits)


def measure(
    model: MambaForCausalLM, data: TextData, scores: Scores, sizes: TrainingConfig, recipe: FinetuneConfig
) -> None:
    """Score a float model, all conversions of it, and the fine-tuned one.

    Args:
        model: on the device to use. data: the text. scores: takes the results.
        sizes: batch size and length of fine-tuning, seed of its batches. recipe: its other settings.
    """
    device = next(model.parameters()).device
    scores.note(model=model.config.to_dict(), parameters=sum(p.numel() for p in model.parameters()))
    scores.score("float", FloatPredictor(model))
    starts = torch.linspace(0, len(data.train) - WINDOW - 1, WINDOWS).long().numpy()
    calibration = data.windows("train", starts, WINDOW)
    seen = calibrate(model, calibration, moments=True)
    for form in FORMS:
        scores.convert(form, model, seen, form)

    def report(step: int, steps: int, loss: float) -> None:
        if step % 100 == 0:
            print(f"  fine-tuning step {step} of {steps}: {loss:.4f}", flush=True)

    start = time.perf_counter()
    student = finetune(model, make_batches(data, sizes, device).at, recipe, report)
    seconds = round(time.perf_counter() - start, 1)
    scores.note(finetune=dataclasses.asdict(recipe) | {"seconds": seconds})
    scores.score("ternary weights, fine-tuned, otherwise float", FloatPredictor(student))
    scores.convert("ternary, fine-tuned", student, calibrate(student, calibration), "ternary")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", nargs="?", type=Path, help="checkpoint of a float language model")
    checkpoint = parser.parse_args().checkpoint
    device, experiment = resolve_device("auto"), resolve(PRESET)
    data = load_data(experiment.source)
    assert isinstance(data, TextData)
    scores = Scores(data, device, RESULT)
    model, training = (loaded(checkpoint), {"checkpoint": str(checkpoint)}) if checkpoint else trained(data)
    scores.note(training=training)
    # Other batches than those of the training.
    sizes = dataclasses.replace(experiment.training, seed=experiment.training.seed + 1)
    measure(model.to(device), data, scores, sizes, FINETUNE)
    print(f"written to {RESULT}")


if __name__ == "__main__":
    main()
