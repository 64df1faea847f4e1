"""Conversion of models of 130 million parameters with random weights: seconds of every stage, peak memory.

``python -m benchmarks.conversion_size`` converts a Mamba and a Mamba-2 of 24 x 768, each in a process of its
own, prints a table and writes ``benchmarks/results/conversion_size.json``. What a conversion costs does not
depend on the weights; calibration is on a few short sequences of random tokens.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.hardware import hardware
from mamba_int.float_models.config import MambaConfig
from mamba_int.float_models.models import MambaForCausalLM
from quantize.float_mamba import ConversionConfig, convert

RESULT = Path(__file__).parent / "results" / "conversion_size.json"
MODELS = {
    "mamba": MambaConfig(mixer="mamba", vocab_size=50280, d_model=768, n_layer=24, d_state=16),
    "mamba2": MambaConfig(mixer="mamba2", vocab_size=50280, d_model=768, n_layer=24, d_state=128),
}
"""The shapes of mamba-130m and mamba2-130m."""
SEQUENCES, STEPS = 4, 32
"""Of the calibration."""


def measure(name: str) -> dict[str, Any]:
    """Make a model, convert it, save the graph; in this process, whose peak memory counts."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = MambaForCausalLM(MODELS[name]).eval()
    tokens = torch.randint(MODELS[name].vocab_size, (SEQUENCES, STEPS))
    seconds: dict[str, float] = {}
    reports, begun = 0, time.perf_counter()

    def lap(stage: str) -> None:
        nonlocal begun
        now = time.perf_counter()
        seconds[stage], begun = seconds.get(stage, 0.0) + now - begun, now

    def progress(done: int, whole: int) -> None:
        nonlocal reports
        reports += 1
        if done <= SEQUENCES:
            lap("calibration")
        else:
            lap({whole: "proof of all intervals", whole - 1: "head"}.get(done, "layers"))

    conversion = convert(model, tokens, config=ConversionConfig(), progress=progress)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.mint"
        conversion.graph.save(path)
        size = path.stat().st_size
    lap("save")
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "calibration": f"{SEQUENCES} sequences of {STEPS} tokens",
        "seconds": {stage: round(value, 1) for stage, value in seconds.items()},
        "peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "progress_reports": reports,
        "nodes": len(conversion.graph.nodes),
        "max_bits": conversion.graph.max_bits,
        "file_bytes": size,
    }


def main(names: list[str]) -> None:
    """Measure the models of these names, all if there are none, each in a fresh process."""
    if names[:1] == ["--one"]:
        print(json.dumps(measure(names[1])))
        return
    result: dict[str, Any] = {"hardware": hardware(), "models": {}}
    for name in names or MODELS:
        command = [sys.executable, "-m", "benchmarks.conversion_size", "--one", name]
        row = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
        result["models"][name] = row
        print(f"{name}: {row['seconds']} s, {row['peak_gb']} GB, {row['nodes']} nodes", flush=True)
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
