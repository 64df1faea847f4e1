"""The page: complete, self-contained, and harmless whatever the data calls its classes."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch

from mamba_int.datasets import ClassificationData, DataSource, load_data
from mamba_int.errors import MambaintError
from mamba_int.interpreter import evaluate
from mamba_int.training.evaluation import Score
from quantize.comparison import compare_with_float
from quantize.comparison_text import comparison_values, worst_layers
from quantize.equality import compare
from quantize.measurement import measure, sample_inputs
from quantize.native import quantize_native
from quantize.page import render_page
from quantize.report import make_report
from quantize.summary import summarize
from tests.quantize.checkpoints import write_checkpoint
from tests.quantize.test_float_mamba import FORMAT, converted


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("page")
    file = folder / "<img src=x>.csv"
    names = ("<script>alert(1)</script>", "$\\frac{", "a & b")
    file.write_text("".join(f"{i % 7},{i % 5},{names[i % 3]}\n" for i in range(60)))
    source = DataSource("csv", str(file))
    write_checkpoint(folder / "c", source, results={"test_accuracy": 0.25})
    graph, data = quantize_native(folder / "c"), load_data(source)
    inputs = sample_inputs(graph, data, 5, 0)
    equality = compare(graph, inputs, {}, {"NumPy": lambda batch: evaluate(graph, batch)})
    return make_report(graph, summarize(graph), measure(graph, data, 32), equality, 0.25, 0.5)


def test_text_from_data_is_escaped(report: dict[str, Any]) -> None:
    page = render_page(report)
    assert "<script" not in page and "<img src=x>" not in page
    assert "&lt;img src=x&gt;" in page


def test_page_loads_nothing_from_elsewhere(report: dict[str, Any]) -> None:
    page = render_page(report)
    sources = re.findall(r'(?:src|href)="([^"]{0,30})', page)
    assert len(sources) == 3 and all(source.startswith("data:image/png;base64,") for source in sources)
    assert "http" not in re.sub(r"base64,[^\"]+", "", page) and "url(" not in page


def test_page_shows_the_numbers_of_the_report(report: dict[str, Any]) -> None:
    page = render_page(report)
    for text in (report["model_id"], "25.00 %", "50.00 %", "layer0.ssd", ">equal<"):
        assert text in page
    assert "NOT equal" in render_page({**report, "equal_numpy_torch_onnx": False})


def test_report_is_json_and_observed_ranges_lie_inside_the_proven(report: dict[str, Any]) -> None:
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    for tensor in report["tensors"]:
        assert tensor["low"] <= tensor["observed_low"] <= tensor["observed_high"] <= tensor["high"]
        assert (tensor["saturation"] is not None) == (tensor["op"] == "clamp")


def test_same_report_gives_the_same_page(report: dict[str, Any]) -> None:
    assert render_page(report) == render_page(report)


@pytest.fixture(scope="module")
def converted_report() -> dict[str, Any]:
    conversion, model, reals, integers = converted("last")
    inputs, labels = torch.from_numpy(integers), torch.arange(24) % 4
    splits = (inputs, labels) * 3
    names, ones = tuple("abcd"), (1.0,) * 3
    data = ClassificationData(*splits, names, ones, ones, FORMAT.low, FORMAT.high, "random")
    graph = conversion.graph
    equality = compare(graph, integers[:2], {}, {"NumPy": lambda batch: evaluate(graph, batch)})
    comparison = compare_with_float(conversion, model, reals, integers)
    score, measurement = Score(0.625, 1.25, True), measure(graph, data, 8)
    report = make_report(graph, summarize(graph), measurement, equality, None, None, comparison, score, 12345)
    with pytest.raises(MambaintError, match="the comparison is of model"):
        other = converted("mean_of_chunks")[0].graph
        make_report(other, summarize(other), measurement, equality, None, None, comparison)
    return report


def test_a_converted_model_is_reported_beside_its_float_model(converted_report: dict[str, Any]) -> None:
    assert json.loads(json.dumps(converted_report, allow_nan=False)) == converted_report
    assert converted_report["comparison"]["model_id"] == converted_report["model_id"]
    page = render_page(converted_report)
    assert page.count("data:image/png;base64,") == 5
    worst = converted_report["comparison"]["tensors"][0]
    for text in (
        converted_report["model_id"],
        "62.50 %",
        "12,345",
        f">{worst['own_sqnr_db']:.1f}<",
        "layer1.gated_norm.source",
        "worst first",
        "proven error",
    ):
        assert text in page


def test_the_terminal_shows_both_metrics_the_sizes_and_the_worst_layers_alone(
    converted_report: dict[str, Any],
) -> None:
    values = dict(comparison_values(converted_report))
    found = converted_report["test_accuracy"]
    assert values["test accuracy, float → integers"] == f"0.6250 → {found:.4f}"
    assert "12,345 as a file" in values["bytes, float32 → integers"]
    table = worst_layers(converted_report, 2)
    layers = converted_report["comparison"]["layers"]
    assert [line.split()[:2] for line in table[1:]] == [[x["layer"], x["worst"]] for x in layers[:2]]
    assert len({len(line) for line in table}) == 1


def test_a_language_model_shows_bits_per_byte_and_perplexity(report: dict[str, Any]) -> None:
    text = {key: value for key, value in report.items() if "accuracy" not in key}
    text |= {"test_bits_per_byte": 2.5, "float_bits_per_byte": 2.4, "checkpoint_test_bits_per_byte": None}
    text |= {"float_twin_bits_per_byte": None, "test_perplexity": 5.657, "float_perplexity": 5.278}
    page = render_page(text)
    for number in ("2.5000", "2.4000", "5.657", "5.278"):
        assert number in page
