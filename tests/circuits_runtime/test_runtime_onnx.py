"""NumPy = PyTorch = ONNX Runtime on every intermediate, and what would break that."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from circuits.runtime import OnnxRunner, runtime_onnx
from circuits.runtime.operations import LOWERINGS
from mamba_int.errors import MambaintError
from mamba_int.graph import Graph, IntArray, Node
from mamba_int.interpreter import evaluate
from mamba_int.operations import OPERATIONS
from quantize.equality import Equality, compare, torch_tracer
from tests.circuits_runtime.models import features, graph_of, random_graph


def compare_all(graph: Graph, inputs: IntArray, traced: bytes | None = None) -> Equality:
    """PyTorch and ONNX Runtime against the specification."""
    runner = OnnxRunner(traced if traced is not None else graph)

    tracers = {"torch": torch_tracer(graph), "onnx": runner}
    return compare(graph, inputs, tracers, {"logits": OnnxRunner(runtime_onnx(graph))})


FORMS: list[dict[str, Any]] = [
    {},
    {"gate": "algebraic", "activation": "squareplus", "rotation": "shear"},
    {"gate": "hard_sigmoid", "rotation": "none", "pooling": "last", "activate_BC": True},
    {"weights": "int8", "gate": "algebraic", "pooling": "last", "final_norm": False},
    {"weights": "int8", "gate": "hard_sigmoid", "conv_bias": False},
    {"input_weights": "ternary", "final_norm": False, "input_low": -127, "input_high": 127},
    {"seq_len": 1},
    {"seq_len": 1, "chunk_size": 1, "rotation": "shear"},
    {"seq_len": 7, "d_conv": 1},
    {"seq_len": 24, "rotation": "shear"},
    {"seq_len": 29, "n_layer": 2, "rotation": "none"},
    {"seq_len": 17, "n_layer": 2, "gate": "algebraic", "weights": "int8"},
    {"seq_len": 9, "chunk_size": 2, "d_conv": 12},
    {"task": "language_model", "vocab_size": 11, "seq_len": 5},
    {"task": "language_model", "vocab_size": 11, "seq_len": 27, "rotation": "shear", "activate_BC": True},
    {"task": "language_model", "vocab_size": 11, "seq_len": 16, "final_norm": False, "n_layer": 2},
]


@pytest.mark.parametrize("forms", FORMS, ids=lambda forms: "-".join(map(str, forms.values())) or "default")
@pytest.mark.parametrize("seed", [0, 1])
def test_every_intermediate_is_equal(forms: dict[str, Any], seed: int) -> None:
    graph, inputs = random_graph(seed, **forms)
    equality = compare_all(graph, inputs)
    assert equality.first is None
    assert equality.equal and equality.inputs == len(inputs)
    inside = {"A", "G", "M"}
    if graph.seq_len > int(graph.by_name["layer0.ssd"].attributes["chunk_size"]):
        inside |= {"beta", "kappa", "sigma", "H", "u", "A_u"}
    named = {
        f"layer{i}.ssd.{name}" for i in range(2 if "layer1.ssd" in graph.by_name else 1) for name in inside
    }
    named |= {f"layer0.norm_wide.{name}" for name in ("xs", "squares", "level")}
    trace: dict[str, IntArray] = {}
    OnnxRunner(graph)(inputs, trace)
    assert named | set(graph.by_name) <= set(trace)


def test_no_operation_of_the_graph_lacks_a_lowering() -> None:
    assert set(LOWERINGS) == set(OPERATIONS)


@pytest.mark.parametrize("places", [*range(-4, 9), 24])
def test_shift_rounds_negative_halves_up_like_the_specification(places: int) -> None:
    graph = graph_of(features(-127, 127, 255), Node("y", "shift", ("input",), {"places": places}))
    assert compare_all(graph, np.arange(-127, 128).reshape(1, 1, 255)).first is None


@pytest.mark.parametrize(("top", "bits"), [(129000, 24), (131071, 25), (4190000, 29)])
@pytest.mark.parametrize("places", [1, 6, 17])
def test_shift_is_exact_up_to_the_widest_integer_of_its_dtype(top: int, bits: int, places: int) -> None:
    weight = np.array([[top, 256, 1], [-top, -256, -1]])
    wide = Node("wide", "linear", ("input",), constants={"weight": weight})
    graph = graph_of(features(-128, 127, 3), wide, Node("y", "shift", ("wide",), {"places": places}))
    assert graph.max_bits == bits
    inputs = np.random.default_rng(0).integers(-128, 128, (500, 1, 3))
    # The ends, and every residue of the smallest shifts beside them.
    inputs[:256, :, 0] = np.resize([-128, 127], (256, 1))
    inputs[:256, 0, 2] = np.arange(-128, 128)
    assert compare_all(graph, inputs).first is None


def test_shift_of_53_bits_runs_in_int64() -> None:
    square = Node("square", "mul", ("input", "input"))
    huge = Node("huge", "mul", ("square",), constants={"value": np.array(-(1 << 37) + 1)})
    nodes = [features(-127, 127, 255), square, huge]
    nodes += [Node(f"y{k}", "shift", ("huge",), {"places": k}) for k in (1, 31, 32, 40)]
    graph = graph_of(*nodes)
    assert graph.max_bits > 50
    assert compare_all(graph, np.arange(-127, 128).reshape(1, 1, 255)).first is None
    assert onnx.load_from_string(runtime_onnx(graph)).graph.output[0].type.tensor_type.elem_type == (
        TensorProto.INT64
    )


def test_div_floors_negative_quotients() -> None:
    values = np.stack(np.meshgrid(np.arange(-20, 21), np.arange(1, 41)), -1).reshape(-1, 1, 2)
    values[:, :, 1] -= 20
    graph = graph_of(
        features(-20, 20, 2),
        Node("x", "slice", ("input",), {"start": 0, "stop": 1}),
        Node("d_minus_20", "slice", ("input",), {"start": 1, "stop": 2}),
        Node("d", "add", ("d_minus_20",), constants={"value": np.array(21)}),
        Node("y", "div", ("x", "d")),
    )
    assert compare_all(graph, values).first is None
    assert OnnxRunner(graph)(np.array([[[-1, 0]]])).item() == -1


@pytest.mark.parametrize(("factor", "kind"), [(1, TensorProto.INT32), (1 << 40, TensorProto.INT64)])
def test_compare_select_and_table_are_equal_in_either_dtype(factor: int, kind: int) -> None:
    # Entries out of reach are too wide for int32, in which the rest of the small graph runs.
    entries = np.array([1 << 50, *range(-81, 81, 2), -(1 << 50)]) * np.array([1, *[factor] * 81, 1])
    graph = graph_of(
        features(-40, 40, 2),
        Node("l", "slice", ("input",), {"start": 0, "stop": 1}),
        Node("r", "slice", ("input",), {"start": 1, "stop": 2}),
        Node("g", "compare", ("l", "r")),
        Node("h", "compare", ("l",), constants={"value": np.array([7])}),
        Node("inner", "select", ("h", "l", "g")),
        Node("y", "select", ("g", "inner", "r")),
        Node("t", "table", ("y",), {"low": -41}, {"values": entries}),
    )
    inputs = np.stack(np.meshgrid(np.arange(-40, 41), np.arange(-40, 41)), -1).reshape(-1, 1, 2)
    assert compare_all(graph, inputs).first is None
    model = onnx.load_from_string(runtime_onnx(graph))
    assert model.graph.output[0].type.tensor_type.elem_type == kind


@pytest.mark.parametrize("offset", [-1, 0, 1])
@pytest.mark.parametrize("factor", [1, 12345])
def test_isqrt_is_exact_beside_perfect_squares(offset: int, factor: int) -> None:
    # factor 12345 makes roots beyond 2^20, where the whole graph runs in int64
    graph = graph_of(
        features(1, 127, 127),
        Node("root", "mul", ("input",), constants={"value": np.array(factor)}),
        Node("square", "mul", ("root", "root")),
        Node("x", "add", ("square",), constants={"value": np.array(offset)}),
        Node("y", "isqrt", ("x",)),
    )
    inputs = np.arange(1, 128).reshape(1, 1, 127)
    assert compare_all(graph, inputs).first is None
    assert (OnnxRunner(graph)(inputs) == inputs * factor - (offset < 0)).all()


def linear(low: int, high: int, weight: IntArray) -> tuple[Graph, list[str]]:
    graph = graph_of(
        features(low, high, weight.shape[1]), Node("y", "linear", ("input",), constants={"weight": weight})
    )
    return graph, [node.op_type for node in onnx.load_from_string(runtime_onnx(graph)).graph.node]


@pytest.mark.parametrize(
    ("low", "high", "largest", "stored"),
    [
        (-127, 127, 64, TensorProto.INT8),
        (-127, 127, 65, TensorProto.UINT8),
        (-127, 127, 127, TensorProto.UINT8),
        (0, 127, 127, TensorProto.INT8),
        (0, 255, 1, TensorProto.INT8),
        (-128, 127, 127, TensorProto.UINT8),
        (-200, 55, 127, TensorProto.UINT8),
        (3, 100, 127, TensorProto.INT8),
    ],
)
def test_int8_products_that_a_kernel_without_vnni_would_saturate_are_of_uint8(
    low: int, high: int, largest: int, stored: int
) -> None:
    """Every corner of the interval against weights of both signs at their largest, on many terms."""
    random = np.random.default_rng(0)
    weight = np.concatenate([np.full((1, 96), largest), random.choice([-largest, largest], (7, 96))])
    graph, kinds = linear(low, high, weight)
    assert "MatMulInteger" in kinds
    (matrix,) = [t for t in onnx.load_from_string(runtime_onnx(graph)).graph.initializer if len(t.dims) == 2]
    assert matrix.data_type == stored
    inputs = random.choice([low, high], (64, 1, 96))
    inputs[0], inputs[1] = low, high
    np.testing.assert_array_equal(OnnxRunner(graph)(inputs), evaluate(graph, inputs))


@pytest.mark.parametrize("bits", [24, 25, 50])
def test_products_beyond_int8_are_exact_at_the_edge_of_their_float(bits: int) -> None:
    """2^24 is the last sum that float32 holds; odd sums beyond it must be in float64."""
    width, weight = 4, (1 << (bits - 10)) - 1
    rows = np.full((3, width), weight)
    rows[1:, 0] += 1
    rows[2] *= -1
    graph, kinds = linear(-255, 255, rows)
    assert "MatMulInteger" not in kinds
    inputs = np.random.default_rng(0).choice([-255, 254, 255], (50, 1, width))
    np.testing.assert_array_equal(OnnxRunner(graph)(inputs), evaluate(graph, inputs))


@pytest.mark.parametrize("shape", [(1, 1), (6, 1), (6, 3), (1, 5)])
def test_matrices_that_only_scale_or_sum_are_no_products(shape: tuple[int, int]) -> None:
    outputs, width = shape
    scaling = np.kron(np.eye(width, dtype=np.int64), np.ones((outputs // width or 1, 1), np.int64))
    weight = scaling * np.arange(1, len(scaling) + 1)[:, None] * 1001 if outputs > 1 else np.ones(shape, int)
    graph, kinds = linear(-300, 300, weight.astype(np.int64))
    assert not {"MatMul", "MatMulInteger"} & set(kinds)
    inputs = np.random.default_rng(0).integers(-300, 301, (5, 1, width))
    np.testing.assert_array_equal(OnnxRunner(graph)(inputs), evaluate(graph, inputs))


def test_a_node_that_changes_nothing_does_not_take_the_inputs_name_away() -> None:
    same = Node("same", "shift", ("input",), {"places": 0})
    graph = graph_of(features(-5, 5, 2), same, Node("y", "add", ("same", "input")))
    assert compare_all(graph, np.array([[[-5, 3]]])).first is None


def test_activations_beyond_int8_are_not_wrapped_into_it() -> None:
    wide = Node("wide", "add", ("input",), constants={"value": np.array(1)})
    linear = Node("y", "linear", ("wide",), constants={"weight": np.ones((1, 2), np.int64)})
    graph = graph_of(features(0, 127, 2), wide, linear)
    assert OnnxRunner(graph)(np.array([[[127, 127]]])).item() == 256


def test_equal_constants_of_one_graph_are_stored_once_and_bytes_repeat() -> None:
    graph, _ = random_graph(n_layer=2)
    content = runtime_onnx(graph)
    assert content == runtime_onnx(graph)
    model = onnx.load_from_string(content)
    onnx.checker.check_model(model, full_check=True)
    raw = [(t.data_type, tuple(t.dims), t.raw_data) for t in model.graph.initializer]
    assert len(raw) == len(set(raw))
    assert {p.key: p.value for p in model.metadata_props}["model_id"] == graph.model_id


def test_batch_size_is_free_and_length_is_not() -> None:
    graph, inputs = random_graph(seq_len=11)
    runner = OnnxRunner(runtime_onnx(graph))
    expected = evaluate(graph, inputs)
    assert all((runner(inputs[:n]) == expected[:n]).all() for n in (1, 5, 8))
    with pytest.raises(MambaintError, match="give an input of shape"):
        runner(inputs[:, :10])


def test_bytes_that_are_no_model_are_refused() -> None:
    with pytest.raises(MambaintError, match="cannot load the model"):
        OnnxRunner(b"not a model")(np.zeros((1, 8, 3), np.int64))


LINEAR = ("embed", "layer0.in_proj", "layer0.out_proj", "logits")


@pytest.mark.parametrize("name", LINEAR)
def test_one_weight_changed_by_one_in_the_onnx_file_is_reported(name: str) -> None:
    """Negative control of the comparison that the whole project rests on."""
    graph, inputs = random_graph(seq_len=17)
    model = onnx.load_from_string(runtime_onnx(graph, trace=True))
    assert compare_all(graph, inputs, model.SerializeToString()).equal
    weight = graph.by_name[name].constants["weight"].T
    for initializer in model.graph.initializer:
        array = numpy_helper.to_array(initializer).copy()
        # Bytes without a sign hold weights that are 128 less.
        stored = weight + 128 if array.dtype == np.uint8 else weight
        if array.shape == weight.shape and (array == stored).all():
            array[-1, -1] += 1
            initializer.CopyFrom(numpy_helper.from_array(array, initializer.name))
            break
    equality = compare_all(graph, inputs, model.SerializeToString())
    assert not equality.equal and 0 < equality.mismatches < equality.values
    assert equality.first == ("onnx", name)
