"""Which models compose rotations: the order of turns decides, and only a selective axis sees it.

``python -m benchmarks.rotations [--tasks NAME ...] [--forms NAME ...] [--steps N] [--seeds N] [--length T]
[--workers N]`` trains small classifiers to say, after every step, how a body stands that has turned by the
rotation vectors so far (``TASKS``), tests what they say at the end of sequences of that many steps, twice and
four times as many, and writes ``benchmarks/results/rotations.json``. All forms have at least the parameters
of the selective one.

With a selective axis the state h_t = q_t h_{t-1} is a product of any unit quaternions: with Re z -> 0, Im z =
2 tan(phi / 4) u is the rotor of a turn by phi about u (``cayley`` turns h by half of phi, h v h* turns v by
all of it). So one layer can hold the rotor, and its read-out, which is linear, can tell the elements of a
finite group of rotors apart: argmax <h, g>. Two rotors, g and -g, are one orientation, which is not linear in
h: that takes a second layer. With a fixed axis the q_t of a state commute, and the layer is two complex
diagonal scans; those, and Mamba-2, are in TC0 at logarithmic precision, whatever their number of layers
(Merrill, Petty and Sabharwal 2024, arXiv 2404.08819), while the words of the icosahedral group, which is not
solvable, are complete for NC1 (Barrington 1989).

Beside the models stand logistic regressions on features that know no order: the length of each step's
rotation vector, its three components, and the sum of all vectors.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.hardware import hardware
from mamba_int.datasets.assembly import Floats, Integers
from mamba_int.datasets.rotations import QUARTER_TURNS, composed_rotations, nearest_axis
from mamba_int.files import write_json
from mamba_int.float_models.config import MambaConfig
from mamba_int.float_models.models import MambaForSequenceClassification
from mamba_int.training.captured import CapturedBackward
from mamba_int.training.schedule import learning_rate_factor

RESULTS = Path(__file__).parent / "results" / "rotations.json"
BATCH = 128
TESTED = 2000
LONGER = (1, 2, 4)
LEARNING_RATE = 1e-2
DEVIATION = 0.4
"""Of each component of a step's rotation vector of the task ``bodies``, in radians."""
CLOSE = 1e-9

Draw = Callable[[np.random.Generator, int, int], Floats]
Label = Callable[[Floats], Integers]


@dataclass(frozen=True)
class Task:
    """What is to be told of a turned body.

    Attributes:
        draw: rotation vectors [n, T, 3] in radians, by a generator, n and T.
        label: classes [...] of unit quaternions [..., 4].
        classes: how many.
    """

    draw: Draw
    label: Label
    classes: int


def chosen_turns(turns: Floats) -> Draw:
    """Every step is one of these rotation vectors [k, 3], each as likely."""
    return lambda generator, count, steps: turns[generator.integers(len(turns), size=(count, steps))]


def group_of(turns: Floats) -> Floats:
    """All products of the rotors of these rotation vectors, [elements, 4]; they must be finitely many."""
    elements = [np.array([1.0, 0.0, 0.0, 0.0])]
    vectors = [np.zeros(3)]
    for i in range(10_000):
        if i == len(elements):
            return np.stack(elements)
        # The vector of an element and one more turn
        angle = 2 * math.atan2(float(np.linalg.norm(elements[i][1:])), float(elements[i][0]))
        axis = elements[i][1:] / max(float(np.linalg.norm(elements[i][1:])), CLOSE)
        vectors[i] = angle * axis
        for turn in turns:
            product = composed_rotations(np.stack([vectors[i], turn])[None])[0, -1]
            if max(element @ product for element in elements) < 1 - CLOSE:
                elements.append(product)
                vectors.append(np.zeros(3))
    raise ValueError("the turns make no small group")


def rotors(turns: Floats) -> Task:
    """Which element of their group the turns have made: g and -g are two."""
    elements = group_of(turns)
    return Task(chosen_turns(turns), lambda turned: (turned @ elements.T).argmax(-1), len(elements))


def orientations(turns: Floats) -> Task:
    """How the body stands after them: g and -g are one."""
    elements = group_of(turns)
    first = np.argmax(np.abs(elements @ elements.T) > 1 - CLOSE, axis=1)
    kept = elements[np.unique(first)]
    return Task(chosen_turns(turns), lambda turned: np.abs(turned @ kept.T).argmax(-1), len(kept))


