"""The page: complete, self-contained, and harmless whatever the data calls its classes."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from mamba_int.datasets import DataSource, load_data
from mamba_int.interpreter import evaluate
from quantize.equality import compare
from quantize.measurement import measure, sample_inputs
from quantize.native import quantize_native
from quantize.page import render_page
from quantize.report import make_report
from quantize.summary import summarize
from tests.quantize.checkpoints import write_checkpoint


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
