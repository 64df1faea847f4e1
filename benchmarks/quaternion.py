"""The quaternion scan, and training of quaternion models beside our Mamba-2, on one GPU in one run.

``python -m benchmarks.quaternion`` prints a table and writes ``benchmarks/results/quaternion.json``. The
shape is that of the quaternion source: batch 4, sequence 2048, d_model 768, 12 layers, d_state 64,
vocabulary 10000.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import Row, ceilings, clean, differentiated, float_speed
from benchmarks.hardware import hardware
from mamba_int.datasets import load_data
from mamba_int.experiment import resolve
from mamba_int.files import write_json
from mamba_int.float_models.config import MambaConfig
from mamba_int.float_models.models import MambaForCausalLM
from mamba_int.float_models.quaternion_mamba2 import QUATERNION_PRESETS
from mamba_int.training import train
from triton_kernels.quaternion import cayley
from triton_kernels.quaternion_scan import CHUNK, quaternion_scan

RESULTS = Path(__file__).parent / "results" / "quaternion.json"
SHAPE = 4, 2048
BASE = QUATERNION_PRESETS["base"]
MAMBA2 = MambaConfig(mixer="mamba2", vocab_size=10000, d_model=768, n_layer=12, d_state=64, headdim=64)
CLAIM = 12_000.0
"""Tokens a second that the source claims for this shape on one RTX 4090, with 11.8 GB. Its kernels do not
compile and its model of this shape has 14.7 billion parameters, so it cannot have been run; the card is
another one too."""
CLAIM_NAME = "the source's claim, RTX 4090, not reproducible"


def scan_operands() -> list[Tensor]:
    """q, B, C, S and D of a layer of the base model."""
    batch, length = SHAPE
    groups, states, channels = BASE.n_groups, BASE.d_state, BASE.d_inner // BASE.n_groups

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda")

    z = 0.3 * random(batch, length, groups, 4, states)
    z[:, :, :, 0] = -z[:, :, :, 0].abs()
    B, C = (0.1 * random(batch, length, groups, 4, states).bfloat16() for _ in range(2))
    S = random(batch, length, groups, channels).bfloat16()
    z, B, C = (v.transpose(-1, -2) for v in (z, B, C))
    return [cayley(z), B, C, S, random(groups, channels)]


def scan_row(copy: float) -> Row:
    """Forward of the scan, with its bytes and operations; ``copy`` in GB/s."""
    operands = scan_operands()
    with torch.no_grad():
        results = quaternion_scan(*operands)
    moved = sum(v.numel() * v.element_size() for v in (*operands, *results))
    forward, both = differentiated(quaternion_scan, *operands)
    batch, length = SHAPE
    width, states = BASE.d_inner, BASE.d_state
    # reading the states, updating them, and products within a chunk
    operations = batch * length * width * (32 * states + 8 * states + 8 * CHUNK)
    detail = {
        "forward and backward": both,
        "megabytes": moved / 1e6,
        "share of copy": moved / forward / 1e6 / copy,
        "GFLOP": operations / 1e9,
        "TFLOP/s": operations / forward / 1e9,
    }
    return Row("quaternion scan forward, one layer", "ms", forward, detail=detail)


def training_rows() -> Iterator[Row]:
    """Whole training steps in bf16 mixed precision, beside Mamba-2 launched in the same way."""
    forms: dict[str, dict[str, Any]] = {
        "quaternion": {},
        "quaternion, selective axis": {"selective_axis": True},
        "quaternion lite": {"mixer": "quaternion_lite"},
    }
    for graph, mode in ((True, "as a CUDA graph"), (False, "eager")):
        peer, detail = float_speed(MAMBA2, SHAPE, graph)
        yield Row(f"train Mamba-2, {mode}", "tokens/s", peer, detail=detail | size(MAMBA2))
        for name, changes in forms.items():
            config = replace(BASE, **changes)
            speed, detail = float_speed(config, SHAPE, graph)
            detail |= size(config)
            yield Row(f"train {name}, {mode}", "tokens/s", speed, f"our Mamba-2, {mode}", peer, detail)
            if graph and not changes:
                yield Row(f"train {name}, {mode}", "tokens/s", speed, CLAIM_NAME, CLAIM, detail)


def char_rows() -> Iterator[Row]:
    """Bits per byte of the held-out tenth of Moby Dick, beside Mamba-2 of that size and that budget."""

    def trained(preset: str, **changes: Any) -> tuple[float, dict[str, float]]:
        experiment = resolve(preset)
        experiment.model.update(changes)
        data = load_data(experiment.source)
        config = experiment.model_config(data)
        assert isinstance(config, MambaConfig)
        with tempfile.TemporaryDirectory() as folder:
            result = train(config, experiment.training, data, experiment.source, Path(folder))
        found = {
            "best step": float(result.best_step),
            "training seconds": result.train_seconds,
        }
        return result.test_metric, found | size(config)

    peer, detail = trained("char-mamba2")
    yield Row("char-mamba2", "bits per byte", peer, detail=detail)
    for name, changes in (("", {}), (", selective axis", {"selective_axis": True})):
        bits, detail = trained("char-quaternion", **changes)
        yield Row(f"char-quaternion{name}", "bits per byte", bits, "char-mamba2", peer, detail)


def size(config: MambaConfig) -> dict[str, float]:
    """Parameters of a model."""
    with torch.device("meta"):
        return {"parameters": sum(p.numel() for p in MambaForCausalLM(config).parameters())}


def main() -> None:
    """Measure everything."""
    torch.manual_seed(0)
    rows: list[Row] = []

    def add(row: Row) -> None:
        rows.append(row)
        ratio = f"{row.ratio:6.2f} x {row.peer_name} ({row.peer:.4g})" if row.ratio else ""
        print(f"{row.name:58} {row.ours:10.4g} {row.unit:9} {ratio} {row.detail or ''}", flush=True)
        document = [asdict(r) | {"ratio": r.ratio} for r in rows]
        write_json(RESULTS, {"hardware": hardware(), "rows": document})

    for row in ceilings():
        add(row)
    clean()
    add(scan_row(rows[0].ours))
    clean()
    for row in training_rows():
        add(row)
    clean()
    for row in char_rows():
        add(row)


if __name__ == "__main__":
    main()