def upright(draw: Draw) -> Task:
    """Which of six axes the body's z axis points to, or is nearest to."""
    return Task(draw, nearest_axis, 6)


def _turn(axis: Sequence[float], angle: float) -> Floats:
    return angle * np.array(axis) / np.linalg.norm(axis)


QUARTERS = math.pi / 2 * QUARTER_TURNS
GOLDEN = (1 + math.sqrt(5)) / 2
ICOSAHEDRAL = np.stack([_turn((0, 1, GOLDEN), 2 * math.pi / 5), _turn((1, 1, 1), 2 * math.pi / 3)])
TASKS: dict[str, Callable[[], Task]] = {
    # one axis, one direction, a quarter or a half turn: they commute, and a fixed axis can follow
    "one axis": lambda: rotors(np.array([[0, 0, math.pi / 2], [0, 0, math.pi]])),
    # quarter turns about three axes: 48 rotors, 24 orientations, 6 sides
    "octahedral": lambda: rotors(QUARTERS),
    "orientation": lambda: orientations(QUARTERS),
    "upright": lambda: upright(chosen_turns(QUARTERS)),
    # a fifth about a vertex and a third about a face of the icosahedron: 120 rotors
    "icosahedral": lambda: rotors(np.concatenate([ICOSAHEDRAL, -ICOSAHEDRAL])),
    # any axis and angle; which side is nearest to up
    "bodies": lambda: upright(lambda g, count, steps: DEVIATION * g.standard_normal((count, steps, 3))),
}
_SELECTIVE = {"mixer": "quaternion", "selective_axis": True, "d_state": 8}
_FIXED = {"mixer": "quaternion", "d_state": 11}
_MAMBA2 = {"mixer": "mamba2", "headdim": 8, "d_state": 64, "expand": 6.0}
FORMS: dict[str, dict[str, Any]] = {
    f"{name}, {layers} layer{'s' if layers > 1 else ''}": form | {"n_layer": layers}
    for name, form in (("selective axis", _SELECTIVE), ("fixed axis", _FIXED), ("mamba2", _MAMBA2))
    for layers in (1, 2)
}


@cache
def task_of(name: str) -> Task:
    """A task by its name."""
    return TASKS[name]()


def config(form: dict[str, Any], classes: int) -> MambaConfig:
    """Width 16. States begin slow (small A and dt), so that what they hold lasts."""
    values: dict[str, Any] = {
        "vocab_size": 1,
        "n_features": 3,
        "num_labels": classes,
        "d_model": 16,
        "dropout": 0.0,
        "A_max": 2.0,
        "dt_max": 0.03,
    }
    return MambaConfig(**(values | form))


def sequences(task: Task, generator: np.random.Generator, count: int, steps: int) -> tuple[Tensor, Tensor]:
    """What a body's gyroscope reads, in quarter turns, float32 [n, 1 + T, 3], at rest at first; and the
    classes after every turn, int64 [n, T]."""
    vectors = task.draw(generator, count, steps)
    labels = task.label(composed_rotations(vectors))
    read = np.concatenate([np.zeros((count, 1, 3)), vectors / (math.pi / 2)], 1)
    return torch.from_numpy(read).float(), torch.from_numpy(labels)


def every_step(model: MambaForSequenceClassification, inputs: Tensor) -> Tensor:
    """Logits after every turn, [n, T, classes]."""
    logits: Tensor = model.classifier(model.backbone(inputs))[:, 1:]
    return logits


@dataclass(frozen=True)
class Job:
    """One model to train.

    Attributes:
        task, form: names. steps: batches. length: turns of a training sequence. seed: of all.
    """

    task: str
    form: str
    steps: int
    length: int
    seed: int


