"""Float digits classifiers, Mamba and Mamba-2, trained here, and converted: accuracy before and after.

Run ``python -m benchmarks.conversion``; results go to ``benchmarks/results/conversion.json`` with hardware
and versions. The models are those of the presets ``digits-mamba`` and ``digits-mamba2``.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.hardware import hardware
from circuits.lowering import build_circuit
from circuits.runtime.runner import OnnxRunner
from mamba_int.datasets import ClassificationData, load_data
from mamba_int.experiment import resolve
from mamba_int.interpreter import evaluate
from mamba_int.training import train
from quantize.equality import compare, torch_tracer
from quantize.float_checkpoint import FloatTask, pair_with_data, read_float_checkpoint
from quantize.float_mamba import PROVABLE, ConversionConfig, convert

RESULT = Path(__file__).parent / "results" / "conversion.json"
MIXERS: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba2": ("digits-mamba2", {}),
    "mamba": ("digits-mamba", {}),
    # Every entry of the state is a scan of its own: four of them make a circuit of a few seconds.
    "mamba_d_state_4": ("digits-mamba", {"d_state": 4}),
}
"""The preset of each model, and what changes in it."""
FORMS = {
    "default": ConversionConfig(),
    "percentile": ConversionConfig(scales="percentile"),
    "minmax": ConversionConfig(scales="minmax"),
    "provable": PROVABLE,
}


def trained(mixer: str, seed: int) -> FloatTask:
    """The float model of a preset, with its data."""
    preset, changes = MIXERS[mixer]
    experiment = resolve(preset, seed=seed)
    experiment.model.update(changes)
    data = load_data(experiment.source)
    with tempfile.TemporaryDirectory() as folder:
        train(
            experiment.model_config(data),
            experiment.training,
            data,
            experiment.source,
            Path(folder),
            device="cpu",
        )
        return pair_with_data(read_float_checkpoint(Path(folder)), None)


def measure(task: FloatTask, form: str) -> dict[str, Any]:
    """Convert, and run all test images in three backends."""
    assert isinstance(task.data, ClassificationData)
    start = time.perf_counter()
    calibration = task.inputs(task.calibration())
    conversion = convert(task.model, calibration, task.input_format, FORMS[form])
    seconds = time.perf_counter() - start
    graph, images, labels = conversion.graph, task.data.test_inputs.numpy(), task.data.test_labels.numpy()
    logits = evaluate(graph, images)
    equality = compare(graph, images, {"torch": torch_tracer(graph), "onnx": OnnxRunner(graph)})
    with torch.no_grad():
        exact = task(task.data.test_inputs).numpy()
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


def measure_seeds(mixer: str, seeds: int) -> dict[str, Any]:
    """Train at every seed, convert in every form; means and all runs."""
    runs = []
    for seed in range(seeds):
        start = time.perf_counter()
        task = trained(mixer, seed)
        assert task.checkpoint.run is not None
        run: dict[str, Any] = {
            "seed": seed,
            "float_accuracy": task.checkpoint.run.results["test_accuracy"],
            "train_seconds": round(time.perf_counter() - start, 1),
        }
        for form in FORMS:
            run[form] = measure(task, form)
            accuracy, sqnr = run[form]["accuracy"], run[form]["logits_sqnr_db"]
            print(f"{mixer} {seed}: float {run['float_accuracy']:.4f}, {form} {accuracy:.4f}, {sqnr} dB")
        runs.append(run)
    return {
        "model": task.model.config.to_dict(),
        "mean_float_accuracy": float(np.mean([run["float_accuracy"] for run in runs])),
        "mean_accuracy": {form: float(np.mean([run[form]["accuracy"] for run in runs])) for form in FORMS},
        "runs": runs,
    }


def main(seeds: int = 3) -> None:
    """Measure everything and write the result file."""
    torch.set_num_threads(1)
    result: dict[str, Any] = {"hardware": hardware()}
    for mixer in MIXERS:
        result[mixer] = measure_seeds(mixer, seeds)
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
