"""``mambaint estimate``: what proving a model will cost on this machine, before any key is made."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli.proving import activity, circuit_options

if TYPE_CHECKING:
    from circuits.breakdown import Share

_BAR = 32


def _bars(title: str, rows: Sequence[tuple[str, str, float]], total: float) -> None:
    """One table with a bar for every line."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("layer")
    table.add_column("operation")
    table.add_column("rows", justify="right")
    table.add_column("share", justify="right")
    table.add_column("")
    largest = max(count for _, _, count in rows)
    for layer, operation, count in rows:
        shown, share = f"{count:,.1f}".removesuffix(".0"), f"{100 * count / total:.1f} %"
        table.add_row(layer, operation, shown, share, "█" * max(1, round(_BAR * count / largest)))
    Console().print(table)


def _show(result: dict[str, Any], shares: Sequence[Share]) -> None:
    from circuits.breakdown import totals

    split = totals((f"{share.layer}\t{share.operation}", share.rows) for share in shares)
    lines = []
    for name, count in split.items():
        layer, operation = name.split("\t")
        lines.append((layer, operation, count))
    # Layers in the order of the graph, the dearest operation of each first.
    order = list(result["rows_by_layer"])
    lines.sort(key=lambda line: (order.index(line[0]), -line[2]))
    _bars("Rows by layer and operation", lines, result["rows"])
    click.echo()
    if sum(layer.startswith("layer") for layer in order) > 1:
        by_operation = sorted(result["rows_by_operation"].items(), key=lambda item: -item[1])
        _bars("Rows by operation", [("all", *item) for item in by_operation], result["rows"])
        click.echo()
    seconds = {name: result[f"{name}_seconds"] for name in ("keygen", "prove")}
    peaks = {name: result[f"{name}_peak_bytes"] / 1e6 for name in ("setup", "prove")}
    for label, text in (
        ("rows", f"{result['rows']:,} of 2^{result['logrows']} ({result['public_values']:,} public values)"),
        ("keys", f"{seconds['keygen']:.1f} s, {peaks['setup']:,.0f} MB, made once"),
        ("proof", f"{seconds['prove']:.1f} s, {peaks['prove']:,.0f} MB, {result['proof_bytes']:,} bytes"),
        ("verifying", f"{result['verify_seconds'] * 1000:.0f} ms"),
        ("on disk", f"{result['proving_key_bytes'] / 1e6:,.0f} MB of proving key"),
        ("model", result["model_id"]),
    ):
        click.echo(f"{label:<9}  {text}")


@click.command("estimate")
@click.argument("model", metavar="[MODEL]", required=False, type=click.Path(path_type=Path))
@circuit_options
@click.option("--recalibrate", is_flag=True, help="Measure this machine again first.")
@click.option(
    "--chart", type=click.Path(path_type=Path), metavar="FILE.png", help="Also draw the rows as a picture."
)
@click.option("--json", "as_json", is_flag=True, help="Print everything as one JSON object.")
def command(
    model: Path | None, public_input: bool, recalibrate: bool, chart: Path | None, as_json: bool
) -> None:
    """Say what proving a model will cost on this machine, and where its rows go. Makes no keys.

    Rows are exact. Seconds and memory come from a measurement of this machine, made on first use (about
    half a minute) and kept in the cache. MODEL defaults to the one quantized last.

    \b
    Example:
      mambaint estimate runs/digits/quantized/model.mint --chart rows.png
    """
    from circuits.breakdown import breakdown, totals
    from circuits.lowering import build_circuit
    from mamba_int.files import write_bytes
    from mamba_int.graph import Graph
    from quantize.latest import resolve_model
    from quantize.plots import rows_plot
    from zk.calibration import calibrate, stored_calibration
    from zk.estimate import Size, available_memory, memory_shortage

    graph = Graph.load(resolve_model(model))
    with activity(as_json) as say:
        say("building the circuit")
        lowered = build_circuit(graph, public_input)
        calibration = None if recalibrate else stored_calibration()
        if calibration is None:
            calibration = calibrate(say)
    shares = breakdown(graph, lowered)
    size = Size.of(lowered.circuit)
    prediction = calibration.predict(size)
    shortage = memory_shortage(prediction.peak_bytes)
    result: dict[str, Any] = {
        "model_id": graph.model_id,
        **asdict(size),
        **asdict(prediction),
        "available_bytes": available_memory(),
        "enough_memory": shortage is None,
        "input_is_public": public_input,
        "rows_by_layer": totals((share.layer, share.rows) for share in shares),
        "rows_by_operation": totals((share.operation, share.rows) for share in shares),
        "parts": [asdict(share) for share in shares],
        "machine": calibration.machine,
    }
    if chart is not None:
        bars = [(share.layer, share.operation, share.rows) for share in shares]
        write_bytes(chart, rows_plot(bars))
    if as_json:
        click.echo(json.dumps(result, indent=2))
    else:
        _show(result, shares)
    if shortage is not None:
        click.echo(f"warning: {shortage.cause}; {shortage.remedy}", err=True)
