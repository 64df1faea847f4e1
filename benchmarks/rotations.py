"""Which models compose rotations: the order of turns decides, and only a selective axis sees it.

``python -m benchmarks.rotations [--steps N] [--seeds N] [--length T] [--deviation RADIANS]`` trains small
classifiers of generated rigid bodies (``mamba_int.datasets.rotations``) on a CPU or a GPU, tests them on
bodies of that many steps, twice and four times as many, and writes ``benchmarks/results/rotations.json``.
Beside the models stand logistic regressions on features that know no order: the length of each step's
rotation vector, its three components, and the sum of all vectors.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.hardware import hardware
from mamba_int.datasets.records import ClassificationData
from mamba_int.datasets.rotations import (
    DEVIATION,
    STEPS,
    UNITS_PER_RADIAN,
    composed_rotations,
    load_rotations,
    nearest_axis,
    upright_axis,
)
from mamba_int.files import write_json
from mamba_int.float_models.config import MambaConfig
from mamba_int.float_models.models import MambaForSequenceClassification

RESULTS = Path(__file__).parent / "results" / "rotations.json"
BATCH = 128
FORMS: dict[str, dict[str, Any]] = {
    "quaternion, selective axis": {"mixer": "quaternion", "selective_axis": True},
    "quaternion, fixed axis": {"mixer": "quaternion"},
    "mamba2": {"mixer": "mamba2", "headdim": 8, "d_state": 32},
}


def config(form: dict[str, Any]) -> MambaConfig:
    """Two blocks of width 16; states of the same size in all forms."""
    values: dict[str, Any] = {
        "vocab_size": 1,
        "n_features": 3,
        "num_labels": 6,
        "d_model": 16,
        "n_layer": 2,
        "d_state": 8,
        "dropout": 0.0,
        "A_max": 2.0,
        "dt_max": 0.03,
    }
    return MambaConfig(**(values | form))


def radians(inputs: Tensor) -> Tensor:
    """What a model reads of the integers."""
    return inputs.float() / UNITS_PER_RADIAN


def prefix_labels(inputs: Tensor) -> Tensor:
    """The class after every step, int64 [n, T]: short bodies are learned first, and lead to longer ones."""
    vectors = radians(inputs).double().numpy()
    found = [
        nearest_axis(upright_axis(composed_rotations(vectors[:, : t + 1])))[0] for t in range(inputs.shape[1])
    ]
    return torch.from_numpy(np.stack(found, 1))


def accuracy(model: MambaForSequenceClassification, inputs: Tensor, labels: Tensor) -> float:
    """Share of bodies whose class is the largest logit."""
    model.eval()
    with torch.no_grad():
        right = sum(
            int((model(x)["logits"].argmax(-1) == y).sum())
            for x, y in zip(inputs.split(1000), labels.split(1000), strict=True)
        )
    return right / len(labels)


def train(
    form: dict[str, Any], data: ClassificationData, longer: list[ClassificationData], steps: int, seed: int
) -> dict[str, Any]:
    """Test accuracies after ``steps`` batches of bodies of random lengths; AdamW, cosine after a warmup."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(seed)
    model = MambaForSequenceClassification(config(form)).to(device)
    inputs, labels = radians(data.train_inputs).to(device), prefix_labels(data.train_inputs).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.01)
    began = time.perf_counter()
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        warm, rest = step / (0.1 * steps), step / steps
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * min(warm, 0.5 * (1 + math.cos(math.pi * rest)))
        rows = torch.randint(len(labels), (BATCH,), generator=generator)
        length = int(torch.randint(1, data.seq_len + 1, (), generator=generator))
        model.train()
        loss = model(inputs[rows, :length], labels=labels[rows, length - 1])["loss"]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return {
        "test accuracy": {
            tested.seq_len: accuracy(
                model, radians(tested.test_inputs).to(device), tested.test_labels.to(device)
            )
            for tested in (data, *longer)
        },
        "training accuracy": accuracy(model, inputs[:3000], labels[:3000, -1]),
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": time.perf_counter() - began,
    }


def logistic(features: Tensor, labels: Tensor, test_features: Tensor, test_labels: Tensor) -> float:
    """Test accuracy of a multinomial regression, by L-BFGS."""
    weight = torch.zeros(features.shape[1], 6, requires_grad=True)
    bias = torch.zeros(6, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(features @ weight + bias, labels) + 1e-4 * weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)
    return float(((test_features @ weight + bias).argmax(-1) == test_labels).float().mean())


def baselines(data: ClassificationData) -> dict[str, float]:
    """Logistic regressions on features without order."""
    features = {
        "vector norms": lambda x: x.norm(dim=-1),
        "components of every step": lambda x: x.flatten(1),
        "sum of all vectors": lambda x: x.sum(1),
    }
    return {
        name: logistic(
            feature(radians(data.train_inputs)),
            data.train_labels,
            feature(radians(data.test_inputs)),
            data.test_labels,
        )
        for name, feature in features.items()
    }


def main() -> None:
    """Train, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--length", type=int, default=STEPS)
    parser.add_argument("--deviation", type=float, default=DEVIATION)
    options = parser.parse_args()
    data, *longer = (load_rotations(n * options.length, 0, options.deviation) for n in (1, 2, 4))
    result: dict[str, Any] = {
        "steps": options.steps,
        "length": options.length,
        "deviation": options.deviation,
        "most frequent class": float(data.test_labels.bincount().max() / len(data.test_labels)),
        "logistic": baselines(data),
        "models": {},
    }
    for name, share in result["logistic"].items():
        print(f"logistic regression, {name:26} {share:.3f}", flush=True)
    for name, form in FORMS.items():
        runs = [train(form, data, longer, options.steps, seed) for seed in range(options.seeds)]
        result["models"][name] = runs
        means = (
            statistics.mean(run["test accuracy"][tested.seq_len] for run in runs)
            for tested in (data, *longer)
        )
        shares = "  ".join(f"{mean:.3f}" for mean in means)
        print(f"{name:28} {shares}  {runs[0]['seconds']:.0f} s", flush=True)
    write_json(RESULTS, result | {"hardware": hardware()})


if __name__ == "__main__":
    main()
