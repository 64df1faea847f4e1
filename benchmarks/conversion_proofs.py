"""Proofs of the converted digits classifiers of ``benchmarks.conversion``, in their provable form.

``python -m benchmarks.conversion_proofs`` trains each at one seed, converts it within 24 bits, makes keys,
proves and verifies a sample; the fastest of the repeats counts. Mamba-1 with d_state 16 takes 2^20 rows, 10
GB of memory and ten minutes. Results go to ``benchmarks/results/conversion_proofs.json``.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.conversion import FORMS, MIXERS, trained
from benchmarks.hardware import hardware
from circuits.lowering import build_circuit
from quantize.float_mamba import convert
from zk.calibration import measure

RESULT = Path(__file__).parent / "results" / "conversion_proofs.json"
SEED = 0
REPEATS = {"mamba2": 3, "mamba_d_state_4": 2, "mamba": 1}
"""Small circuits first, so that a machine with too little memory has their results."""


def main() -> None:
    """Measure, print and write the result file after each model."""
    torch.set_num_threads(1)
    result: dict[str, Any] = {"hardware": hardware()}
    assert REPEATS.keys() == MIXERS.keys()
    for mixer, repeats in REPEATS.items():
        task = trained(mixer, SEED)
        graph = convert(
            task.model, task.inputs(task.calibration()), task.input_format, FORMS["provable"]
        ).graph
        lowered = build_circuit(graph)
        measured = measure(graph, lowered, repeats)
        result[mixer] = {"logrows": lowered.circuit.logrows, **asdict(measured)}
        print(mixer, result[mixer], f"load {os.getloadavg()[0]:.1f}", flush=True)
        RESULT.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
