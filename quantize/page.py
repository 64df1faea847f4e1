"""The report as one HTML page that needs no other file."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from quantize.plots import bits_plot, confusion_plot, depth_plot, sqnr_plot, zeros_plot

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2430; background: #fff;
  max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: 0.2rem; }
h2 { font-size: 1.15rem; margin-top: 2.2rem; border-bottom: 1px solid #d5dbe4; padding-bottom: 0.2rem; }
p.id { font: 12px ui-monospace, monospace; color: #5a6675; overflow-wrap: anywhere; margin-top: 0; }
.tiles { display: flex; flex-wrap: wrap; gap: 0.8rem; margin: 1.2rem 0; }
.tile { border: 1px solid #d5dbe4; border-radius: 6px; padding: 0.5rem 0.9rem; }
.tile b { display: block; font-size: 1.35rem; font-weight: 600; }
.tile span { color: #5a6675; font-size: 0.85rem; }
.good b { color: #1d7a3d; } .bad b { color: #b3261e; }
table { border-collapse: collapse; font-size: 13px; width: 100%; }
th, td { padding: 0.2rem 0.6rem; border-bottom: 1px solid #e7ebf0; text-align: left; }
th { color: #5a6675; font-weight: 600; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
td.n { white-space: nowrap; }
.scroll { overflow-x: auto; }
img { max-width: 100%; height: auto; }
p.note { color: #5a6675; font-size: 0.9rem; }
"""

_LAYER_HEAD = (
    "layer",
    "worst tensor",
    "own SQNR, dB",
    "SQNR, dB",
    "cosine",
    "saturation",
    "peak bits",
    "integers",
    "bytes",
    "shifts",
    "adds",
    "multiplies",
)

_TENSOR_HEAD = (
    "tensor",
    "own SQNR, dB",
    "SQNR, dB",
    "cosine",
    "largest error",
    "saturation",
    "places",
    "bits",
    "seen",
)

Cell = str | int | float | None


def _shown(value: Cell) -> str:
    if value is None:
        return ""
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.1f}"
    return value


def _table(head: Sequence[str], rows: Iterable[Sequence[Cell]], numbers_from: int) -> str:
    """A table whose columns from ``numbers_from`` on hold numbers."""

    def line(tag: str, cells: Sequence[Cell]) -> str:
        return "".join(
            f"<{tag}{' class=n' if i >= numbers_from else ''}>{escape(_shown(cell))}</{tag}>"
            for i, cell in enumerate(cells)
        )

    body = "".join(f"<tr>{line('td', row)}</tr>" for row in rows)
    return f"<div class=scroll><table><tr>{line('th', head)}</tr>{body}</table></div>"


def _image(png: bytes, description: str) -> str:
    data = base64.b64encode(png).decode()
    return f'<img alt="{escape(description)}" src="data:image/png;base64,{data}">'


def _tile(value: str, label: str, kind: str = "") -> str:
    return f"<div class='tile {kind}'><b>{escape(value)}</b><span>{escape(label)}</span></div>"


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{100 * share:.2f} %"


def _quality(report: dict[str, Any]) -> list[str]:
    """Tiles of the test metric, beside those of the checkpoint and of float models."""
    if "test_accuracy" in report:
        metric, unit, examples = "accuracy", "accuracy", "sequences"
    else:
        metric, unit, examples = "bits_per_byte", "bits per byte", "tokens"

    def show(value: float) -> str:
        return f"{100 * value:.2f} %" if metric == "accuracy" else f"{value:.4f}"

    tiles = [
        _tile(
            show(report[f"test_{metric}"]),
            f"test {unit}, integers ({report['test_examples']:,} {examples})",
        )
    ]
    for key, label in (
        (f"float_{metric}", f"test {unit} of the float model"),
        (f"checkpoint_test_{metric}", f"test {unit} that training measured"),
        (f"float_twin_{metric}", f"test {unit} of the float twin"),
    ):
        if report[key] is not None:
            tiles.append(_tile(show(report[key]), label))
    for key, label in (
        ("test_perplexity", "perplexity of a token, integers"),
        ("float_perplexity", "perplexity of a token, float model"),
    ):
        if report[key] is not None:
            tiles.append(_tile(f"{report[key]:.3f}", label))
    return tiles


def _comparison(comparison: dict[str, Any]) -> list[str]:
    """Sections on a converted model beside its float model."""
    layers, tensors, activations = (comparison[key] for key in ("layers", "tensors", "activations"))
    place = {tensor["layer"]: tensor["position"] for tensor in tensors}
    along = sorted(layers, key=lambda layer: place[layer["layer"]])
    return [
        "<h2>Float against integers: layers, worst first</h2>",
        _table(
            _LAYER_HEAD,
            [
                (
                    layer["layer"],
                    layer["worst"],
                    layer["own_sqnr_db"],
                    layer["sqnr_db"],
                    f"{layer['cosine']:.5f}",
                    _percent(layer["saturation"]),
                    layer["peak_bits"],
                    layer["parameters"],
                    layer["size_bytes"],
                    layer["shifts"],
                    layer["adds"],
                    layer["multiplies"],
                )
                for layer in layers
            ],
            2,
        ),
        f"<p class=note>On {comparison['inputs']:,} inputs of {comparison['steps']:,} steps. SQNR is signal "
        "to quantization noise, 10 log<sub>10</sub>(&Sigma;x&sup2; / &Sigma;(x&#770; - x)&sup2;), of the "
        "tensor a layer ends with, against the float model run from the same input: it counts the noise of "
        "all layers before. The own SQNR is that of the noise a tensor has when the tensors before it are "
        "the float model's, rounded and saturated as their nodes hold them. Saturation is the largest share "
        "of any clamp; operations are those of one step.</p>",
        _image(depth_plot(along), "SQNR along the layers"),
        "<h2>Float against integers: tensors</h2>",
        _image(sqnr_plot(tensors), "SQNR of tensors, cumulative and own"),
        _table(
            _TENSOR_HEAD,
            [
                (
                    tensor["tensor"],
                    tensor["own_sqnr_db"],
                    tensor["sqnr_db"],
                    f"{tensor['cosine']:.5f}",
                    f"{tensor['largest_error']:.3g}",
                    _percent(tensor["saturation"]),
                    tensor["frac"],
                    tensor["bits"],
                    tensor["observed_bits"],
                )
                for tensor in tensors
            ],
            1,
        ),
        "<h2>Activations and decays, with proven errors</h2>",
        _table(
            ("function", "form", "entries or lines", "proven error"),
            [
                (
                    form["name"],
                    form["form"],
                    form["size"],
                    f"{100 * form['error']:.3g} %" if form["relative"] else f"{form['error']:.3g}",
                )
                for form in activations
            ],
            2,
        ),
        "<p class=note>No real number of the range is further from what it gives: the rounding of the index "
        "and what saturates are included. A gain's is that of the step size it makes with its decay.</p>",
    ]


