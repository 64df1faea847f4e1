"""A float Mamba-2 of bytes of Moby Dick, converted: bits per byte of the float model and of integer graphs.

``python -m benchmarks.char_conversion`` trains the float model; with a folder that ``save_pretrained``
wrote, it takes that one. Results go to ``benchmarks/results/char_conversion.json`` after every stage.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.hardware import hardware
from mamba_int.datasets import TextData
from mamba_int.datasets.embedded import load_moby_dick
from mamba_int.device import resolve_device
from mamba_int.executor import GraphPredictor
from mamba_int.files import write_json
from mamba_int.float_models.config import MambaConfig
from mamba_int.float_models.models import MambaForCausalLM
from mamba_int.training.batches import Batches, TextBatches
from mamba_int.training.config import TrainingConfig
from mamba_int.training.evaluation import evaluate
from mamba_int.training.schedule import learning_rate_factor
from quantize.calibration import Observations, calibrate
from quantize.finetuning import FinetuneConfig, finetune
from quantize.float_mamba import ConversionConfig, build

RESULT = Path(__file__).parent / "results" / "char_conversion.json"
BARS = {"int8": 0.02, "ternary, fine-tuned": 0.08}
"""Most bits per byte beyond the float model, as a share of it."""
FORMS = {
    "int8": ConversionConfig(),
    "int8, reconstructed": ConversionConfig(reconstruct=True),
    "ternary": ConversionConfig(weights="ternary"),
    "ternary, reconstructed": ConversionConfig(weights="ternary", reconstruct=True),
}
MODEL = MambaConfig(mixer="mamba2", vocab_size=256, d_model=256, n_layer=4, d_state=64, headdim=64)
FINETUNE = FinetuneConfig(steps=1000)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is trained and measured.

    Attributes:
        model: the float model. steps, batch, length, learning_rate: of its training.
        finetune: the recipe for ternary weights, on batches of the same size.
        windows, window: calibration inputs. tokens: of the held-out text that are scored, None for all.
    """

    model: MambaConfig = MODEL
    steps: int = 1200
    batch: int = 32
    length: int = 512
    learning_rate: float = 4e-3
    finetune: FinetuneConfig = FINETUNE
    windows: int = 32
    window: int = 256
    tokens: int | None = None


class FloatPredictor:
    """A float model as something that can be scored."""

    def __init__(self, model: MambaForCausalLM) -> None:
        self._model = model

    def __call__(self, inputs: Tensor) -> Tensor:
        """float32 logits [batch, T, vocab_size]."""
        return self._model(inputs).logits.float()

    def eval(self) -> None:
        self._model.eval()


def train(plan: Plan, batches: Batches, device: torch.device) -> MambaForCausalLM:
    """The float model after a cosine schedule of AdamW, on CUDA in bfloat16."""
    torch.manual_seed(0)
    model = MambaForCausalLM(plan.model).to(device).train()
    roles = model.parameter_roles()
    groups = [
        {"params": parameters, "weight_decay": 0.1 if role == "matrices" else 0.0}
        for role, parameters in roles.items()
        if parameters
    ]
    optimizer = torch.optim.AdamW(groups, plan.learning_rate, betas=(0.9, 0.98))
    for step in range(plan.steps):
        for group in optimizer.param_groups:
            group["lr"] = plan.learning_rate * learning_rate_factor(step, plan.steps, 50, "cosine")
        inputs, targets = batches.at(step)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(inputs).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 99:
            print(f"  float step {step + 1}: {float(loss.detach()):.4f} nats", flush=True)
    return model.eval()


class Measurement:
    """The rows of the result file, written after each.

    Args:
        result: what the file holds beside the rows.
    """

    def __init__(self, plan: Plan, data: TextData, device: torch.device, result: Path) -> None:
        self._plan, self._data, self._device, self._path = plan, data, device, result
        self._content: dict[str, Any] = {"hardware": hardware(), "bars": BARS, "rows": {}}
        self._float = 0.0

    def note(self, **content: Any) -> None:
        """Enter something beside the rows."""
        self._content |= content
        write_json(self._path, self._content)

    def score(self, name: str, model: Any, **more: Any) -> None:
        """Bits per byte on the held-out text; the first model is the float one."""
        start = time.perf_counter()
        found = evaluate(model, self._data, "test", self._device, max_tokens=self._plan.tokens).metric
        self._float = self._float or found
        row = {"bits_per_byte": found, "above_float": found / self._float - 1}
        row |= more | {"evaluation_seconds": round(time.perf_counter() - start, 2)}
        self._content["rows"][name] = row
        write_json(self._path, self._content)
        print(f"{name}: {found:.4f} bits per byte, {row['above_float']:+.2%}; {more}", flush=True)

    def convert(self, name: str, model: MambaForCausalLM, seen: Observations, form: str) -> None:
        """Build the integer graph of a calibrated model in a form, and score it."""
        start = time.perf_counter()
        config = dataclasses.replace(FORMS[form], seq_len=self._plan.window)
        graph = build(model, seen, None, config).graph
        seconds = round(time.perf_counter() - start, 2)
        self.score(name, GraphPredictor(graph, self._device), build_seconds=seconds, max_bits=graph.max_bits)


def measure(plan: Plan, folder: Path | None, result: Path) -> None:
    """All stages."""
    device = resolve_device("auto")
    data = load_moby_dick()
    sizes = TrainingConfig(batch_size=plan.batch, sequence_length=plan.length, seed=1)
    batches = TextBatches(data, sizes, device)
    measurement = Measurement(plan, data, device, result)
    start = time.perf_counter()
    model = MambaForCausalLM.from_pretrained(folder).to(device) if folder else train(plan, batches, device)
    measurement.note(
        model=model.config.to_dict(),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        training={"steps": plan.steps, "tokens": plan.batch * plan.length, "rate": plan.learning_rate},
        training_seconds=round(time.perf_counter() - start, 1),
    )
    measurement.score("float", FloatPredictor(model))

    starts = torch.linspace(0, len(data.train) - plan.window - 1, plan.windows).long().numpy()
    calibration = data.windows("train", starts, plan.window)
    seen = calibrate(model, calibration, moments=True)
    for form in FORMS:
        measurement.convert(form, model, seen, form)

    def report(step: int, steps: int, loss: float) -> None:
        if step % 100 == 0:
            print(f"  fine-tuning step {step} of {steps}: {loss:.4f}", flush=True)

    start = time.perf_counter()
    student = finetune(model, batches.at, plan.finetune, report)
    measurement.note(
        finetune=dataclasses.asdict(plan.finetune), finetune_seconds=round(time.perf_counter() - start, 1)
    )
    measurement.score("ternary weights, fine-tuned, float activations", FloatPredictor(student))
    measurement.convert("ternary, fine-tuned", student, calibrate(student, calibration), "ternary")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", nargs="?", type=Path, help="folder of a trained float language model")
    measure(Plan(), parser.parse_args().checkpoint, RESULT)
    print(f"written to {RESULT}")


if __name__ == "__main__":
    main()
