"""A graph file is the model that its id names, or it is refused in one sentence."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mamba_int.errors import MambaintError
from mamba_int.files import canonical_json
from mamba_int.graph import Graph, Node
from mamba_int.interpreter import check_input, evaluate
from tests.circuits.conftest import GRAPHS
from tests.circuits_runtime.models import random_graph
from tests.mamba_int.graphs import FORMS, chain, node, random_batch


def small() -> Graph:
    """A model with a card."""
    graph = random_graph(seq_len=5, chunk_size=4, d_model=4)[0]
    return dataclasses.replace(graph, card={"task": "classification", "classes": ["a", "b"], "accuracy": 0.5})


@pytest.fixture(scope="module")
def graph() -> Graph:
    return small()


@pytest.fixture(scope="module")
def content(graph: Graph, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("graph") / "model.mint"
    graph.save(path)
    return path.read_bytes()


def parts(content: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    """The document in the metadata, and the constants."""
    length = int.from_bytes(content[:8], "little")
    metadata = json.loads(content[8 : 8 + length])["__metadata__"]
    return json.loads(metadata["mambaint"]), safetensors.numpy.load(content)


def joined(document: Any, tensors: dict[str, Any], renewed: bool = True) -> bytes:
    """A file again; with a model id that fits its description, as a careful forger would make it."""
    if renewed:
        document["model_id"] = hashlib.sha256(canonical_json(document["graph"])).hexdigest()
    return safetensors.numpy.save(tensors, {"mambaint": canonical_json(document).decode()})


def refusal(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    with pytest.raises(MambaintError) as caught:
        Graph.load(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- round trip -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GRAPHS)
def test_every_operation_survives_the_file(name: str, tmp_path: Path) -> None:
    before = GRAPHS[name]()
    before.save(tmp_path / "g")
    after = Graph.load(tmp_path / "g")
    assert after.model_id == before.model_id
    assert after.types == before.types
    inputs = random_batch(before)
    assert (evaluate(after, inputs) == evaluate(before, inputs)).all()


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_model_survives_the_file(form: str, tmp_path: Path) -> None:
    before, inputs = random_graph(**FORMS[form])
    before.save(tmp_path / "g")
    after = Graph.load(tmp_path / "g")
    assert (after.model_id, after.output, after.seq_len) == (before.model_id, before.output, before.seq_len)
    assert (evaluate(after, inputs) == evaluate(before, inputs)).all()
    assert all(value.dtype == np.int64 for entry in after.nodes for value in entry.constants.values())


def test_same_model_same_bytes(graph: Graph, content: bytes, tmp_path: Path) -> None:
    for _ in range(5):
        small().save(tmp_path / "g")
        assert (tmp_path / "g").read_bytes() == content


def test_nothing_in_the_file_is_a_pickle(content: bytes) -> None:
    with pytest.raises((pickle.UnpicklingError, ValueError)):
        pickle.loads(content)
    source = Path(__file__).parents[2] / "mamba_int"
    for path in source.rglob("*.py"):
        text = path.read_text()
        assert not re.search(r"import pickle|(?<!safetensors\.)torch\.load\(|allow_pickle=True", text)
        assert text.count("np.load(") == text.count("allow_pickle=False")


# -- the model id ---------------------------------------------------------------------------------------


def with_node(graph: Graph, name: str, **changes: Any) -> Graph:
    return graph.with_nodes(
        [dataclasses.replace(entry, **changes) if entry.name == name else entry for entry in graph.nodes]
    )


def test_model_id_does_not_know_the_order_of_attributes_or_the_dtype(graph: Graph) -> None:
    shuffled = graph.with_nodes(
        [
            dataclasses.replace(
                entry,
                attributes=dict(reversed(entry.attributes.items())),
                constants={
                    key: value.astype(np.int32) if np.abs(value).max() < 1 << 30 else value
                    for key, value in reversed(entry.constants.items())
                },
            )
            for entry in graph.nodes
        ]
    )
    shuffled = dataclasses.replace(shuffled, card=dict(reversed(graph.card.items())))
    assert shuffled.model_id == graph.model_id == small().model_id


def test_model_id_does_not_know_the_layout_in_memory(graph: Graph) -> None:
    weight = graph.by_name["embed"].constants["weight"]
    held = dict(graph.by_name["embed"].constants) | {"weight": np.asfortranarray(weight)}
    assert with_node(graph, "embed", constants=held).model_id == graph.model_id
    held["weight"] = weight.astype(">i8")
    assert with_node(graph, "embed", constants=held).model_id == graph.model_id


def variants(graph: Graph) -> dict[str, Graph]:
    """Models that differ in the least thing."""
    weight = graph.by_name["layer0.in_proj"].constants["weight"].copy()
    assert set(np.unique(weight)) == {-1, 0, 1}
    weight[0, 0] = 1 if weight[0, 0] != 1 else 0
    projection, ssd = graph.by_name["layer0.in_proj"], graph.by_name["layer0.ssd"]
    last = graph.nodes[-1]
    return {
        "the same": graph,
        "one weight": with_node(
            graph, projection.name, constants=dict(projection.constants) | {"weight": weight}
        ),
        "transposed": with_node(
            graph,
            projection.name,
            constants=dict(projection.constants) | {"weight": projection.constants["weight"].T},
        ),
        "one attribute": with_node(
            graph, ssd.name, attributes=dict(ssd.attributes) | {"M_align": ssd.integer("M_align") + 1}
        ),
        "swapped operands": with_node(
            graph, ssd.name, inputs=(ssd.inputs[0], ssd.inputs[2], ssd.inputs[1], *ssd.inputs[3:])
        ),
        "scale": with_node(graph, last.name, frac=last.frac + 1),
        "operation": with_node(graph, "layer0.residual_wide", op="sub"),
        "card": dataclasses.replace(graph, card=dict(graph.card) | {"accuracy": 0.6}),
        "classes": dataclasses.replace(graph, card=dict(graph.card) | {"classes": ["b", "a"]}),
        "length": dataclasses.replace(graph, seq_len=graph.seq_len + 1),
        "output": dataclasses.replace(graph, output=graph.nodes[-2].name),
        "one node less": graph.with_nodes(list(graph.nodes[:-1])),
    }


def test_model_id_changes_with_anything_that_changes_the_model(graph: Graph) -> None:
    ids = {name: other.model_id for name, other in variants(graph).items()}
    assert ids["the same"] == graph.model_id
    assert len(set(ids.values())) == len(ids)


# -- damaged files --------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(draw=st.data())
def test_damaged_file_is_refused_in_one_sentence(
    content: bytes, graph: Graph, tmp_path: Path, draw: st.DataObject
) -> None:
    damaged = bytearray(content)
    if draw.draw(st.booleans()):
        damaged = damaged[: draw.draw(st.integers(0, len(content) - 1))]
    else:
        damaged[draw.draw(st.integers(0, len(content) - 1))] ^= 1 << draw.draw(st.integers(0, 7))
    path = tmp_path / "g"
    path.write_bytes(bytes(damaged))
    try:
        loaded = Graph.load(path)
    except MambaintError as error:
        assert "\n" not in str(error)
    else:
        # A flipped bit may spare the model: white space or the layout of the header.
        assert loaded.model_id == graph.model_id


@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_bit_flipped_in_the_constants_is_noticed(content: bytes, tmp_path: Path, place: str) -> None:
    start = 8 + int.from_bytes(content[:8], "little")
    index = {"first": start, "middle": (start + len(content)) // 2, "last": len(content) - 1}[place]
    damaged = bytearray(content)
    damaged[index] ^= 1
    assert "was altered" in refusal(tmp_path / "g", bytes(damaged))


def test_file_of_another_program_is_refused(content: bytes, tmp_path: Path) -> None:
    tensors = {"w": np.zeros(2, np.float32)}
    foreign = {
        "empty": b"",
        "zip": b"PK\x03\x04" + bytes(100),
        "json": b'{"format": "mambaint-graph"}',
        "pickle": pickle.dumps({"graph": 1}),
        "safetensors": safetensors.numpy.save(tensors),
        "other metadata": safetensors.numpy.save(tensors, {"format": "pt"}),
        "longer": content + b"\0",
    }
    for name, data in foreign.items():
        assert "is not a mambaint graph" in refusal(tmp_path / "g", data), name
    with pytest.raises(MambaintError, match="cannot read"):
        Graph.load(tmp_path / "missing")
    no_json = safetensors.numpy.save(tensors, {"mambaint": "{"})
    assert "is not valid JSON" in refusal(tmp_path / "g", no_json)


def test_duplicate_key_in_the_document_is_refused(content: bytes, tmp_path: Path) -> None:
    document, tensors = parts(content)
    text = canonical_json(document).decode()
    doubled = text.replace('"seq_len":5', '"seq_len":5,"seq_len":5')
    assert doubled != text
    data = safetensors.numpy.save(tensors, {"mambaint": doubled})
    assert "duplicate key" in refusal(tmp_path / "g", data)


FORGERIES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "version": (lambda g: g.update(version=2), "version 2, not 1"),
    "format": (lambda g: g.update(format="onnx"), "not 1|onnx"),
    "lacks": (lambda g: g.pop("seq_len"), "lacks 'seq_len'"),
    "lacks_frac": (lambda g: g["nodes"][3].pop("frac"), "lacks 'frac'"),
    "extra_entry": (lambda g: g.update(more=1), "altered"),
    "extra_node_entry": (lambda g: g["nodes"][0].update(more=1), "altered"),
    "unknown_op": (lambda g: g["nodes"][1].update(op="exec"), "unknown operation 'exec'"),
    "op_is_python": (lambda g: g["nodes"][1].update(op="__class__"), "unknown operation"),
    "twice": (lambda g: g["nodes"].append(copy.deepcopy(g["nodes"][-1])), "is defined twice"),
    "forward": (lambda g: g["nodes"].reverse(), "before it is defined"),
    "itself": (lambda g: g["nodes"][2].update(inputs=[g["nodes"][2]["name"]]), "before it is defined"),
    "two_inputs": (
        lambda g: g["nodes"].append(copy.deepcopy(g["nodes"][0]) | {"name": "second"}),
        "exactly one input",
    ),
    "no_input": (lambda g: g["nodes"].pop(0), "before it is defined|exactly one input"),
    "card_is_text": (lambda g: g.update(card="x"), "card is not of type dict"),
    "card_is_null": (lambda g: g.update(card=None), "card is not of type dict"),
    "nested_input": (lambda g: g["nodes"][1].update(inputs=[[1]]), "an input is not of type str"),
    "name_is_no_text": (lambda g: g["nodes"][1].update(name={}), "name is not of type str"),
    "frac_is_text": (lambda g: g["nodes"][-1].update(frac="x"), "frac is not of type int"),
    "frac_is_no_whole_number": (lambda g: g["nodes"][-1].update(frac=3.5), "frac is not of type int"),
    "no_steps": (lambda g: g.update(seq_len=0), "seq_len is not positive"),
    "no_nodes": (lambda g: g.update(nodes=[]), "constants that no node names"),
    "no_output": (lambda g: g.update(output="nowhere"), "'nowhere' is named as output but not defined"),
    "too_few_operands": (lambda g: g["nodes"][-1].update(inputs=[]), "malformed"),
    "too_many_operands": (lambda g: g["nodes"][-1].update(inputs=["input", "input"]), "malformed"),
    "other_shape": (lambda g: g["nodes"][0]["attributes"].update(features=4), "does not fit the input"),
    "empty_interval": (lambda g: g["nodes"][0]["attributes"].update(low=99), "low exceeds high"),
    "lost_attribute": (lambda g: g["nodes"][0]["attributes"].pop("low"), "malformed"),
    "lost_constant": (lambda g: g["nodes"][1]["constants"].pop("weight"), "constants that no node names"),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_forged_description_with_a_fitting_id_is_refused(content: bytes, tmp_path: Path, name: str) -> None:
    change, words = FORGERIES[name]
    document, tensors = parts(content)
    assert Graph.load(write(tmp_path / "same", joined(document, tensors)))
    change(document["graph"])
    assert re.search(words, refusal(tmp_path / "g", joined(document, tensors)))


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("name", ["layer0.in_proj:weight", "layer0.ssd:D", "logits:bias"])
def test_altered_constant_with_a_stale_id_is_refused(content: bytes, tmp_path: Path, name: str) -> None:
    document, tensors = parts(content)
    tensors[name].flat[0] ^= 1
    assert "was altered" in refusal(tmp_path / "g", joined(document, tensors, renewed=False))
    # A fresh id of the old description does not help: it holds the digest of the constant.
    assert "was altered" in refusal(tmp_path / "g", joined(document, tensors))


def test_missing_constant_is_refused(content: bytes, tmp_path: Path) -> None:
    document, tensors = parts(content)
    del tensors["layer0.ssd:D"]
    assert "lacks" in refusal(tmp_path / "g", joined(document, tensors))


# -- structure ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "entry",
    [
        node("y", "linear", "input", constants={"weight": np.ones((2, 4))}),
        node("y", "linear", "input", constants={"weight": np.ones(3)}),
        node("y", "linear", "input", constants={"weight": np.ones((2, 3)), "bias": np.ones(3)}),
        node("y", "conv", "input", constants={"taps": np.ones((4, 2))}),
        node("y", "conv", "input", constants={"taps": np.ones(3)}),
        node("y", "embedding", "input", constants={"table": np.ones((9, 2))}),
        node("y", "add", "input", constants={"value": np.ones(2)}),
        node("y", "add", "input", constants={"value": np.ones((5, 3))}),
        node("y", "add", "input", constants={"value": np.ones(0)}),
        node("y", "mul", "input", "input", "input"),
        node("y", "shift", "input", places=41),
        node("y", "shift", "input", places=-25),
        node("y", "clamp", "input", low=2, high=1, saturation=True),
        node("y", "clamp", "input", low=0, high=1, saturation=1),
        node("y", "norm", "input", input_shift=0, input_limit=0, octaves=4, per_octave=1),
        node("y", "norm", "input", input_shift=0, input_limit=9, octaves=17, per_octave=1),
        node("y", "norm", "input", input_shift=0, input_limit=9, octaves=4, per_octave=3),
        node("y", "norm", "input", input_shift=0, input_limit=9, octaves=4, per_octave=1, frac=4),
        node("y", "isqrt", "input"),
        node("y", "div", "input", "input"),
        node("y", "compare", "input", constants={"value": np.ones(2)}),
        node("y", "compare", "input", "input", "input"),
        node("y", "select", "input", "input", "input"),
        node("y", "select", "input", "input"),
        node("y", "table", "input", constants={"values": np.ones(9)}, low=0),
        node("y", "table", "input", constants={"values": np.ones(8)}, low=-1),
        node("y", "table", "input", constants={"values": np.ones(99)}, low=-(10**30)),
        node("y", "table", "input", constants={"values": np.ones(1025)}, low=-1),
        node("y", "table", "input", constants={"values": np.ones((9, 1))}, low=-1),
        node("y", "table", "input", constants={"values": np.ones(0)}, low=-1),
        node("y", "table", "input", low=-1),
        node("y", "slice", "input", start=0, stop=4),
        node("y", "slice", "input", start=-1, stop=2),
        node("y", "slice", "input", start=2, stop=2),
        node("y", "reduce", "input", kind="mean"),
        node("y", "rotate", "input", form="table", period=5, constant_frac=4),
        node("y", "rotate", "input", form="givens", period=5, constant_frac=4),
    ],
    ids=lambda entry: f"{entry.op}-{'-'.join(map(str, entry.attributes.values()))}",
)
def test_operation_that_does_not_fit_is_refused_by_name(entry: Node) -> None:
    source = node("input", "input", low=-1, high=7, features=3)
    with pytest.raises(MambaintError, match=r"node 'y' .*is malformed") as caught:
        Graph((source, entry), "y", 5).verify()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("low", "high"), [(0, 2), (-1, 1), (-1, 0), (2, 2)])
def test_choice_by_what_can_be_other_than_zero_and_one_is_refused(low: int, high: int) -> None:
    condition = node("c", "clamp", "input", low=low, high=high, saturation=False)
    with pytest.raises(MambaintError, match=r"'y' .*the condition can be other than 0 and 1"):
        chain(condition, node("y", "select", "c", "input", "input"), width=2, low=-5, high=5)


def test_choice_between_tensors_of_other_shapes_is_refused() -> None:
    nodes = [node("c", "compare", "input", "input"), node("n", "slice", "input", start=0, stop=1)]
    for operands in (("n", "input", "input"), ("c", "n", "input"), ("c", "input", "n"), ("c", "n", "n")):
        with pytest.raises(MambaintError, match=r"'y' .*operands differ in shape"):
            chain(*nodes, node("y", "select", *operands), width=2, low=0, high=1)


def test_table_of_the_most_entries_covers_just_its_interval() -> None:
    held = {"values": np.arange(1024)}
    entry = node("y", "table", "input", constants=held, low=-500)
    assert chain(entry, width=1, low=-500, high=523).types["y"].high == 1023
    for low, high in ((-501, 523), (-500, 524)):
        with pytest.raises(MambaintError, match=rf"'y' .*{low}\.\.{high} exceeds the table"):
            chain(entry, width=1, low=low, high=high)


@pytest.mark.parametrize("value", [-1, 10**9, 10**30])
@pytest.mark.parametrize(
    ("name", "key"),
    [("layer0.norm_wide", "input_shift"), ("layer0.norm_wide", "octaves"), ("layer0.B_hat", "constant_frac")]
    + [
        ("layer0.ssd", key) for key in ("chunk_size", "M_shift", "H_align", "u_align", "A_bits", "decay_bits")
    ],
)
def test_absurd_attribute_is_refused_at_once(graph: Graph, name: str, key: str, value: int) -> None:
    """Not after 10^30 rounds of a loop, and not by running out of memory."""
    attributes = dict(graph.by_name[name].attributes) | {key: value}
    with pytest.raises(MambaintError, match="is malformed"):
        with_node(graph, name, attributes=attributes).verify()


def test_scan_without_chunks_is_refused(graph: Graph) -> None:
    attributes = dict(graph.by_name["layer0.ssd"].attributes) | {"chunk_size": 0}
    with pytest.raises(MambaintError, match="chunk_size is not inside"):
        with_node(graph, "layer0.ssd", attributes=attributes).verify()


def test_bit_rule_names_the_node_that_breaks_it() -> None:
    square, fourth = node("square", "mul", "input", "input"), node("fourth", "mul", "square", "square")
    graph = chain(square, fourth, width=1, low=0, high=65)
    assert graph.max_bits == 25
    assert graph.verify(25) is graph
    with pytest.raises(MambaintError, match="'fourth' can reach 17850625, beyond 24 bits"):
        graph.verify(24)


# -- inputs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([[[1, 2]]], "shape"),
        ([[1, 2, 3]], "shape"),
        ([], "shape"),
        (np.zeros((1, 4, 3)), r"shape \[1, 4, 3\], the model takes \[batch, 5, 3\]"),
        ([[[1], [1, 2]]], "ragged"),
        ("text", "not numeric"),
        ([[["a"] * 3] * 5], "not numeric"),
        (np.full((1, 5, 3), 0.5), r"0\.5 at \[0, 0, 0\] is not an integer in 0\.\.16"),
        (np.full((1, 5, 3), np.nan), "nan"),
        (np.full((1, 5, 3), np.inf), "inf"),
        (np.full((1, 5, 3), 17), "17"),
        (np.full((1, 5, 3), -1), "-1"),
        ([[[2**70] * 3] * 5], "at"),
        (np.full((1, 5, 3), 2**64 - 1, np.uint64), "at"),
    ],
)
def test_input_that_is_none_is_told_where(graph: Graph, values: Any, words: str) -> None:
    with pytest.raises(MambaintError, match=words) as caught:
        check_input(graph, values)
    assert "\n" not in str(caught.value)


def test_floats_that_are_integers_are_taken(graph: Graph) -> None:
    values = np.arange(15).reshape(1, 5, 3)
    assert (check_input(graph, values.astype(np.float32)) == values).all()
    assert check_input(graph, values.astype(np.int8)).dtype == np.int64