def train(job: Job) -> dict[str, Any]:
    """Test accuracies at the end of sequences, by their length; AdamW, cosine after a warmup."""
    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    task = task_of(job.task)
    torch.manual_seed(job.seed)
    model = MambaForSequenceClassification(config(FORMS[job.form], task.classes)).to(device)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=0.0, fused=device == "cuda")

    def backward(inputs: Tensor, labels: Tensor, _share: float) -> tuple[Tensor, Tensor]:
        logits = every_step(model, inputs)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach(), (logits.argmax(-1) == labels).sum()

    captured = CapturedBackward(backward, parameters)
    generator = np.random.default_rng([job.seed, 1])
    began = time.perf_counter()
    for step in range(job.steps):
        inputs, labels = (x.to(device) for x in sequences(task, generator, BATCH, job.length))
        optimizer.zero_grad(set_to_none=device == "cpu")
        if device == "cuda":
            captured(inputs, labels, 1.0, ())
        else:
            backward(inputs, labels, 1.0)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * learning_rate_factor(step, job.steps, job.steps // 20, "cosine")
        optimizer.step()
    return {
        "test accuracy": {str(n * job.length): accuracy(model, task, n * job.length) for n in LONGER},
        "parameters": sum(p.numel() for p in parameters),
        "seconds": time.perf_counter() - began,
    }


def accuracy(model: MambaForSequenceClassification, task: Task, length: int) -> float:
    """Share of test sequences whose class at the end is the largest logit."""
    inputs, labels = sequences(task, np.random.default_rng([length, 2]), TESTED, length)
    device = next(model.parameters()).device
    with torch.no_grad():
        found = torch.cat([every_step(model, x.to(device))[:, -1].argmax(-1) for x in inputs.split(500)])
    return float((found.cpu() == labels[:, -1]).double().mean())


def logistic(features: Tensor, labels: Tensor, test_features: Tensor, test_labels: Tensor) -> float:
    """Test accuracy of a multinomial regression, by L-BFGS."""
    classes = int(labels.max()) + 1
    weight = torch.zeros(features.shape[1], classes, requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=50, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(features @ weight + bias, labels) + 1e-4 * weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)
    return float(((test_features @ weight + bias).argmax(-1) == test_labels).float().mean())


def baselines(task: Task, length: int) -> dict[str, float]:
    """Logistic regressions on features without order, and the most frequent class."""
    features: dict[str, Callable[[Tensor], Tensor]] = {
        "vector norms": lambda x: x.norm(dim=-1),
        "components of every step": lambda x: x.flatten(1),
        "sum of all vectors": lambda x: x.sum(1),
    }
    (inputs, labels), (test_inputs, test_labels) = (
        sequences(task, np.random.default_rng([length, part]), 5 * TESTED, length) for part in (3, 2)
    )
    found = {
        name: logistic(feature(inputs), labels[:, -1], feature(test_inputs), test_labels[:, -1])
        for name, feature in features.items()
    }
    return found | {"most frequent class": float(test_labels[:, -1].bincount().max() / len(test_labels))}


def main() -> None:
    """Train, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--forms", nargs="+", choices=list(FORMS), default=list(FORMS))
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--length", type=int, default=16)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    result: dict[str, Any] = {
        "steps": options.steps,
        "length": options.length,
        "tasks": {
            name: {
                "classes": task_of(name).classes,
                "logistic": baselines(task_of(name), options.length),
                "models": {},
            }
            for name in options.tasks
        },
    }
    for name, found in result["tasks"].items():
        scores = ", ".join(f"{feature} {share:.3f}" for feature, share in found["logistic"].items())
        print(f"{name}: {scores}", flush=True)
    with ProcessPoolExecutor(options.workers, get_context("spawn")) as pool:
        runs = {
            (task, form): [
                pool.submit(train, Job(task, form, options.steps, options.length, seed))
                for seed in range(options.seeds)
            ]
            for task in options.tasks
            for form in options.forms
        }
        for (task, form), futures in runs.items():
            done = [future.result() for future in futures]
            result["tasks"][task]["models"][form] = done
            lengths = done[0]["test accuracy"]
            means = (statistics.mean(run["test accuracy"][n] for run in done) for n in lengths)
            least = (min(run["test accuracy"][n] for run in done) for n in lengths)
            shares = "  ".join(f"{mean:.3f} ({low:.3f})" for mean, low in zip(means, least, strict=True))
            numbers = f"{done[0]['parameters']:6} parameters  {done[0]['seconds']:.0f} s"
            print(f"{task:12} {form:24} {shares}  {numbers}", flush=True)
            write_json(options.output, result | {"hardware": hardware()})


if __name__ == "__main__":
    main()
