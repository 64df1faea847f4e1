"""The digits numbers of the README: ten seeds, float twins, and the demo model's circuit on twenty images.

Run ``make bench-digits``; results go to ``benchmarks/results/digits.json`` with hardware and versions.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.hardware import hardware

RESULT = Path(__file__).parent / "results" / "digits.json"
SEEDS = {"digits": range(10), "digits-large": range(3)}
"""One of 360 test images is 0.3 points: the mean of three seeds is uncertain by 0.6, that of ten by 0.3."""
IMAGES = 20


def mambaint(*arguments: str) -> dict[str, Any]:
    """Run the command with --json and return what it prints."""
    command = [sys.executable, "-m", "cli.main", *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1):
        raise SystemExit(f"{' '.join(command)}: {done.stderr}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def mean(values: list[float]) -> float:
    """Arithmetic mean."""
    return sum(values) / len(values)


def train_seeds(preset: str, folder: Path, twin: bool) -> dict[str, Any]:
    """Train a preset at every seed, and its float twin if asked; mean test accuracies."""
    runs = []
    for seed in SEEDS[preset]:
        arguments = ["--preset", preset, "--seed", str(seed), "--out", str(folder / f"{preset}-{seed}")]
        runs.append(mambaint("train", *arguments, "--restart", *(["--twin"] if twin else [])))
        print(
            f"{preset} seed {seed}: {runs[-1]['test_accuracy']:.4f} (twin {runs[-1]['float_twin_accuracy']})"
        )
    result: dict[str, Any] = {
        key: [run[key] for run in runs] for key in ("test_accuracy", "float_twin_accuracy", "train_seconds")
    }
    result["mean_test_accuracy"] = mean(result["test_accuracy"])
    if twin:
        result["mean_float_twin_accuracy"] = mean(result["float_twin_accuracy"])
    return result


def check_witnesses(model: Path) -> dict[str, Any]:
    """Twenty test images through EZKL: do its constraints accept the interpreter's integers?

    Every auxiliary cell that has the name of a graph tensor is compared with the interpreter as well.
    """
    from circuits.lowering import build_circuit
    from mamba_int.datasets.embedded import load_digits
    from mamba_int.graph import Graph
    from mamba_int.interpreter import evaluate
    from zk.prove import mock

    graph = Graph.load(model)
    lowered = build_circuit(graph)
    images = load_digits().test_inputs[:IMAGES].numpy()
    trace: dict[str, Any] = {}
    logits = evaluate(graph, images, trace)
    witnesses, compared, differ = [], 0, 0
    for i, image in enumerate(images):
        tensors: dict[str, Any] = {}
        witness = lowered.witness(image, trace=tensors)
        witnesses.append(witness)
        differ += witness.public["logits"] != [int(v) for v in logits[i]]
        for name, value in tensors.items():
            compared += value.size
            differ += int((value != trace[name][i]).sum())
    start = time.perf_counter()
    accepted = sum(mock(lowered.circuit, witnesses, timeout=600))
    return {
        "images": IMAGES,
        "cells_compared": compared,
        "cells_that_differ": differ,
        "accepted_by_ezkl": accepted,
        "mock_seconds": round(time.perf_counter() - start, 1),
        "rows_by_part": {part: sum(kinds.values()) / 2 for part, kinds in lowered.cost.items()},
    }


def main(folder: Path) -> None:
    """Measure everything and write the result file."""
    result: dict[str, Any] = {"hardware": hardware()}
    result["digits"] = train_seeds("digits", folder, twin=True)
    result["digits-large"] = train_seeds("digits-large", folder, twin=False)
    large = ("quantize", str(folder / "digits-large-0"), "--out", str(folder / "model-large"))
    result["digits-large"]["quantize"] = mambaint(*large)
    run = folder / "digits-0"
    result["quantize"] = mambaint("quantize", str(run), "--out", str(folder / "model"))
    model = Path(result["quantize"]["model"])
    result["witness"] = check_witnesses(model)
    digit = folder / "digit.json"
    from mamba_int.datasets.embedded import load_digits

    digit.write_text(json.dumps({"input_data": [load_digits().test_inputs[0].flatten().tolist()]}))
    os.environ["MAMBAINT_CACHE"] = str(folder / "cache")
    arguments = ("--input", str(digit), "--model", str(model), "--out", str(folder / "proof.json"))
    result["prove_first"] = mambaint("prove", *arguments)
    result["prove_again"] = mambaint("prove", *arguments)
    result["verify"] = mambaint("verify", str(folder / "proof.json"))
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written to {RESULT}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/bench-digits"))
