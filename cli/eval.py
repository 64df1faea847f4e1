"""``mambaint eval``: the quality of a model on a split of its data, or of data like it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    import torch

    from mamba_int.datasets import ClassificationData, TextData
    from mamba_int.training import Checkpoint, TrainableModel
    from mamba_int.training.evaluation import Predictor

Description = dict[str, Any]
"""Of a model: ``arithmetic``, ``model`` (its id, or the checkpoint's SHA-256), ``dataset`` (its name and
fingerprint), ``input`` (domain and scale of the features), ``tokens`` (of a language model, else 0)."""


def _load(path: Path, device: torch.device) -> tuple[Predictor, Description]:
    """The model of a graph or checkpoint file, and what it expects of data."""
    from mamba_int.executor import GraphPredictor
    from mamba_int.graph import Graph

    if path.suffix != ".safetensors":
        graph = Graph.load(path)
        return GraphPredictor(graph, device), {
            "arithmetic": "integer",
            "model": graph.model_id,
            "dataset": graph.card["dataset"],
            "scale": (graph.card["input"]["feature_offset"], graph.card["input"]["feature_scale"]),
            "tokens": 0 if graph.input.integer("features") else graph.input.integer("high") + 1,
        }
    from mamba_int.training import load_checkpoint
    from mamba_int.training.model_config import arithmetic_of

    checkpoint = load_checkpoint(path)
    data = checkpoint.data
    return _restored(checkpoint).to(device), {
        "arithmetic": arithmetic_of(checkpoint.model_config),
        "model": checkpoint.sha256,
        "dataset": {"name": data.name, "fingerprint": data.fingerprint, "source": data.source},
        "scale": (list(data.feature_offset), list(data.feature_scale)),
        "tokens": data.tokenizer.vocab_size if data.tokenizer else 0,
    }


def _restored(checkpoint: Checkpoint) -> TrainableModel:
    """The model of a checkpoint, native or float."""
    from mamba_int.config import MambaIntConfig
    from mamba_int.model import MambaInt
    from mamba_int.training.float_model import restored_float_model

    if not isinstance(checkpoint.model_config, MambaIntConfig):
        return restored_float_model(checkpoint)
    model = MambaInt(checkpoint.model_config)
    model.load_state_dict(checkpoint.model_state)
    return model


def _data(description: Description, path: Path | None) -> ClassificationData | TextData:
    """The data that is asked for, made sure to mean the same to the model as that of its training."""
    from mamba_int.datasets import DataSource, TextData, load_data, source_from_path
    from mamba_int.errors import MambaintError

    known = description["dataset"]
    if path is not None:
        source = source_from_path(path)
    elif "source" in known:
        source = known["source"]
    elif known["name"] in ("digits", "moby-dick"):
        source = DataSource(known["name"])
    else:
        raise MambaintError(
            f"the model was trained on '{known['name']}', which is not embedded", "give it with --data"
        )
    data = load_data(source)
    if isinstance(data, TextData):
        fits = data.vocab_size == description["tokens"]
    else:
        # The integers of the input are the features on this scale: on another they are another input.
        fits = not description["tokens"] and description["scale"] == (
            list(data.feature_offset),
            list(data.feature_scale),
        )
    if not fits:
        raise MambaintError(
            f"the data {data.name} is not on the scale, or in the tokens, of the model's own",
            "give the file of its training, or tokens of the same tokenizer",
        )
    return data


@click.command("eval")
@click.argument("model", metavar="[MODEL]", required=False, type=click.Path(path_type=Path))
@click.option(
    "--data",
    "data_path",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="Data [default: the model's own].",
)
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
    split: str,
    window: int,
    max_tokens: int | None,
    device: str,
    as_json: bool,
) -> None:
    """Measure a model: accuracy, or bits per byte.

    MODEL is a quantized model, a checkpoint (a float twin's too), or the folder of either [default: quantized
    last].

    \b
    Example:
      mambaint eval runs/char
      mambaint eval model.mint --split validation --json
    """
    import time

    import torch

    from mamba_int.device import resolve_device
    from mamba_int.training.evaluation import evaluate
    from quantize.latest import resolve_either

    torch.set_num_threads(1)
    chosen = resolve_device(device)
    predictor, description = _load(resolve_either(model), chosen)
    data = _data(description, data_path)
    start = time.perf_counter()
    score = evaluate(predictor, data, split, chosen, window, max_tokens)
    seconds = time.perf_counter() - start
    metric = "accuracy" if score.higher_is_better else "bits_per_byte"
    result = {
        metric: score.metric,
        "loss": score.loss,
        "split": split,
        "data": data.name,
        "arithmetic": description["arithmetic"],
        "model": description["model"],
        "seconds": round(seconds, 3),
    }
    if as_json:
        click.echo(json.dumps(result))
        return
    click.echo(f"{split} {metric.replace('_', ' '):<13} {score.metric:.4f}")
    click.echo(f"loss               {score.loss:.4f} nats")
    click.echo(f"data               {data.name}")
    click.echo(f"model              {description['model']} ({description['arithmetic']})")
