"""How well ``mambaint estimate`` predicts: models it was not fitted to, predicted and measured.

Run ``make bench-estimate`` on a quiet machine; results go to ``benchmarks/results/estimate.json`` with
hardware and versions. The machine is measured anew first.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from benchmarks.hardware import hardware
from circuits.lowering import build_circuit
from mamba_int.config import MambaIntConfig
from mamba_int.datasets import DataSource
from mamba_int.graph import Graph
from mamba_int.model import MambaInt
from mamba_int.training import Checkpoint, DataDescription, TrainingConfig
from quantize.native import native_graph
from zk.calibration import REPEATS, calibrate, measure
from zk.estimate import Size

RESULT = Path(__file__).parent / "results" / "estimate.json"
BARS = {
    "keygen_seconds": 0.25,
    "prove_seconds": 0.25,
    "verify_seconds": 0.25,
    "setup_peak_bytes": 0.15,
    "prove_peak_bytes": 0.15,
    "proof_bytes": 0.05,
    "proving_key_bytes": 0.05,
}
"""Largest relative error that the project promises."""

NARROW: dict[str, Any] = {
    "gate": "hard_sigmoid",
    "final_norm": False,
    "input_weights": "ternary",
    "conv_bias": False,
    "activate_BC": True,
    "n_features": 3,
    "n_classes": 5,
    "d_model": 8,
    "headdim": 4,
    "d_state": 4,
    "d_conv": 2,
    "norm_frac": 4,
    "norm_shift": 0,
    "norm_input_bits": 10,
    "residual_frac": 5,
    "activation_bits": 4,
    "y_bits": 5,
    "decay_bits": 6,
    "A_bits": 8,
    "G_headroom": 0,
    "G_limit": 30,
    "M_bits": 12,
    "pool_bits": 6,
}
"""A small model whose forms and bits need few rows."""

SHAPES: dict[str, tuple[dict[str, Any], bool]] = {
    "one step": ({"seq_len": 1}, False),
    "two steps": ({"seq_len": 2}, False),
    "two steps, public input": ({"seq_len": 2}, True),
    "four steps": ({"seq_len": 4}, False),
    "no rotation": ({"seq_len": 4, "rotation": "none"}, False),
    "two layers": ({"seq_len": 4, "n_layer": 2}, False),
    "eight steps": ({"seq_len": 8}, False),
    "shear, chunks of four": ({"seq_len": 8, "chunk_size": 4, "rotation": "shear"}, False),
    "sixteen steps": ({"seq_len": 16}, False),
    "wider": ({"seq_len": 8, "d_model": 16, "headdim": 8, "d_state": 8}, False),
    "three layers, public input": ({"seq_len": 6, "n_layer": 3}, True),
    "wider, sixteen steps": ({"seq_len": 16, "d_model": 16, "headdim": 8, "d_state": 8}, False),
}
"""What each model changes in ``NARROW``, and whether its input is public."""


def random_model(config: MambaIntConfig) -> Graph:
    """The integer graph of an untrained model whose scales were observed on random inputs."""
    model = MambaInt(config, 0)
    random = np.random.default_rng(0)
    shape = (16, config.seq_len, config.n_features)
    batch = random.integers(config.input_low, config.input_high + 1, shape)
    model.observe(torch.from_numpy(batch))
    model.freeze_scales()
    data = DataDescription(
        name="random",
        source=DataSource("digits"),
        fingerprint="",
        class_names=tuple(map(str, range(config.n_classes))),
        feature_offset=(0.0,) * config.n_features,
        feature_scale=(1.0,) * config.n_features,
        input_low=config.input_low,
        input_high=config.input_high,
    )
    integers = dict(model.frozen_integers())
    checkpoint = Checkpoint(config, TrainingConfig(), data, {}, model.state_dict(), integers, sha256="")
    return native_graph(checkpoint)


def main() -> None:
    """Measure this machine, then every shape; print and write how far off the predictions are."""
    torch.set_num_threads(1)
    with TemporaryDirectory(prefix="mambaint-bench-") as folder:
        cache = Path(folder)
        calibration = calibrate(print, cache)
        lines = []
        for name, (changes, public_input) in SHAPES.items():
            graph = random_model(MambaIntConfig(**{**NARROW, **changes}))
            lowered = build_circuit(graph, public_input)
            size = Size.of(lowered.circuit)
            predicted = asdict(calibration.predict(size))
            # make_keys refuses a circuit whose rows EZKL counts differently: measured means equal.
            measured = asdict(measure(graph, lowered, REPEATS, cache))
            errors = {key: predicted[key] / measured[key] - 1 for key in BARS}
            line = {"shape": name, "size": asdict(size), "rows_equal_ezkls": True}
            lines.append({**line, "predicted": predicted, "measured": measured, "relative_errors": errors})
            shown = "  ".join(f"{key} {100 * error:+.1f} %" for key, error in errors.items())
            print(f"{name}: {size.rows} rows of 2^{size.logrows}: {shown}", flush=True)
    worst = {key: max(abs(line["relative_errors"][key]) for line in lines) for key in BARS}
    result = {
        "hardware": hardware(),
        # More than the number of cores means that other programs ran meanwhile.
        "load": os.getloadavg(),
        "bars": BARS,
        "worst_errors": worst,
        "met": {key: worst[key] <= bar for key, bar in BARS.items()},
        "calibration": asdict(calibration),
        "shapes": lines,
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(f"worst: {worst}\nwritten to {RESULT}")


if __name__ == "__main__":
    main()
