"""``mambaint inspect``: what a quantized model consists of."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from mamba_int.graph import Graph
    from quantize.summary import GraphSummary

_HEAD = ("tensor", "op", "shape", "interval", "bits", "zeros")


def _table(summary: GraphSummary) -> list[str]:
    rows = [_HEAD]
    for tensor in summary.tensors:
        rows.append(
            (
                tensor.name,
                tensor.op,
                "x".join(map(str, tensor.shape)),
                f"{tensor.low}..{tensor.high}",
                str(tensor.bits),
                "" if tensor.zero_share is None else f"{100 * tensor.zero_share:.1f}% {tensor.weights}",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEAD))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def _totals(graph: Graph, summary: GraphSummary) -> list[str]:
    counts = summary.per_token()
    lines = [
        ("task", str(graph.card.get("task", "not described"))),
        ("per token", ", ".join(f"{count:,.1f} {name}" for name, count in counts.items())),
        ("parameters", f"{summary.parameters:,} integers, {summary.size_bytes:,} bytes"),
        ("max bits", f"{summary.max_bits} hold every intermediate"),
        ("model id", summary.model_id),
    ]
    width = max(len(label) for label, _ in lines)
    return [f"{label:<{width}}  {value}" for label, value in lines]


@click.command("inspect")
@click.argument("model", metavar="[MODEL]", required=False, type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def command(model: Path | None, as_json: bool) -> None:
    """Show the tensors of a quantized model, their proven intervals, and what it costs to run.

    MODEL defaults to the one quantized last.
    """
    from mamba_int.graph import Graph
    from quantize.latest import resolve_model
    from quantize.summary import summarize

    graph = Graph.load(resolve_model(model))
    summary = summarize(graph)
    if as_json:
        tensors = [asdict(tensor) for tensor in summary.tensors]
        click.echo(json.dumps({**summary.to_dict(), "card": dict(graph.card), "tensors": tensors}, indent=2))
    else:
        click.echo("\n".join([*_table(summary), "", *_totals(graph, summary)]))
