"""What ``setup`` and ``prove`` share: their options, and a line that says what is being done."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from circuits.circuit import LARGEST_LOGROWS, SMALLEST_LOGROWS
from cli.terminal import live_console

DEVELOPMENT_NOTE = (
    "note: development SRS, made on this machine. Whoever generated it could forge proofs; "
    "use --srs with a ceremony file for anything that matters."
)


def circuit_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options that decide, with the model, which circuit is meant."""
    return click.option(
        "--public-input", is_flag=True, help="Show the input in the proof instead of hiding it."
    )(function)


def proving_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options that decide which circuit and which keys are meant; the same for setup and prove."""
    options = (
        click.option(
            "--model",
            type=click.Path(path_type=Path),
            help="Quantized model [default: that of the newest run].",
        ),
        circuit_options,
        click.option(
            "--commit-input",
            is_flag=True,
            help="Commit to the hidden input, so that proofs can be shown to share it.",
        ),
        click.option(
            "--logrows",
            type=click.IntRange(SMALLEST_LOGROWS, LARGEST_LOGROWS),
            metavar="K",
            help="Make a circuit of 2^K rows. Commitments of two circuits can only be compared if both have "
            "the same number of rows and the same SRS. [default: the fewest that hold the circuit]",
        ),
        click.option(
            "--lookups",
            type=click.Choice(["table", "none"]),
            default="table",
            show_default=True,
            help="Check ranges by a lookup table, or by polynomial constraints alone (many more rows).",
        ),
        click.option(
            "--srs",
            "srs_path",
            type=click.Path(path_type=Path),
            metavar="FILE",
            help="SRS of a ceremony [default: one made here, for development only].",
        ),
        click.option("--srs-sha256", metavar="HEX", help="SHA-256 the ceremony file must have."),
    )
    for option in reversed(options):
        function = option(function)
    return function


@contextmanager
def activity(to_stderr: bool) -> Iterator[Callable[[str], None]]:
    """A live line that says what is being done, where there is a terminal to draw it on."""
    console = live_console(to_stderr)
    if console is None:
        yield lambda _: None
        return
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("starting", total=None)
        yield lambda text: bar.update(task, description=text)
