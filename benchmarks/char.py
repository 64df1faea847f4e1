"""Bits per byte of the ten-million-parameter model of Moby Dick: ternary, int8 weights, float twin.

``python -m benchmarks.char`` on a GPU; writes ``benchmarks/results/char.json``.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.hardware import hardware
from mamba_int.datasets import load_data
from mamba_int.experiment import resolve
from mamba_int.files import write_json
from mamba_int.training import train

RESULTS = Path(__file__).parent / "results" / "char.json"
NGRAM = 2.656
"""Bits per byte of an order-4 n-gram on the same held-out tenth."""


def trained(form: str, preset: str = "char-large", **recipe: Any) -> dict[str, Any]:
    """Train one form, ``ternary``, ``int8`` or ``float``; its test bits per byte and speed."""
    experiment = resolve(preset)
    data = load_data(experiment.source)
    if form == "int8":
        experiment.model["weights"] = "int8"
    model = experiment.twin_config(data) if form == "float" else experiment.model_config(data)
    config = dataclasses.replace(experiment.training, **recipe)
    if form == "float":
        config = config.twin()
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        result = train(model, config, data, experiment.source, Path(folder))
        seconds = time.perf_counter() - began
    tokens = config.steps * config.batch_size * config.sequence_length
    row = {
        "form": form,
        "bits_per_byte": result.test_metric,
        "validation": result.validation_metric,
        "best_step": result.best_step,
        "steps": config.steps,
        "learning_rate": config.learning_rate,
        "seconds": seconds,
        "tokens_per_second": tokens / result.train_seconds,
    }
    print(row, flush=True)
    return row


def main() -> None:
    # Each form at the best of two learning rates, 4e-3 and twice or half of it.
    rows = [trained("ternary"), trained("int8", learning_rate=4e-3), trained("float")]
    twin = rows[-1]["bits_per_byte"]
    for row in rows:
        row["above_twin"] = row["bits_per_byte"] / twin - 1
    write_json(RESULTS, {"hardware": hardware(), "ngram_bits_per_byte": NGRAM, "rows": rows})
    print(f"written to {RESULTS}")


if __name__ == "__main__":
    sys.exit(main())
