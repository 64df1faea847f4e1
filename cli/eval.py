"""``mambaint eval``: the quality of a model on a split of its data, or of data like it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    import torch

    from mamba_int.datasets import ClassificationData, TextData
    from mamba_int.training.evaluation import Predictor


@dataclass(frozen=True, eq=False)
class Subject:
    """What is scored.

    Attributes:
        predictor: the model, on its device. data: to score it on.
        arithmetic: ``integer`` or ``float``.
        model: id of a graph; SHA-256 of a checkpoint.
    """

    predictor: Predictor
    data: ClassificationData | TextData
    arithmetic: str
    model: str


def _graph(path: Path, data: Path | None, device: torch.device) -> Subject:
    """A quantized model."""
    from mamba_int.executor import GraphPredictor
    from mamba_int.graph import Graph
    from quantize.input_file import scaling
    from quantize.model_data import ModelInputs, load_model_data

    graph = Graph.load(path)
    features = graph.input.integer("features")
    known = graph.card.get("dataset")
    name = str(known["name"]) if isinstance(known, dict) and "name" in known else "data unknown"
    scale = scaling(graph) or ([0.0] * features, [1.0] * features)
    tokens = 0 if features else graph.input.integer("high") + 1
    inputs = ModelInputs(name, None, scale, tokens, path.parent)
    return Subject(GraphPredictor(graph, device), load_model_data(inputs, data), "integer", graph.model_id)


def _run(path: Path, data: Path | None, device: torch.device) -> Subject:
    """A checkpoint of ``mambaint train``, native or float."""
    from mamba_int.config import MambaIntConfig
    from mamba_int.model import MambaInt
    from mamba_int.training import load_checkpoint
    from quantize.float_checkpoint import pair_with_data, run_checkpoint
    from quantize.model_data import ModelInputs, load_model_data

    checkpoint = load_checkpoint(path)
    if not isinstance(checkpoint.model_config, MambaIntConfig):
        task = pair_with_data(run_checkpoint(path, checkpoint), data)
        return Subject(task.to(device), task.data, "float", checkpoint.sha256)
    inputs = ModelInputs.of_checkpoint(checkpoint, path.parent)
    model = MambaInt(checkpoint.model_config)
    model.load_state_dict(checkpoint.model_state)
    arithmetic = checkpoint.model_config.arithmetic
    return Subject(model.to(device), load_model_data(inputs, data), arithmetic, checkpoint.sha256)


def _foreign(path: Path, data: Path | None, format: str | None, device: torch.device) -> Subject:
    """A float checkpoint of another program."""
    from quantize.float_checkpoint import pair_with_data, read_float_checkpoint

    checkpoint = read_float_checkpoint(path, format)
    task = pair_with_data(checkpoint, data)
    return Subject(task.to(device), task.data, "float", checkpoint.sha256)


def _is_foreign(path: Path, format: str | None) -> bool:
    from quantize.float_checkpoint import is_foreign
    from quantize.latest import MODEL_FILE

    if format is not None:
        return True
    return not (path / MODEL_FILE).is_file() and is_foreign(path)


@click.command("eval")
@click.argument("model", metavar="[MODEL]", required=False, type=click.Path(path_type=Path))
@click.option(
    "--data",
    "data_path",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="Data [default: the model's own].",
)
@click.option("--format", "format_name", metavar="NAME", help="Of a foreign checkpoint [default: looked at].")
@click.option(
    "--split", type=click.Choice(["train", "validation", "test"]), default="test", show_default=True
)
@click.option(
    "--window", type=click.IntRange(min=1), default=1024, show_default=True, help="Text: tokens per window."
)
@click.option("--max-tokens", type=click.IntRange(min=1), help="Text: about so many, spread evenly.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(
    model: Path | None,
    data_path: Path | None,
    format_name: str | None,
    split: str,
    window: int,
    max_tokens: int | None,
    device: str,
    as_json: bool,
) -> None:
    """Measure a model: accuracy, or bits per byte.

    MODEL is a quantized model, a checkpoint (a float model's or twin's too), or the folder of either
    [default: quantized last]; or a float Mamba of another program, which needs --data.

    \b
    Example:
      mambaint eval runs/char
      mambaint eval model.mint --split validation --json
      mambaint eval mamba-130m-hf --data text.txt
    """
    import time

    import torch

    from mamba_int.device import resolve_device
    from mamba_int.training.evaluation import evaluate
    from quantize.latest import resolve_either

    torch.set_num_threads(1)
    chosen = resolve_device(device)
    if model is not None and _is_foreign(model, format_name):
        subject = _foreign(model, data_path, format_name, chosen)
    else:
        path = resolve_either(model)
        load = _run if path.suffix == ".safetensors" else _graph
        subject = load(path, data_path, chosen)
    data = subject.data
    start = time.perf_counter()
    score = evaluate(subject.predictor, data, split, chosen, window, max_tokens)
    seconds = time.perf_counter() - start
    metric = "accuracy" if score.higher_is_better else "bits_per_byte"
    result = {
        metric: score.metric,
        "loss": score.loss,
        "split": split,
        "data": data.name,
        "arithmetic": subject.arithmetic,
        "model": subject.model,
        "seconds": round(seconds, 3),
    }
    if as_json:
        click.echo(json.dumps(result))
        return
    click.echo(f"{split} {metric.replace('_', ' '):<13} {score.metric:.4f}")
    click.echo(f"loss               {score.loss:.4f} nats")
    click.echo(f"data               {data.name}")
    click.echo(f"model              {subject.model} ({subject.arithmetic})")
