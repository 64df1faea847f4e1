"""A circuit of the same shape with other constants, proved under the honest key, does not verify.

The input is public in these circuits: were it private, a sibling with its columns permuted would prove a
true statement about another input.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from circuits.circuit import Circuit
from circuits.lowering import LoweredCircuit, build_circuit
from mamba_int.graph import Graph
from tests.circuits.conftest import GRAPHS, MODELS, Array, interpret, native_graph, random_input
from zk import table
from zk.jobs import pack_witness
from zk.keys import Keys, make_keys
from zk.process import run_job
from zk.proof import Proof
from zk.prove import mock, prove
from zk.srs import development_srs
from zk.verify import check


def reversed_constant(graph: Graph, name: str, key: str, axis: int = -1) -> Graph:
    """The graph with one constant's order reversed along an axis."""
    held = graph.by_name[name].constants
    changed = {**held, key: np.flip(held[key], axis).copy()}
    return replaced(graph, name, constants=changed)


def other_value(graph: Graph, name: str, key: str, index: tuple[int, ...], value: int) -> Graph:
    """The graph with one element of one constant changed."""
    held = graph.by_name[name].constants
    array = held[key].copy()
    assert array[index] != value
    array[index] = value
    return replaced(graph, name, constants={**held, key: array})


def other_attribute(graph: Graph, name: str, key: str, value: int) -> Graph:
    """The graph with one attribute changed."""
    return replaced(graph, name, attributes={**graph.by_name[name].attributes, key: value})


def replaced(graph: Graph, name: str, **fields: object) -> Graph:
    nodes = [dataclasses.replace(n, **fields) if n.name == name else n for n in graph.nodes]  # type: ignore[arg-type]
    return graph.with_nodes(nodes).verify()


SIBLINGS = {
    "one ternary weight": (
        GRAPHS["linear_two_groups"](),
        other_value(GRAPHS["linear_two_groups"](), "lin", "weight", (0, 1), -1),
    ),
    "columns permuted": (
        GRAPHS["linear_int8_shifted"](),
        reversed_constant(GRAPHS["linear_int8_shifted"](), "lin", "weight"),
    ),
    "outputs permuted": (
        GRAPHS["linear_pooled"](),
        reversed_constant(reversed_constant(GRAPHS["linear_pooled"](), "lin", "weight", 0), "lin", "bias"),
    ),
    "taps permuted": (
        GRAPHS["conv_shifted"](),
        reversed_constant(GRAPHS["conv_shifted"](), "c", "taps"),
    ),
    "one clamp": (GRAPHS["clamp_signed"](), other_attribute(GRAPHS["clamp_signed"](), "c", "high", 12)),
    "rows of the embedding permuted": (
        GRAPHS["embedding"](),
        reversed_constant(GRAPHS["embedding"](), "e", "table", 0),
    ),
    "one skip connection": (
        GRAPHS["ssd_carried"](),
        other_value(GRAPHS["ssd_carried"](), "y_acc", "D", (1,), -1),
    ),
}


def graph_input(honest: Graph, sibling: Graph) -> Array:
    """An input on which the two models differ."""
    for seed in range(20):
        x = random_input(honest, seed)
        if (interpret(honest, x)[honest.output] != interpret(sibling, x)[sibling.output]).any():
            return x
    raise AssertionError("the sibling computes the same")


def prove_under_foreign_keys(
    circuit: Circuit, lowered: LoweredCircuit, x: Array, keys: Keys, folder: Path
) -> bytes:
    """The sibling's own witness and circuit, with the honest proving key."""
    folder.mkdir()
    (folder / "circuit.onnx").write_bytes(circuit.onnx)
    table.prepare(folder, logrows=circuit.logrows, public=circuit.public, rows=circuit.rows)
    (folder / "pk.key").write_bytes((keys.folder / "pk.key").read_bytes())
    job = {
        "witness": pack_witness(circuit, lowered.witness(x)),
        "keys": str(folder),
        "srs": str(keys.srs.path),
    }
    return bytes.fromhex(run_job("prove", job, what="forging", timeout=60)["proof"])


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize("name", SIBLINGS)
def test_sibling_circuit_under_the_honest_key_does_not_verify(name: str, cache: Path, tmp_path: Path) -> None:
    graphs = SIBLINGS[name]
    x = graph_input(*graphs)
    logrows = max(build_circuit(graph, public_input=True).circuit.logrows for graph in graphs)
    honest, sibling = (build_circuit(graph, public_input=True, logrows=logrows) for graph in graphs)
    assert honest.circuit.rows == sibling.circuit.rows, "a sibling has the same shape"
    assert honest.circuit.private == sibling.circuit.private
    keys = make_keys(honest.circuit, honest.witness(x), development_srs(logrows, cache), cache)
    package = keys.package({})
    digest = hashlib.sha256(package.encode()).hexdigest()

    true_proof = prove(honest.circuit, honest.witness(x), keys, package.encode()).file
    assert check(true_proof, package, digest).valid

    forged = prove_under_foreign_keys(sibling.circuit, sibling, x, keys, tmp_path / "sibling")
    for lowered in (sibling, honest):  # claiming the sibling's outputs, or the true ones
        public = lowered.witness(x).public
        claim = Proof(
            model_id=honest.circuit.model_id,
            circuit_id=keys.circuit_id,
            verifier_package=digest,
            public={"input": public["input"], "logits": public["logits"]},
            segments=(forged,),
        )
        assert not check(claim.encode(), package, digest).valid


def test_a_real_proof_of_a_whole_model_shows_the_interpreters_logits(cache: Path) -> None:
    # prove() itself refuses if EZKL's outputs differ from the witness.
    graph = native_graph(**{**MODELS["int8_weights"], "seq_len": 5, "chunk_size": 2})
    lowered = build_circuit(graph)
    x = random_input(graph, 5)
    truth, witness = interpret(graph, x), lowered.witness(x)
    sources = {name.removesuffix(".q"): values for name, values in witness.private.items()}
    # A rotation leaves steps that turn nothing out of its private cells.
    auxiliary = {name: v for name, v in sources.items() if name in truth and len(v) >= truth[name].size}
    assert len(auxiliary) >= 3
    for name, values in auxiliary.items():
        expected = truth[name].ravel().tolist()
        offset = values[0] - expected[0]  # a saturating shift guesses q - low
        assert [value - offset for value in values[: len(expected)]] == expected, name
    keys = make_keys(lowered.circuit, witness, development_srs(lowered.circuit.logrows, cache), cache)
    package = keys.package({}).encode()
    result = prove(lowered.circuit, witness, keys, package)
    assert json.loads(result.file)["public"] == {"logits": truth[graph.output].ravel().tolist()}
    other = random_input(graph, 6)
    again = prove(lowered.circuit, lowered.witness(other), keys, package)
    assert json.loads(again.file)["public"] == {"logits": interpret(graph, other)["logits"].ravel().tolist()}


def test_private_input_is_not_bound_to_the_column_order_which_is_why_siblings_show_it() -> None:
    graph, sibling = SIBLINGS["columns permuted"]
    x = random_input(graph)
    honest, other = build_circuit(graph), build_circuit(sibling)
    assert mock(other.circuit, [other.witness(x[:, ::-1])]) == [True]
    assert other.witness(x[:, ::-1]).public["logits"] == honest.witness(x).public["logits"]
