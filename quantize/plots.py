"""The plots of the report, as PNG bytes. Drawn without a display."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from quantize.sqnr import LARGEST_DB

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH = 9.0
DPI = 110
PROVEN, OBSERVED = "#c9d4e5", "#2b5c9e"
INHERITED, OWN = "#2b5c9e", "#e0a458"
TALLEST = 200
"""Bars in one plot; of a deeper model the widest tensors are shown."""
COMPARED = 60
"""Pairs of bars in the plot of errors; of a deeper model the tensors with the largest own error are shown."""
ANNOTATED_CLASSES = 20


def _draw(height: float, width: float = WIDTH) -> tuple[Any, Axes]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    # No creation time or version inside: the same report is the same bytes.
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()


def _literal(text: str) -> str:
    """A dollar sign would start a formula."""
    return text.replace("$", r"\$")


def bits_plot(tensors: Sequence[dict[str, Any]], max_bits: int) -> bytes:
    """Bits of every tensor: proven for all inputs, and seen on the test split."""
    shown = list(tensors)
    if len(shown) > TALLEST:
        floor = sorted((tensor["bits"] for tensor in shown), reverse=True)[TALLEST - 1]
        shown = [tensor for tensor in shown if tensor["bits"] >= floor][:TALLEST]
    figure, axes = _draw(1.2 + 0.2 * len(shown))
    rows = range(len(shown))
    axes.barh(rows, [t["bits"] for t in shown], color=PROVEN, height=0.8, label="proven, for every input")
    axes.barh(
        rows, [t["observed_bits"] for t in shown], color=OBSERVED, height=0.4, label="seen on the test split"
    )
    axes.axvline(max_bits, color="black", linewidth=1, linestyle=":")
    axes.set_yticks(rows, [_literal(t["name"]) for t in shown], fontsize=8)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_xlabel(f"bits of the magnitude (dotted: {max_bits} bits hold every intermediate)")
    axes.set_xlim(0, max_bits + 1)
    axes.xaxis.set_major_locator(_whole_numbers())
    figure.legend(loc="outside upper right", ncols=2, frameon=False, fontsize=9)
    return _png(figure)


def sqnr_plot(tensors: Sequence[dict[str, Any]]) -> bytes:
    """SQNR of tensors against the float model, in the order of computation: cumulative, and their own.

    Args:
        tensors: of a ``quantize.comparison.Comparison``, largest own error first.
    """
    shown = sorted(tensors[:COMPARED], key=lambda tensor: tensor["position"])
    figure, axes = _draw(1.2 + 0.28 * len(shown))
    for key, offset, colour, label in (
        ("sqnr_db", -0.2, INHERITED, "cumulative: integer run against float run"),
        ("own_sqnr_db", 0.2, OWN, "own: from exact inputs"),
    ):
        rows = [i + offset for i in range(len(shown))]
        axes.barh(rows, [t[key] for t in shown], height=0.38, color=colour, label=label)
    axes.set_yticks(range(len(shown)), [_literal(t["tensor"]) for t in shown], fontsize=8)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_xlim(*_decibels([t[key] for t in shown for key in ("sqnr_db", "own_sqnr_db")]))
    axes.set_xlabel("SQNR, dB: longer is nearer to the float model; bars up to the right edge: equal")
    figure.legend(loc="outside upper right", ncols=2, frameon=False, fontsize=9)
    return _png(figure)


def depth_plot(layers: Sequence[dict[str, Any]]) -> bytes:
    """How noise grows along the layers: SQNR at the end of each, and of its worst tensor's own error.

    Args:
        layers: of a ``quantize.comparison.Comparison``, in the order of computation.
    """
    figure, axes = _draw(3.2)
    places = range(len(layers))
    for key, colour, label in (
        ("sqnr_db", INHERITED, "cumulative, at the layer's end"),
        ("own_sqnr_db", OWN, "own, of the layer's worst tensor"),
    ):
        axes.plot(places, [layer[key] for layer in layers], marker="o", color=colour, label=label)
    axes.set_xticks(places, [_literal(layer["layer"]) for layer in layers], rotation=90, fontsize=8)
    axes.set_ylim(*_decibels([layer[key] for layer in layers for key in ("sqnr_db", "own_sqnr_db")]))
    axes.set_ylabel("SQNR, dB")
    figure.legend(loc="outside upper right", ncols=2, frameon=False, fontsize=9)
    return _png(figure)


def _decibels(values: Sequence[float]) -> tuple[float, float]:
    """Limits of an axis that holds all ratios but those of equal tensors, which are as good as infinite."""
    seen = [value for value in values if abs(value) < LARGEST_DB]
    return min([0.0, *seen]), max([10.0, *seen]) + 3


def zeros_plot(tensors: Sequence[dict[str, Any]]) -> bytes:
    """Share of zero weights in every linear layer."""
    figure, axes = _draw(1.0 + 0.3 * len(tensors))
    rows = range(len(tensors))
    bars = axes.barh(rows, [100 * t["zero_share"] for t in tensors], color=OBSERVED, height=0.6)
    axes.bar_label(bars, fmt="%.1f %%", padding=3, fontsize=8)
    axes.set_yticks(rows, [f"{_literal(t['name'])} ({t['weights']})" for t in tensors], fontsize=8)
    axes.set_ylim(len(tensors) - 0.4, -0.6)
    axes.set_xlim(0, 100)
    axes.set_xlabel("zero weights, %")
    return _png(figure)


def confusion_plot(confusion: Sequence[Sequence[int]], classes: Sequence[str]) -> bytes:
    """True class by predicted class; the colour is the share of the true class."""
    size = len(classes)
    side = min(9.0, 2.0 + 0.5 * size)
    figure, axes = _draw(side, side + 0.8)
    shares = [[count / max(1, sum(row)) for count in row] for row in confusion]
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, label="share of the true class", shrink=0.8)
    if size <= ANNOTATED_CLASSES:
        labels = [_literal(name if len(name) <= 16 else f"{name[:15]}…") for name in classes]
        axes.set_xticks(range(size), labels, rotation=0 if max(map(len, labels)) <= 3 else 90)
        axes.set_yticks(range(size), labels)
        for i, row in enumerate(confusion):
            for j, count in enumerate(row):
                if count:
                    colour = "white" if shares[i][j] > 0.5 else "black"
                    axes.text(j, i, str(count), ha="center", va="center", fontsize=8, color=colour)
    axes.set(xlabel="predicted", ylabel="true")
    return _png(figure)


def rows_plot(shares: Sequence[tuple[str, str, float]]) -> bytes:
    """Rows of the circuit by operation, the dearest on top; layers are stacked.

    Args:
        shares: layer, operation and rows of every part.
    """
    layers = list(dict.fromkeys(layer for layer, _, _ in shares))
    rows: dict[str, dict[str, float]] = {}
    for layer, operation, count in shares:
        by_layer = rows.setdefault(operation, {})
        by_layer[layer] = by_layer.get(layer, 0) + count
    operations = sorted(rows, key=lambda operation: -sum(rows[operation].values()))
    figure, axes = _draw(1.2 + 0.3 * len(operations))
    lefts = [0.0] * len(operations)
    for layer in layers:
        counts = [rows[operation].get(layer, 0.0) for operation in operations]
        axes.barh(range(len(operations)), counts, left=lefts, height=0.7, label=layer)
        lefts = [left + count for left, count in zip(lefts, counts, strict=True)]
    axes.set_yticks(range(len(operations)), [_literal(operation) for operation in operations], fontsize=8)
    axes.set_ylim(len(operations) - 0.4, -0.6)
    axes.set_xlabel(f"rows of the circuit ({sum(lefts):,.0f} in all)")
    figure.legend(loc="outside upper right", ncols=min(8, len(layers)), frameon=False, fontsize=9)
    return _png(figure)


def _whole_numbers() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(integer=True)
