"""The log of a run: one JSON object per line, and a picture of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mamba_int.errors import MambaintError
from mamba_int.files import read_bytes, replacing, write_bytes


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a log, up to the first line that a crash left incomplete; none if there is no file."""
    rows: list[dict[str, Any]] = []
    if not path.exists():
        return rows
    for line in read_bytes(path).decode(errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            break
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            break
        rows.append(row)
    return rows


def truncate_metrics(path: Path, step: int) -> None:
    """Drop the rows after ``step``: a resumed run writes them again."""
    rows = [row for row in read_metrics(path) if row["step"] <= step]
    write_bytes(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def append_metrics(path: Path, row: dict[str, Any]) -> None:
    """Append one row.

    Raises:
        MambaintError: if the disk is full or the folder gone.
    """
    try:
        with path.open("a", encoding="utf-8") as log:
            log.write(json.dumps(row, allow_nan=False) + "\n")
    except OSError as error:
        raise MambaintError(
            f"cannot write {path}: {error.strerror or error}", "choose a writable folder with free space"
        ) from error


def plot_metrics(path: Path, picture: Path, title: str) -> None:
    """Draw the loss and, over it, the metric of training and validation as a PNG.

    Raises:
        MambaintError: if ``picture`` cannot be written.
    """
    # Imported here: matplotlib takes longer to load than everything else together. The Figure class
    # and its Agg canvas need no display and leave pyplot's global state alone.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = read_metrics(path)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    left = figure.add_subplot()
    left.plot([row["step"] for row in rows], [row["loss"] for row in rows], color="tab:gray", linewidth=1)
    left.set(xlabel="step", ylabel="training loss (nats)", title=title)
    left.grid(alpha=0.3)
    right = left.twinx()
    labels = {
        "train_accuracy": ("training accuracy", "tab:blue", "-"),
        "validation_accuracy": ("validation accuracy", "tab:orange", "o-"),
        "validation_bits_per_byte": ("validation bits per byte", "tab:orange", "o-"),
    }
    for key, (label, colour, style) in labels.items():
        points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
        if points:
            right.plot(
                *zip(*points, strict=True), style, color=colour, label=label, markersize=4, linewidth=1
            )
            right.legend(loc="center right")
    with replacing(picture) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