def render_page(report: dict[str, Any]) -> str:
    """The page of a report (``quantize.report.make_report``); everything in it is escaped."""
    card, equality, tensors = report["card"], report["equality"], report["tensors"]
    equal = report["equal_numpy_torch_onnx"]
    # A converted model need not know the data it was trained on.
    subject = card["dataset"]["name"] if "dataset" in card else "converted model"
    tiles = [
        *_quality(report),
        _tile(
            "equal" if equal else "NOT equal",
            f"NumPy = {' = '.join(equality['backends'])}",
            "good" if equal else "bad",
        ),
        _tile(str(report["max_bits"]), "bits hold every intermediate"),
        _tile(f"{report['size_bytes']:,}", f"bytes, {report['parameters']:,} integers"),
    ]
    if report["file_bytes"] is not None:
        tiles.append(_tile(f"{report['file_bytes']:,}", "bytes of the model's file"))
    comparison = report["comparison"]
    if comparison is not None:
        ratio = comparison["float_bytes"] / comparison["size_bytes"]
        label = f"{comparison['float_bytes']:,} bytes of float32 beside the integers'"
        tiles.append(_tile(f"{ratio:.2f} : 1", label))
    linear = [tensor for tensor in tensors if tensor["zero_share"] is not None]
    clamps = [tensor for tensor in tensors if tensor["saturation"] is not None]
    counts = report["operations_per_token"]
    sections = [
        f"<h1>{escape(subject)}: integer {escape(card['task'].replace('_', ' '))}</h1>",
        f"<p class=id>model {escape(report['model_id'])}</p>",
        f"<div class=tiles>{''.join(tiles)}</div>",
        f"<p>Input: {escape(card['input']['description'])}, integers {card['input']['low']}.."
        f"{card['input']['high']}. Logits are integers times 2<sup>-{int(card['logits_frac'])}</sup>.</p>",
        f"<p>{equality['values_compared']:,} integers compared with the NumPy interpreter "
        f"({equality['inputs']:,} test inputs, {equality['tensors']:,} tensors each, intermediates inside "
        f"operations included): {equality['mismatches']:,} differ.</p>",
        "<h2>Arithmetic per token</h2>",
        _table(list(counts), [list(counts.values())], 0),
        "<p class=note>A rounding shift counts as one shift; zero weights cost nothing.</p>",
        *(_comparison(comparison) if comparison is not None else []),
        "<h2>Bits of every tensor</h2>",
        _image(bits_plot(tensors, report["max_bits"]), "bits of every tensor, proven and seen"),
    ]
    if linear:
        sections += [
            "<h2>Zero weights</h2>",
            _image(zeros_plot(linear), "share of zero weights per linear layer"),
        ]
    if report["confusion"]:
        picture = confusion_plot(report["confusion"], card["classes"])
        sections += ["<h2>Confusion on the test split</h2>", _image(picture, "confusion matrix")]
    sections += [
        "<h2>Saturation</h2>",
        _table(
            ("clamp", "low", "high", "at either end"),
            [(t["name"], t["low"], t["high"], _percent(t["saturation"])) for t in clamps],
            1,
        ),
        "<h2>Tensors</h2>",
        _table(
            ("tensor", "operation", "shape", "places", "proven", "bits", "seen", "bits", "peak bits"),
            [
                (
                    t["name"],
                    t["op"],
                    " x ".join(map(str, t["shape"])),
                    t["frac"],
                    f"{t['low']:,} .. {t['high']:,}",
                    t["bits"],
                    f"{t['observed_low']:,} .. {t['observed_high']:,}",
                    t["observed_bits"],
                    t["peak_bits"],
                )
                for t in tensors
            ],
            3,
        ),
        "<p class=note>Proven: for every input. Seen: on the test split. Bits are of the magnitude, without "
        "the sign; peak bits are those of the largest intermediate inside the operation. A value is its "
        "integer times 2<sup>-places</sup>.</p>",
    ]
    title = escape(f"{subject}: integer model report")
    return (
        f"<!doctype html>\n<html lang=en><head><meta charset=utf-8><title>{title}</title>"
        f"<meta name=viewport content='width=device-width'><style>{_STYLE}</style></head>\n"
        f"<body>{chr(10).join(sections)}</body></html>\n"
    )
