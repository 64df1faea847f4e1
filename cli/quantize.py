"""``mambaint quantize``: checkpoint to integer model, ONNX file and report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from mamba_int.graph import Graph, IntArray
    from quantize.equality import Equality

MOST_SEQUENCES = 2000
MOST_WINDOWS = 4
"""Test inputs on which the backends are compared: sequences to classify, windows of text."""


def _compare(graph: Graph, onnx: bytes, inputs: IntArray) -> Equality:
    """Compare PyTorch and ONNX Runtime with NumPy on every tensor, and the file itself on the logits."""
    from circuits.runtime import OnnxRunner
    from quantize.equality import compare, torch_tracer

    runner = OnnxRunner(graph)

    def onnx_tracer(batch: IntArray) -> dict[str, IntArray]:
        trace: dict[str, IntArray] = {}
        runner(batch, trace)
        return trace

    tracers = {"PyTorch": torch_tracer(graph), "ONNX Runtime": onnx_tracer}
    return compare(graph, inputs, tracers, {"model.onnx": OnnxRunner(onnx)})


def _require_equal(equality: Equality) -> None:
    from mamba_int.errors import MambaintError

    if equality.first is not None:
        backend, tensor = equality.first
        raise MambaintError(
            f"{backend} differs from the NumPy interpreter in {equality.mismatches} of {equality.values} "
            f"integers, first in '{tensor}'",
            "nothing was written; install the versions of constraints.txt and report this",
        )


def _show(result: dict[str, Any], equality: Equality) -> None:
    metric = "accuracy" if "test_accuracy" in result else "bits_per_byte"
    unit = metric.replace("_", " ")
    lines = [(f"test {unit}", f"{result[f'test_{metric}']:.4f}")]
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


@click.command("quantize")
@click.argument("checkpoint", metavar="[CKPT]", required=False, type=click.Path(path_type=Path))
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder for the result [default: quantized/ beside the checkpoint].",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(checkpoint: Path | None, out: Path | None, as_json: bool) -> None:
    """Turn a checkpoint into the integer model that is run and proved.

    CKPT defaults to that of the newest run. Writes model.mint, model.onnx, report.json, report.html and, for
    tokens of a BPE, tokenizer.json; nothing if NumPy, PyTorch and ONNX Runtime disagree in a single integer
    of any intermediate.
    """
    import time

    import torch

    from circuits.runtime import runtime_onnx
    from mamba_int.datasets import load_data, save_tokenizer
    from mamba_int.errors import MambaintError
    from mamba_int.files import write_bytes, write_json
    from mamba_int.training import load_checkpoint
    from quantize.latest import MODEL_FILE, remember_model, resolve_checkpoint
    from quantize.measurement import measure, sample_inputs
    from quantize.native import native_graph
    from quantize.page import render_page
    from quantize.report import make_report, twin_metric
    from quantize.summary import summarize

    torch.set_num_threads(1)
    start = time.perf_counter()
    path = resolve_checkpoint(checkpoint)
    loaded = load_checkpoint(path)
    graph = native_graph(loaded)
    data = load_data(loaded.data.source)
    if data.fingerprint() != loaded.data.fingerprint:
        raise MambaintError(
            f"the data {loaded.data.name} has changed since the training",
            "restore it, or train again with --restart",
        )
    onnx = runtime_onnx(graph)
    equality = _compare(graph, onnx, sample_inputs(graph, data, MOST_SEQUENCES, MOST_WINDOWS))
    _require_equal(equality)
    measurement = measure(graph, data, loaded.training_config.evaluation_length)
    twin = twin_metric(path, loaded)
    report = make_report(
        graph,
        summarize(graph),
        measurement,
        equality,
        loaded.results.get(f"test_{measurement.metric}"),
        twin,
    )
    page = render_page(report)

    folder = out if out is not None else path.parent / "quantized"
    write_bytes(folder / "model.onnx", onnx)
    write_json(folder / "report.json", report)
    write_bytes(folder / "report.html", page.encode())
    tokenizer = save_tokenizer(loaded.data.tokenizer, folder)
    graph.save(folder / MODEL_FILE)
    if out is None:
        remember_model(path, folder / MODEL_FILE)
    result = {
        "model_id": graph.model_id,
        "max_bits": graph.max_bits,
        "equal_numpy_torch_onnx": equality.equal,
        "values_compared": equality.values,
        f"test_{measurement.metric}": measurement.value,
        f"float_twin_{measurement.metric}": twin,
        "model": str(folder / MODEL_FILE),
        "onnx": str(folder / "model.onnx"),
        "tokenizer": str(tokenizer) if tokenizer else None,
        "report": str(folder / "report.html"),
        "seconds": round(time.perf_counter() - start, 2),
    }
    if as_json:
        click.echo(json.dumps(result, indent=2))
    else:
        _show(result, equality)
