"""``mambaint run``: execute a quantized model without proving it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from mamba_int.graph import Graph, IntArray


def _execute(graph: Graph, inputs: IntArray, backend: str) -> IntArray:
    """Integer logits of a batch."""
    if backend == "numpy":
        from mamba_int.interpreter import evaluate

        return evaluate(graph, inputs)
    if backend == "torch":
        import torch

        from mamba_int.executor import Executor

        torch.set_num_threads(1)
        logits: IntArray = Executor(graph)(torch.from_numpy(inputs)).numpy()
        return logits
    from circuits.runtime import OnnxRunner

    return OnnxRunner(graph)(inputs)


def _predicted(graph: Graph, logits: IntArray) -> str | None:
    classes = graph.card.get("classes")
    if not isinstance(classes, list) or logits.ndim != 1 or len(classes) != len(logits):
        return None
    return str(classes[int(logits.argmax())])


@click.command("run")
@click.option(
    "--input",
    "input_path",
    required=True,
    type=click.Path(path_type=Path),
    metavar="FILE.json",
    help='The input: {"input_data": [[...]]}.',
)
@click.option(
    "--model", type=click.Path(path_type=Path), metavar="MODEL", help="The model [default: quantized last]."
)
@click.option("--backend", type=click.Choice(["numpy", "torch", "onnx"]), default="numpy", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(input_path: Path, model: Path | None, backend: str, as_json: bool) -> None:
    """Run a quantized model on one input, without a proof. Every backend gives the same integers."""
    import time

    from mamba_int.graph import Graph
    from quantize.input_file import read_input
    from quantize.latest import resolve_model

    graph = Graph.load(resolve_model(model))
    inputs = read_input(input_path, graph)[None]
    start = time.perf_counter()
    logits = _execute(graph, inputs, backend)[0]
    seconds = time.perf_counter() - start
    result: dict[str, Any] = {
        "model_id": graph.model_id,
        "outputs": logits.tolist(),
        "logits": (logits * 2.0 ** -graph.by_name[graph.output].frac).tolist(),
        "predicted": _predicted(graph, logits),
        "backend": backend,
        "seconds": round(seconds, 4),
    }
    if as_json:
        click.echo(json.dumps(result))
        return
    if result["predicted"] is not None:
        click.echo(f"predicted  {json.dumps(result['predicted'])}")
    shown = " ".join(map(str, logits.ravel()[:32].tolist()))
    click.echo(f"outputs    {shown}{'' if logits.size <= 32 else f' ... ({logits.size} integers)'}")
    click.echo(f"model      {graph.model_id}")
    click.echo(f"backend    {backend}, {seconds:.3f} s")
