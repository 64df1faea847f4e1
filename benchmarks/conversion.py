"""Float digits classifiers, Mamba and Mamba-2, trained here, and converted: accuracy before and after.

Run ``python -m benchmarks.conversion``; results go to ``benchmarks/results/conversion.json`` with hardware
and versions.
"""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.hardware import hardware
from circuits.lowering import build_circuit
from circuits.runtime.runner import OnnxRunner
from mamba_int.datasets import ClassificationData
from mamba_int.datasets.embedded import load_digits
from mamba_int.float_models.config import MambaConfig
from mamba_int.float_models.models import MambaForSequenceClassification
from mamba_int.graph import IntArray
from mamba_int.interpreter import evaluate
from quantize.equality import compare, torch_tracer
from quantize.float_mamba import PROVABLE, ConversionConfig, InputFormat, convert

RESULT = Path(__file__).parent / "results" / "conversion.json"
FORMAT = InputFormat(0, 16, 4)
"""Pixels 0..16 as 0..1."""
MIXERS: dict[str, dict[str, Any]] = {
    "mamba2": {"mixer": "mamba2"},
    "mamba": {"mixer": "mamba"},
    # Every entry of the state is a scan of its own: four of them make a circuit of a few seconds.
    "mamba_d_state_4": {"mixer": "mamba", "d_state": 4},
}
"""What each model changes in ``MODEL``."""
MODEL = MambaConfig(
    n_features=8,
    d_model=32,
    n_layer=1,
    d_state=16,
    headdim=16,
    num_labels=10,
    pooling="mean",
    dt_max=0.5,
    scan_type="sequential",
)
EPOCHS = 60
BATCH = 64
CALIBRATION = 256
FORMS = {
    "default": ConversionConfig(),
    "percentile": ConversionConfig(scales="percentile"),
    "minmax": ConversionConfig(scales="minmax"),
    "provable": PROVABLE,
}


def reals(integers: torch.Tensor) -> torch.Tensor:
    """What the float model reads."""
    return integers * 2.0**-FORMAT.frac


def train(data: ClassificationData, mixer: str, seed: int) -> MambaForSequenceClassification:
    """The float model after a cosine schedule of AdamW."""
    torch.manual_seed(seed)
    model = MambaForSequenceClassification(dataclasses.replace(MODEL, **MIXERS[mixer])).train()
    optimizer = torch.optim.AdamW(model.parameters(), 4e-3, weight_decay=0.05)
    inputs, labels = reals(data.train_inputs), data.train_labels.long()
    steps = EPOCHS * (len(inputs) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for _ in range(EPOCHS):
        order = torch.randperm(len(inputs))
        for rows in order[: len(order) // BATCH * BATCH].split(BATCH):
            optimizer.zero_grad()
            loss = model(inputs[rows], labels=labels[rows]).loss
            assert loss is not None
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    return model.eval()


def measure(model: MambaForSequenceClassification, data: ClassificationData, form: str) -> dict[str, Any]:
    """Convert, and run all test images in three backends."""
    start = time.perf_counter()
    conversion = convert(model, reals(data.train_inputs[:CALIBRATION]), FORMAT, FORMS[form])
    seconds = time.perf_counter() - start
    graph, images, labels = conversion.graph, data.test_inputs.numpy(), data.test_labels.numpy()
    logits = evaluate(graph, images)
    runner = OnnxRunner(graph)

    def onnx_trace(batch: IntArray) -> dict[str, IntArray]:
        tensors: dict[str, IntArray] = {}
        runner(batch, tensors)
        return tensors

    equality = compare(graph, images, {"torch": torch_tracer(graph), "onnx": onnx_trace})
    with torch.no_grad():
        exact = model(reals(data.test_inputs)).logits.numpy()
    found = logits * 2.0 ** -graph.by_name[graph.output].frac
    result: dict[str, Any] = {}
    if form == "provable":
        circuit = build_circuit(graph).circuit
        result = {"rows": circuit.rows, "logrows": circuit.logrows}
    return result | {
        "accuracy": float((logits.argmax(-1) == labels).mean()),
        "agreement": float((logits.argmax(-1) == exact.argmax(-1)).mean()),
        "logits_sqnr_db": round(float(10 * np.log10(exact.var() / np.square(found - exact).mean())), 2),
        "max_bits": graph.max_bits,
        "nodes": len(graph.nodes),
        "forms": {name: [fit.pieces, round(fit.error, 4)] for name, fit in conversion.tables.items()},
        "convert_seconds": round(seconds, 2),
        "equality": dataclasses.asdict(equality),
    }


def measure_seeds(data: ClassificationData, mixer: str, seeds: int) -> dict[str, Any]:
    """Train at every seed, convert in every form; means and all runs."""
    runs = []
    for seed in range(seeds):
        start = time.perf_counter()
        model = train(data, mixer, seed)
        with torch.no_grad():
            predicted = model(reals(data.test_inputs)).logits.argmax(-1)
        run: dict[str, Any] = {
            "seed": seed,
            "float_accuracy": float((predicted == data.test_labels).double().mean()),
            "train_seconds": round(time.perf_counter() - start, 1),
        }
        for form in FORMS:
            run[form] = measure(model, data, form)
            accuracy, sqnr = run[form]["accuracy"], run[form]["logits_sqnr_db"]
            print(f"{mixer} {seed}: float {run['float_accuracy']:.4f}, {form} {accuracy:.4f}, {sqnr} dB")
        runs.append(run)
    return {
        "mean_float_accuracy": float(np.mean([run["float_accuracy"] for run in runs])),
        "mean_accuracy": {form: float(np.mean([run[form]["accuracy"] for run in runs])) for form in FORMS},
        "runs": runs,
    }


def main(seeds: int = 3) -> None:
    """Measure everything and write the result file."""
    torch.set_num_threads(1)
    data = load_digits()
    result: dict[str, Any] = {"hardware": hardware(), "model": MODEL.to_dict()}
    for mixer in MIXERS:
        result[mixer] = measure_seeds(data, mixer, seeds)
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
