"""The comparison with the float model: healthy models look healthy, and what is broken is named first."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from mamba_int.errors import MambaintError
from mamba_int.float_models.mixer import Mixer
from mamba_int.graph import Graph, IntArray, Node
from mamba_int.interpreter import evaluate
from quantize.calibration import FloatModel, trace
from quantize.comparison import Comparison, compare_with_float, layers_of
from quantize.comparison_text import worst_layers
from quantize.float_mamba import PROVABLE, Conversion
from quantize.sqnr import LARGEST_DB, sqnr_db
from tests.quantize.test_float_mamba import FORMS, converted

Converted = tuple[Conversion, FloatModel, torch.Tensor, IntArray]


@pytest.fixture(scope="module")
def last() -> Converted:
    return converted("last")


@pytest.fixture(scope="module")
def mamba() -> Converted:
    return converted("mamba_language")


def compared(case: Converted, conversion: Conversion) -> Comparison:
    """Another conversion in the place of that of ``case``."""
    _, model, reals, integers = case
    return compare_with_float(conversion, model, reals, integers)


def with_node(conversion: Conversion, name: str, change: Callable[[Node], Node]) -> Conversion:
    """The conversion with one node of its graph changed."""
    nodes = [change(node) if node.name == name else node for node in conversion.graph.nodes]
    return dataclasses.replace(conversion, graph=conversion.graph.with_nodes(nodes))


def with_constant(
    conversion: Conversion, name: str, key: str, change: Callable[[IntArray], IntArray]
) -> Conversion:
    """The conversion with a constant of one node changed."""

    def changed(node: Node) -> Node:
        return dataclasses.replace(node, constants={**node.constants, key: change(node.constants[key])})

    return with_node(conversion, name, changed)


@pytest.mark.parametrize("name", FORMS)
def test_no_tensor_of_a_healthy_model_has_a_forgotten_scale(name: str) -> None:
    conversion, model, reals, integers = converted(name)
    comparison = compare_with_float(conversion, model, reals, integers)
    recorded = set[str]()
    with torch.no_grad():
        trace(model, reals[:1], lambda tensor, value: recorded.add(tensor))
    for tensor in comparison.tensors:
        assert tensor.sqnr_db > 20 and tensor.own_sqnr_db > 20 and tensor.cosine > 0.99, tensor
    found = {tensor.tensor for tensor in comparison.tensors}
    # All that is traced is compared, but for what only calibration needs, and for second names.
    left = {
        tensor for tensor in recorded - found if tensor.rpartition(".")[2] not in {"square", "G", "reach"}
    }
    second = {f"layer{i}.gated": f"layer{i}.gated_norm.source" for i in range(2)}
    second |= {f"layer{i}.gated_norms": f"layer{i}.gated_norm" for i in range(2)}
    # A mixer alone has no norm before it: the stream is what it reads.
    second |= {"residual": "layer0.norm.source" if "layer0.norm.source" in recorded else "layer0.norm"}
    second |= {"pooled": "final_norm"}
    # Where the norm of quaternions rounds as it squares, or the real residual has no norm.
    second |= {f"layer{i}.y": f"layer{i}.y_norm.source" for i in range(2)}
    second |= {f"layer{i}.B_projected": f"layer{i}.B" for i in range(2)}
    assert {second[tensor] for tensor in left} <= found
    assert found <= recorded
    if isinstance(model, Mixer):
        assert "layer0.gated" in found or "layer0.gated_norm" in found
    else:
        assert {"layer1.out", "final_norm.source"} < found and {"logits", "hidden"} & found


def test_sums_over_batches_are_those_of_whole_tensors(
    last: Converted, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversion, model, reals, integers = last
    whole = compared(last, conversion)
    told: list[tuple[int, int]] = []
    monkeypatch.setattr("quantize.comparison.BATCH_VALUES", 1)
    one = compare_with_float(*last, progress=lambda done, of: told.append((done, of)))
    assert told == [(i + 1, 24) for i in range(24)]
    by_name = {tensor.tensor: tensor for tensor in one.tensors}
    for tensor in whole.tensors:
        other = by_name.pop(tensor.tensor)
        assert (other.values, other.saturation) == (tensor.values, tensor.saturation)
        assert other.sqnr_db == pytest.approx(tensor.sqnr_db, abs=0.05)
        assert other.own_sqnr_db == pytest.approx(tensor.own_sqnr_db, abs=0.05)
    assert not by_name
    # And these are the formulas themselves, on the interpreter's integers.
    exact: dict[str, Any] = {}
    found: dict[str, IntArray] = {}
    with torch.no_grad():
        trace(model, reals, lambda name, value: exact.update({name: value.double().numpy()}))
    evaluate(conversion.graph, integers, found)
    for name in ("layer0.gate", "layer1.norm", "logits"):
        tensor = next(t for t in whole.tensors if t.tensor == name)
        counterpart = conversion.counterparts[name]
        scales = 1.0 if counterpart.scales is None else counterpart.scales
        x, y = exact[name], found[tensor.node] * 2.0**-tensor.frac / scales
        wanted = 10 * math.log10(np.square(x).sum() / np.square(y - x).sum())
        assert tensor.sqnr_db == pytest.approx(wanted, abs=0.02)
        assert tensor.cosine == pytest.approx(
            (x * y).sum() / np.linalg.norm(x.ravel()) / np.linalg.norm(y.ravel()), abs=1e-5
        )
        assert tensor.largest_error == pytest.approx(np.abs(y - x).max(), rel=1e-4)


@pytest.mark.parametrize(
    ("node", "key", "layer", "tensor"),
    [
        ("layer0.gate", "values", "layer0", "layer0.gate"),
        ("layer1.x", "values", "layer1", "layer1.x"),
        ("layer1.gain", "values", "layer1", "layer1.scan_x"),
        ("layer1.log_dt", "values", "layer1", "layer1.decay_index"),
        ("layer0.x_conv", "taps", "layer0", "layer0.x_index"),
        ("logits", "weight", "head", "logits"),
    ],
)
def test_what_is_broken_is_named_first_and_nothing_after_it(
    last: Converted, node: str, key: str, layer: str, tensor: str
) -> None:
    conversion = last[0]
    if node not in {n.name for n in conversion.graph.nodes if key in n.constants}:
        node = f"{node}_rows"
    broken = with_constant(conversion, node, key, lambda values: values[::-1].copy())
    comparison = compared(last, broken)
    worst, *rest = comparison.tensors
    assert worst.tensor == tensor and worst.own_sqnr_db < 23, worst
    assert all(other.own_sqnr_db > 28 for other in rest), rest[0]
    assert comparison.layers[0].layer == layer and comparison.layers[0].worst == tensor
    assert worst_layers({"comparison": comparison.to_dict()}, 1)[1].startswith(layer)


def test_a_broken_matrix_of_mamba_is_named_first(mamba: Converted) -> None:
    conversion = mamba[0]
    name = next(n.name for n in conversion.graph.nodes if n.name.startswith("layer0.out_proj"))
    broken = with_constant(conversion, name, "weight", lambda weight: weight[::-1].copy())
    comparison = compared(mamba, broken)
    assert comparison.tensors[0].tensor == "layer0.out"
    assert comparison.tensors[0].own_sqnr_db < 15 < 25 < comparison.tensors[1].own_sqnr_db


def test_a_scale_left_out_shows_as_noise(last: Converted, mamba: Converted) -> None:
    for case, name in ((last, "layer0.norm"), (mamba, "layer0.gated")):
        conversion = case[0]
        counterpart = conversion.counterparts[name]
        assert counterpart.scales is not None
        forgotten = {**conversion.counterparts, name: dataclasses.replace(counterpart, scales=None)}
        comparison = compared(case, dataclasses.replace(conversion, counterparts=forgotten))
        tensor = next(t for t in comparison.tensors if t.tensor == name)
        assert tensor.sqnr_db < 20


def test_noise_that_is_inherited_is_not_a_layers_own(last: Converted) -> None:
    conversion = last[0]
    name = next(n.name for n in conversion.graph.nodes if n.name.startswith("layer0.out_proj"))
    broken = with_constant(conversion, name, "weight", lambda weight: weight[::-1].copy())
    layers = {layer.layer: layer for layer in compared(last, broken).layers}
    assert layers["layer1"].sqnr_db < 20 < layers["layer1"].own_sqnr_db
    assert layers["head"].cosine < 0.99


def test_saturation_is_found_where_it_is(last: Converted) -> None:
    conversion = last[0]
    low = {"low": -3, "high": 3}
    # The x of layer 1 before its convolution is left three units.
    cut = with_node(
        conversion,
        conversion.counterparts["layer1.x_in"].node,
        lambda node: Node(node.name, "clamp", node.inputs, low | {"saturation": True}, {}, node.frac),
    )
    comparison = compared(last, cut)
    assert comparison.layers[0].saturated == comparison.tensors[0].node
    assert comparison.tensors[0].tensor == "layer1.x_in"
    share = comparison.tensors[0].saturation
    assert share is not None and share > 0.5 and comparison.layers[0].saturation == share


def test_zeros_are_numbers_too() -> None:
    assert sqnr_db(0.0, 0.0) == LARGEST_DB == -sqnr_db(0.0, 1e-300)
    assert sqnr_db(1e300, 1e-300) == LARGEST_DB == -sqnr_db(1e-300, 1e300)
    assert sqnr_db(1.0, 0.01) == 20
    conversion, model, reals, integers = converted("language")
    with torch.no_grad():
        dict(model.named_parameters())["backbone.layers.0.mixer.out_proj.weight"].zero_()
    comparison = compare_with_float(conversion, model, reals, integers)
    zero = next(t for t in comparison.tensors if t.tensor == "layer0.out")
    assert (zero.sqnr_db, zero.own_sqnr_db, zero.cosine) == (-LARGEST_DB, -LARGEST_DB, 0.0)
    json.dumps(comparison.to_dict(), allow_nan=False)


def test_the_comparison_is_json_and_bound_to_its_model(last: Converted) -> None:
    comparison = compare_with_float(*last)
    result = comparison.to_dict()
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    graph, model = last[0].graph, last[1]
    assert result["model_id"] == graph.model_id
    assert result["float_bytes"] == sum(4 * p.numel() for p in model.parameters())
    assert [layer["own_sqnr_db"] for layer in result["layers"]] == sorted(
        layer["own_sqnr_db"] for layer in result["layers"]
    )
    assert {layer["layer"] for layer in result["layers"]} == {"embedding", "layer0", "layer1", "head"}
    assert sum(layer["parameters"] for layer in result["layers"]) == sum(
        np.size(value) for node in graph.nodes for value in node.constants.values()
    )


def test_every_table_and_every_set_of_lines_shows_its_proven_error(last: Converted) -> None:
    conversion = last[0]
    forms = {form.name: form for form in compare_with_float(*last).activations}
    assert set(conversion.tables) | set(conversion.decays) < set(forms)
    assert len(forms) == len(conversion.tables) + 2 * len(conversion.decays)
    for name, fit in conversion.tables.items():
        assert (forms[name].form, forms[name].size) == ("table", len(fit.values))
        assert forms[name].error == fit.error and not forms[name].relative
    assert forms["layer0.gain"].relative
    assert forms["layer0.gain"].error == conversion.decays["layer0.decay"].step_error
    provable, *others = converted("last", PROVABLE)
    lines = {form.name: form for form in compare_with_float(provable, *others).activations}
    gate = provable.tables["layer0.gate"]
    assert (lines["layer0.gate"].form, lines["layer0.gate"].size) == (
        "lines",
        gate.pieces,
    ) and gate.pieces > 1


def test_layers_are_told_from_what_is_around_them(last: Converted) -> None:
    graph: Graph = last[0].graph
    layers = layers_of(graph)
    assert layers["input"] == "embedding" and layers["logits"] == "head"
    assert layers["layer1.in_proj" if "layer1.in_proj" in layers else "layer1.in_proj_rows"] == "layer1"


def test_inputs_that_cannot_be_compared_are_named(last: Converted) -> None:
    conversion, model, reals, integers = last
    for wrong in (integers[:3], integers[:0]):
        with pytest.raises(MambaintError, match="beside integers"):
            compare_with_float(conversion, model, reals[: len(wrong) and 4], wrong)
    with pytest.raises(MambaintError, match="is not an integer"):
        compare_with_float(conversion, model, reals, integers + 1)
    broken = reals.clone()
    broken[5, 2, 0] = torch.nan
    with pytest.raises(MambaintError, match=r"'layer0\.norm\.source'.*not finite"):
        compare_with_float(conversion, model, broken, integers)
