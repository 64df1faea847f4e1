"""``mambaint quantize``: checkpoint to integer model, ONNX file and report."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli.proving import activity

if TYPE_CHECKING:
    from torch import Tensor

    from mamba_int.datasets import ClassificationData, TextData
    from mamba_int.graph import Graph, IntArray
    from mamba_int.training import Checkpoint
    from mamba_int.training.evaluation import Score
    from quantize.calibration import FloatModel
    from quantize.comparison import Comparison
    from quantize.conversion_config import ConversionConfig, WeightForm
    from quantize.equality import Equality
    from quantize.float_checkpoint import FloatCheckpoint, FloatTask

MOST_SEQUENCES = 2000
MOST_WINDOWS = 4
"""Test inputs on which the backends are compared: sequences to classify, windows of text."""
LARGE_TEXT = 1 << 10
"""Models so large that fewer tokens are read to measure them are compared on one window, and on every tensor
at its first steps."""

Say = Callable[[str], None]


@dataclass(frozen=True, eq=False)
class Quantized:
    """An integer model before anything is written, whatever it was made from.

    Attributes:
        graph: the model. data: to measure it on. window: of text: tokens in which it is read.
        trained_metric: what training measured on the test split. twin_metric: of the float twin.
        comparison, float_score: of a converted model: beside the float model, and that on the test split.
    """

    graph: Graph
    data: ClassificationData | TextData
    window: int
    trained_metric: float | None = None
    twin_metric: float | None = None
    comparison: Comparison | None = None
    float_score: Score | None = None


@dataclass(frozen=True)
class ConversionOptions:
    """The options of the command that are of float checkpoints alone; see there."""

    data: Path | None
    format: str | None
    config: Path | None
    provable: bool
    samples: int | None
    seq_len: int | None
    weights: WeightForm | None
    reconstruct: bool
    finetune: int | None

    def given(self) -> list[str]:
        """Names of the options that were given."""
        return [f"--{name.replace('_', '-')}" for name, value in vars(self).items() if value]


def _native(path: Path, checkpoint: Checkpoint, options: ConversionOptions) -> Quantized:
    """The frozen integers of a run."""
    from mamba_int.datasets import load_data
    from mamba_int.errors import MambaintError
    from quantize.native import native_graph
    from quantize.report import twin_metric

    if options.given():
        raise MambaintError(
            f"{path} is of a native model, which is its frozen integers and is not converted",
            f"leave out {', '.join(options.given())}",
        )
    graph = native_graph(checkpoint)
    data = load_data(checkpoint.data.source)
    if data.fingerprint() != checkpoint.data.fingerprint:
        raise MambaintError(
            f"the data {checkpoint.data.name} has changed since the training",
            "restore it, or train again with --restart",
        )
    metric = "accuracy" if checkpoint.data.tokenizer is None else "bits_per_byte"
    trained = checkpoint.results.get(f"test_{metric}")
    window = checkpoint.training_config.evaluation_length
    return Quantized(graph, data, window, trained, twin_metric(path, checkpoint))


def _converted(checkpoint: FloatCheckpoint, options: ConversionOptions, say: Say) -> Quantized:
    """The integers that a float model is converted to, and both models side by side."""
    import torch

    from mamba_int.errors import MambaintError
    from mamba_int.training import evaluate
    from quantize.comparison import compare_with_float
    from quantize.float_checkpoint import pair_with_data
    from quantize.float_mamba import convert
    from quantize.measurement import sample_inputs, text_tokens

    def told(what: str) -> Callable[[int, int], None]:
        return lambda done, total: say(f"{what}, {done} of {total}")

    config = _conversion_config(options)
    task = pair_with_data(checkpoint, options.data)
    model = task.model
    if options.finetune is not None:
        if config.weights != "ternary":
            raise MambaintError("--finetune is for ternary weights", "add --weights ternary")
        model = _finetuned(task, options.finetune, say)
    integers = task.calibration(options.samples, config.seq_len or None)
    card = task.card(config.seq_len or integers.shape[1])
    if options.finetune is not None:
        card["finetune_steps"] = options.finetune
    say(f"calibrating on {len(integers)} inputs")
    conversion = convert(model, task.inputs(integers), task.input_format, config, card, told("converting"))
    graph = conversion.graph
    say("scoring the float model")
    tokens = text_tokens(graph)
    window = min(task.evaluation_window, tokens)
    score = evaluate(task, task.data, "test", torch.device("cpu"), window, tokens)
    shown = sample_inputs(graph, task.data, MOST_SEQUENCES, _windows(graph))
    inputs = task.inputs(torch.from_numpy(shown))
    comparison = compare_with_float(conversion, model, inputs, shown, told("comparing with the floats"))
    trained = None if checkpoint.run is None else checkpoint.run.results.get(_test_key(score))
    return Quantized(graph, task.data, task.evaluation_window, trained, None, comparison, score)


def _finetuned(task: FloatTask, steps: int, say: Say) -> FloatModel:
    """The model with ternary projections after so many steps of distillation from itself."""
    import copy

    from mamba_int.device import resolve_device
    from mamba_int.training import TrainingConfig
    from mamba_int.training.batches import make_batches
    from quantize.finetuning import FinetuneConfig, finetune

    device = resolve_device("auto")
    run = task.checkpoint.run
    batches = make_batches(task.data, TrainingConfig() if run is None else run.training_config, device)

    def batch(step: int) -> tuple[Tensor, Tensor]:
        inputs, targets = batches.at(step)
        return task.inputs(inputs), targets

    def told(done: int, total: int, loss: float) -> None:
        say(f"fine-tuning, step {done} of {total}, loss {loss:.3f}")

    # A copy: the float model is compared and scored where it is.
    teacher = copy.deepcopy(task.model).to(device)
    return finetune(teacher, batch, FinetuneConfig(steps=steps), told).cpu()


def _test_key(score: Score) -> str:
    return "test_accuracy" if score.higher_is_better else "test_bits_per_byte"


def _conversion_config(options: ConversionOptions) -> ConversionConfig:
    """The bits that the options ask for: of the file over those of --provable, and --seq-len over both."""
    from dataclasses import asdict

    from mamba_int.config import dataclass_from_dict
    from mamba_int.errors import MambaintError
    from mamba_int.files import read_toml
    from quantize.conversion_config import PROVABLE, ConversionConfig

    values = asdict(PROVABLE if options.provable else ConversionConfig())
    if options.config is not None:
        tables = read_toml(options.config, "give a TOML file with a table [conversion]")
        table = tables.pop("conversion", {})
        if tables or not isinstance(table, dict):
            raise MambaintError(
                f"{options.config} holds more than a table [conversion]: {', '.join(tables) or 'conversion'}",
                "put the settings under [conversion]",
            )
        values |= table
    if options.seq_len is not None:
        values["seq_len"] = options.seq_len
    if options.weights is not None:
        values["weights"] = options.weights
    if options.reconstruct:
        values["reconstruct"] = True
    return dataclass_from_dict(ConversionConfig, values, "[conversion]")


def _windows(graph: Graph) -> int:
    from quantize.measurement import text_tokens

    return MOST_WINDOWS if text_tokens(graph) >= LARGE_TEXT else 1


def _compare(graph: Graph, onnx: bytes, inputs: IntArray) -> Equality:
    """Compare PyTorch and ONNX Runtime with NumPy on every tensor, and the file itself on the logits."""
    from circuits.runtime import OnnxRunner
    from quantize.equality import compare, joined, torch_tracer

    short = _traced(graph)
    steps = inputs[:, : short.seq_len]
    # One after the other: large models fit the memory once, not three times.
    return joined(
        [
            compare(short, steps, {"PyTorch": torch_tracer(short)}),
            compare(short, steps, {"ONNX Runtime": OnnxRunner(short)}),
            compare(graph, inputs, {}, {"model.onnx": OnnxRunner(onnx)}),
        ]
    )


def _traced(graph: Graph) -> Graph:
    """The graph at the steps at which every tensor is compared: of large models a chunk and one more."""
    from quantize.measurement import text_tokens

    if text_tokens(graph) >= LARGE_TEXT:
        return graph
    chunk = max((node.integer("chunk_size") for node in graph.nodes if node.op == "ssd"), default=1)
    return replace(graph, seq_len=chunk + 1) if graph.seq_len > chunk + 1 else graph


def _require_equal(equality: Equality) -> None:
    from mamba_int.errors import MambaintError

    if equality.first is not None:
        backend, tensor = equality.first
        raise MambaintError(
            f"{backend} differs from the NumPy interpreter in {equality.mismatches} of {equality.values} "
            f"integers, first in '{tensor}'",
            "nothing was written; install the versions of constraints.txt and report this",
        )


def _show(result: dict[str, Any], report: dict[str, Any], equality: Equality) -> None:
    from quantize.comparison_text import comparison_values, worst_layers

    metric = "accuracy" if "test_accuracy" in result else "bits_per_byte"
    unit = metric.replace("_", " ")
    converted = report["comparison"] is not None
    lines = comparison_values(report) if converted else [(f"test {unit}", f"{result[f'test_{metric}']:.4f}")]
    if result[f"float_twin_{metric}"] is not None:
        lines.append((f"float twin, test {unit}", f"{result[f'float_twin_{metric}']:.4f}"))
    lines += [
        (
            "NumPy = PyTorch = ONNX",
            f"{equality.values:,} integers compared on {equality.inputs} test inputs, 0 differ",
        ),
        ("widest intermediate", f"{result['max_bits']} bits"),
        ("model id", result["model_id"]),
        *((name, result[name]) for name in ("model", "onnx", "tokenizer", "report") if result[name]),
    ]
    width = max(len(label) for label, _ in lines)
    for label, value in lines:
        click.echo(f"{label:<{width}}  {value}")
    if converted:
        click.echo("\n" + "\n".join(worst_layers(report)))


@click.command("quantize")
@click.argument("checkpoint", metavar="[CKPT]", required=False, type=click.Path(path_type=Path))
@click.option(
    "--data",
    "data_path",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="Float models: to calibrate and measure on [default: the data of the training].",
)
@click.option("--format", "format_name", metavar="NAME", help="Of a foreign checkpoint [default: looked at].")
@click.option(
    "--config",
    "config_path",
    type=click.Path(path_type=Path),
    metavar="FILE.toml",
    help="Float models: a table [conversion] of bits and scales.",
)
@click.option("--provable", is_flag=True, help="Float models: bits made for small circuits.")
@click.option(
    "--samples",
    type=click.IntRange(min=1),
    help="Float models: most sequences to calibrate on [default: 256, or 64 windows of text].",
)
@click.option(
    "--seq-len",
    type=click.IntRange(min=1),
    help="Float language models: steps that are exported and proved [default: those of the training].",
)
@click.option(
    "--weights",
    type=click.Choice(["int8", "ternary"]),
    help="Float models: integers of the projections [default: int8].",
)
@click.option(
    "--reconstruct",
    is_flag=True,
    help="Float models: choose these integers by what the layers make of the calibration data.",
)
@click.option(
    "--finetune",
    type=click.IntRange(min=1),
    metavar="N",
    help="Float models, --weights ternary: N steps of distillation from the float model first.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder for the result [default: quantized/ beside the checkpoint].",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(
    checkpoint: Path | None,
    data_path: Path | None,
    format_name: str | None,
    config_path: Path | None,
    provable: bool,
    samples: int | None,
    seq_len: int | None,
    weights: WeightForm | None,
    reconstruct: bool,
    finetune: int | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """Turn a checkpoint into the integer model that is run and proved.

    CKPT is a run of mambaint train [default: the newest], or a float Mamba of another program: a folder with
    config.json, or a safetensors, PyTorch or npz file; those need --data. Float models are calibrated and
    converted.

    Writes model.mint, model.onnx, report.json, report.html and, for tokens of a BPE, tokenizer.json; nothing
    if NumPy, PyTorch and ONNX Runtime disagree in a single integer of any intermediate.

    \b
    Example:
      mambaint quantize runs/digits-mamba2 --provable
      mambaint quantize runs/char-mamba2 --weights ternary --finetune 1000
      mambaint quantize mamba-130m-hf --data text.txt --seq-len 64
    """
    import time

    import torch

    from circuits.runtime import runtime_onnx
    from mamba_int.config import MambaIntConfig
    from mamba_int.datasets import TextData, save_tokenizer
    from mamba_int.files import write_bytes, write_json
    from mamba_int.training import load_checkpoint
    from quantize.float_checkpoint import is_foreign, read_float_checkpoint, run_checkpoint
    from quantize.latest import MODEL_FILE, remember_model, resolve_checkpoint
    from quantize.measurement import measure, sample_inputs
    from quantize.page import render_page
    from quantize.report import make_report
    from quantize.summary import summarize

    torch.set_num_threads(1)
    start = time.perf_counter()
    options = ConversionOptions(
        data_path, format_name, config_path, provable, samples, seq_len, weights, reconstruct, finetune
    )
    foreign = checkpoint is not None and (format_name is not None or is_foreign(checkpoint))
    with activity(as_json) as say:
        say("reading the checkpoint")
        if foreign and checkpoint is not None:
            path = checkpoint
            found = _converted(read_float_checkpoint(path, format_name), options, say)
        else:
            path = resolve_checkpoint(checkpoint)
            loaded = load_checkpoint(path)
            if isinstance(loaded.model_config, MambaIntConfig):
                found = _native(path, loaded, options)
            else:
                found = _converted(run_checkpoint(path, loaded), options, say)
        graph, data = found.graph, found.data
        say("writing ONNX")
        onnx = runtime_onnx(graph)
        say("comparing NumPy, PyTorch and ONNX Runtime")
        equality = _compare(graph, onnx, sample_inputs(graph, data, MOST_SEQUENCES, _windows(graph)))
        _require_equal(equality)
        say("measuring the integer model")
        measurement = measure(graph, data, found.window)
        content = graph.encoded()
        report = make_report(
            graph,
            summarize(graph),
            measurement,
            equality,
            found.trained_metric,
            found.twin_metric,
            found.comparison,
            found.float_score,
            len(content),
        )
        page = render_page(report)

    beside = path if path.is_dir() else path.parent
    folder = out if out is not None else beside / "quantized"
    write_bytes(folder / "model.onnx", onnx)
    write_json(folder / "report.json", report)
    write_bytes(folder / "report.html", page.encode())
    tokenizer = save_tokenizer(data.tokenizer if isinstance(data, TextData) else None, folder)
    write_bytes(folder / MODEL_FILE, content)
    if out is None:
        remember_model(path, folder / MODEL_FILE)
    metric = measurement.metric
    result = {
        "model_id": graph.model_id,
        "max_bits": graph.max_bits,
        "equal_numpy_torch_onnx": equality.equal,
        "values_compared": equality.values,
        f"test_{metric}": measurement.value,
        f"float_twin_{metric}": found.twin_metric,
        "model": str(folder / MODEL_FILE),
        "onnx": str(folder / "model.onnx"),
        "tokenizer": str(tokenizer) if tokenizer else None,
        "report": str(folder / "report.html"),
        "seconds": round(time.perf_counter() - start, 2),
    }
    if found.float_score is not None:
        result |= {f"float_{metric}": found.float_score.metric}
    if as_json:
        click.echo(json.dumps(result, indent=2))
    else:
        _show(result, report, equality)
