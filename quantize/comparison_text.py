"""What a report says of a converted model beside its float model, as lines for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_HEAD = ("layer", "worst tensor", "own SQNR", "SQNR", "cosine", "saturated", "bits", "bytes")
_NUMBERS_FROM = 2


def comparison_values(report: dict[str, Any]) -> list[tuple[str, str]]:
    """Label and value of the float model's metric beside the integer one's, and of both sizes.

    Args:
        report: of a converted model (``quantize.report.make_report``), or read from its JSON file.
    """
    comparison = report["comparison"]
    lines = []
    for key, label in (
        ("accuracy", "accuracy"),
        ("bits_per_byte", "bits per byte"),
        ("perplexity", "perplexity"),
    ):
        exact, found = report.get(f"float_{key}"), report.get(f"test_{key}")
        if exact is not None and found is not None:
            lines.append((f"test {label}, float → integers", f"{exact:.4f} → {found:.4f}"))
    ratio = comparison["float_bytes"] / comparison["size_bytes"]
    size = f"{comparison['float_bytes']:,} → {comparison['size_bytes']:,} ({ratio:.2f} : 1)"
    if report["file_bytes"] is not None:
        size += f", {report['file_bytes']:,} as a file"
    counts = report["operations_per_token"]
    steps = ", ".join(f"{counts[name]:,.0f} {name}" for name in ("shifts", "adds", "multiplies"))
    return [*lines, ("bytes, float32 → integers", size), ("integer operations per step", steps)]


def worst_layers(report: dict[str, Any], most: int = 5) -> list[str]:
    """A table of the layers whose own error is the largest, worst first; see ``quantize.comparison``.

    Args:
        report: as for :func:`comparison_values`.
        most: layers to show.
    """
    layers = report["comparison"]["layers"][:most]
    rows = [
        (
            layer["layer"],
            layer["worst"],
            f"{layer['own_sqnr_db']:.1f} dB",
            f"{layer['sqnr_db']:.1f} dB",
            f"{layer['cosine']:.4f}",
            f"{100 * layer['saturation']:.2f} %",
            str(layer["peak_bits"]),
            f"{layer['size_bytes']:,}",
        )
        for layer in layers
    ]
    return _aligned([_HEAD, *rows])


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if i >= _NUMBERS_FROM else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
