"""A circuit of the same shape with other constants, proved under the honest key, does not verify.

One or more for every operation. These are real proofs, and ``mambaint verify`` is what rejects them. The
input is public in these circuits: were it private, a sibling with its columns permuted would prove a true
statement about another input.
"""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from circuits.circuit import Circuit, Witness
from circuits.lowering import LoweredCircuit, build_circuit
from mamba_int.graph import Graph, Node
from mamba_int.operations import OPERATIONS
from tests.attacks.command import accepted
from tests.circuits.conftest import GRAPHS, Array, chain, interpret, node, random_input
from zk import table
from zk.jobs import pack_circuit, pack_witness
from zk.keys import Keys, make_keys
from zk.process import run_job
from zk.proof import Proof
from zk.prove import mock, prove
from zk.srs import development_srs


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


def other_attributes(graph: Graph, name: str, **values: int) -> Graph:
    """The graph with some attributes of one node changed."""
    return replaced(graph, name, attributes={**graph.by_name[name].attributes, **values})


def other_inputs(graph: Graph, name: str, *inputs: str) -> Graph:
    """The graph with one node reading other nodes."""
    return replaced(graph, name, inputs=inputs)


def replaced(graph: Graph, name: str, **fields: object) -> Graph:
    nodes = [dataclasses.replace(n, **fields) if n.name == name else n for n in graph.nodes]  # type: ignore[arg-type]
    return graph.with_nodes(nodes).verify()


def of_slice(*after: Node) -> Graph:
    """Nodes after a slice, whose sibling takes the slice one element further on."""
    return chain(node("s", "slice", "input", start=0, stop=3), *after)


RELU_OF_SLICE = of_slice(node("r", "relu", "s"))
SUM_OF_SLICE = of_slice(node("sum", "reduce", "s", kind="sum"))
MAX_OF_SLICE = of_slice(node("max", "reduce", "s", kind="max"))
LAST_OF_SLICE = of_slice(node("last", "reduce", "s", kind="last"))
NORM_OF_SLICE = of_slice(dataclasses.replace(GRAPHS["norm"]().by_name["y"], inputs=("s",)))
SMALL_SHIFT = chain(node("q", "shift", "input", places=2))

CHANGES: dict[str, tuple[Graph, Callable[[Graph], Graph]]] = {
    "embedding: rows permuted": (GRAPHS["embedding"](), lambda g: reversed_constant(g, "e", "table", 0)),
    "linear: one ternary weight": (
        GRAPHS["linear_two_groups"](),
        lambda g: other_value(g, "lin", "weight", (0, 1), -1),
    ),
    "linear: one bias of two packs": (
        GRAPHS["linear_shifted_two_packs"](),
        lambda g: other_value(g, "lin", "bias", (0,), 3),
    ),
    "linear: columns permuted": (
        GRAPHS["linear_int8_shifted"](),
        lambda g: reversed_constant(g, "lin", "weight"),
    ),
    "linear: outputs permuted": (
        GRAPHS["linear_pooled"](),
        lambda g: reversed_constant(reversed_constant(g, "lin", "weight", 0), "lin", "bias"),
    ),
    "linear: one bias": (GRAPHS["linear_wide"](), lambda g: other_value(g, "lin", "bias", (1,), 3)),
    "linear: places of the packed shift": (
        GRAPHS["linear_split_shift"](),
        lambda g: other_attributes(g, "q", places=7),
    ),
    "conv: taps permuted": (GRAPHS["conv_shifted"](), lambda g: reversed_constant(g, "c", "taps")),
    "add: another operand": (GRAPHS["add"](), lambda g: other_inputs(g, "out", "l", "l")),
    "add: one constant": (
        GRAPHS["add_constant"](),
        lambda g: other_value(g, "out", "value", (3,), 999),
    ),
    "sub: operands swapped": (GRAPHS["sub"](), lambda g: other_inputs(g, "out", "r", "l")),
    "sub: one constant": (GRAPHS["sub_constant"](), lambda g: other_value(g, "out", "value", (), 8)),
    "mul: another operand": (GRAPHS["mul"](), lambda g: other_inputs(g, "out", "l", "l")),
    "mul: one constant": (GRAPHS["mul_constant"](), lambda g: other_value(g, "out", "value", (), 3)),
    "shift: places": (SMALL_SHIFT, lambda g: other_attributes(g, "q", places=3)),
    "shift: places of a split one": (GRAPHS["shift_11"](), lambda g: other_attributes(g, "q", places=12)),
    "clamp: one end": (GRAPHS["clamp_signed"](), lambda g: other_attributes(g, "c", high=12)),
    "clamp: one end of a wide one": (GRAPHS["clamp_wide"](), lambda g: other_attributes(g, "c", high=76)),
    "clamp: one end of a shifted one": (
        GRAPHS["clamp_shifted"](),
        lambda g: other_attributes(g, "c", high=6),
    ),
    "relu: of other elements": (RELU_OF_SLICE, lambda g: other_attributes(g, "s", start=1, stop=4)),
    "norm: limit of the squared copy": (
        GRAPHS["norm_clamped"](),
        lambda g: other_attributes(g, "y", input_limit=24),
    ),
    "norm: of other elements": (
        NORM_OF_SLICE,
        lambda g: other_attributes(g, "s", start=1, stop=4),
    ),
    "rotate: one sine": (GRAPHS["rotate_table"](), lambda g: other_value(g, "r", "sin", (1, 0), 5)),
    "rotate: one shear": (GRAPHS["rotate_shear"](), lambda g: other_value(g, "r", "gam", (1, 0), 5)),
    "ssd: one skip connection": (
        GRAPHS["ssd_carried"](),
        lambda g: other_value(g, "y_acc", "D", (1,), -1),
    ),
    "ssd: rotation of the carried state": (
        GRAPHS["ssd_carried"](),
        lambda g: other_value(g, "y_acc", "sin_Q", (0,), -20),
    ),
    "ssd: limit of the state products": (
        GRAPHS["ssd_one_chunk"](),
        lambda g: other_attributes(g, "y_acc", G_limit=28),
    ),
    "scan: one skip connection": (
        GRAPHS["scan_complex"](),
        lambda g: other_value(g, "y_acc", "D", (1,), 5),
    ),
    "scan: limit of the states": (GRAPHS["scan_real"](), lambda g: other_attributes(g, "y_acc", H_limit=30)),
    "scan: q and B exchanged": (
        GRAPHS["scan_quaternion"](),
        lambda g: other_inputs(g, "y_acc", "x", "B", "q", "C"),
    ),
    "isqrt: of a larger square": (
        GRAPHS["isqrt"](),
        lambda g: other_value(g, "square4", "value", (), 49),
    ),
    "div: by another divisor": (GRAPHS["div"](), lambda g: other_value(g, "divisor", "value", (), 9)),
    "slice: other elements": (GRAPHS["slice"](), lambda g: other_attributes(g, "s", start=0, stop=2)),
    "table: one entry moved": (GRAPHS["table"](), lambda g: reversed_constant(g, "out", "values")),
    "compare: one constant": (
        GRAPHS["compare_constant"](),
        lambda g: other_value(g, "out", "value", (3,), -17),
    ),
    "compare: one constant of a wide one": (
        GRAPHS["compare_wide_constant"](),
        lambda g: other_value(g, "out", "value", (3,), -8000),
    ),
    "compare: sides exchanged": (GRAPHS["compare"](), lambda g: other_inputs(g, "out", "r", "l")),
    "select: branches exchanged": (GRAPHS["select"](), lambda g: other_inputs(g, "out", "g", "r", "l")),
    "concat: parts exchanged": (GRAPHS["concat"](), lambda g: other_inputs(g, "j", "s", "s", "input")),
    "reduce: max of other elements": (MAX_OF_SLICE, lambda g: other_attributes(g, "s", start=1, stop=4)),
    "reduce: sum of other elements": (SUM_OF_SLICE, lambda g: other_attributes(g, "s", start=1, stop=4)),
    "reduce: last of other elements": (LAST_OF_SLICE, lambda g: other_attributes(g, "s", start=1, stop=4)),
}
SIBLINGS = {name: (graph, change(graph)) for name, (graph, change) in CHANGES.items()}


def graph_input(honest: Graph, sibling: Graph) -> Array:
    """An input on which the two models differ."""
    for seed in range(300):
        x = random_input(honest, seed)
        if (interpret(honest, x)[honest.output] != interpret(sibling, x)[sibling.output]).any():
            return x
    raise AssertionError("the sibling computes the same")


def prove_under_foreign_keys(circuit: Circuit, witness: Witness, keys: Keys, folder: Path) -> bytes:
    """The sibling's own witness and circuit, with the honest proving key."""
    folder.mkdir()
    (folder / "circuit.onnx").write_bytes(circuit.onnx)
    packed = pack_circuit(circuit)
    committed = packed["committed"]
    table.prepare(
        folder, logrows=circuit.logrows, public=circuit.public, committed=committed, rows=circuit.rows
    )
    (folder / "vk.key").write_bytes((keys.folder / "vk.key").read_bytes())
    (folder / "pk.key").write_bytes((keys.folder / "pk.key").read_bytes())
    job = {
        "witness": pack_witness(circuit, witness),
        "circuit": {**packed, "circuit_id": keys.circuit_id},
        "keys": str(folder),
        "srs": str(keys.srs.path),
    }
    try:
        return bytes.fromhex(run_job("prove", job, what="forging", timeout=60)["proof"])
    finally:
        (folder / "pk.key").unlink()


def assert_forgery_fails(
    honest: LoweredCircuit, sibling: LoweredCircuit, true_input: Array, x: Array, cache: Path, folder: Path
) -> None:
    """The sibling's proof about ``x`` under the honest key is invalid, with its outputs and the true ones."""
    circuit = honest.circuit
    assert circuit.rows == sibling.circuit.rows, "a sibling has the same shape"
    assert (circuit.private, circuit.public) == (sibling.circuit.private, sibling.circuit.public)
    assert circuit.onnx != sibling.circuit.onnx
    keys = make_keys(circuit, honest.witness(true_input), development_srs(circuit.logrows, cache), cache)
    package = keys.package({}).encode()
    try:
        true_proof = prove(circuit, honest.witness(true_input), keys, package).file
        assert accepted(true_proof, package)
        forged = prove_under_foreign_keys(sibling.circuit, sibling.witness(x), keys, folder)
    finally:
        shutil.rmtree(keys.folder)
    claims = (sibling.witness(x).public, honest.witness(true_input).public)
    for public in claims:
        claim = Proof(
            model_id=circuit.model_id,
            circuit_id=keys.circuit_id,
            verifier_package=hashlib.sha256(package).hexdigest(),
            public={"input": public["input"], "logits": public["logits"]},
            segments=(forged,),
        )
        assert not accepted(claim.encode(), package)


CLAIMED_SIBLINGS = [
    "linear: one ternary weight",
    "linear: columns permuted",
    "linear: places of the packed shift",
    "conv: taps permuted",
    "ssd: one skip connection",
    "ssd: rotation of the carried state",
    "scan: one skip connection",
    "scan: q and B exchanged",
]
"""Those whose products are also tried as claims at a random point."""


@pytest.mark.parametrize(
    ("name", "challenged"),
    [*((name, False) for name in SIBLINGS), *((name, True) for name in CLAIMED_SIBLINGS)],
)
def test_sibling_circuit_under_the_honest_key_does_not_verify(
    name: str, challenged: bool, cache: Path, tmp_path: Path
) -> None:
    graphs = SIBLINGS[name]
    x = graph_input(*graphs)
    logrows = max(build_circuit(graph, True, challenged=challenged).circuit.logrows for graph in graphs)
    honest, sibling = (build_circuit(graph, True, logrows, challenged) for graph in graphs)
    assert honest.circuit.challenged == challenged
    assert_forgery_fails(honest, sibling, x, x, cache, tmp_path / "sibling")


@pytest.mark.parametrize("end", ["low", "high"])
def test_input_outside_the_domain_proved_by_a_sibling_with_a_wider_one(
    end: str, cache: Path, tmp_path: Path
) -> None:
    honest, x = build_circuit(GRAPHS["input"](), public_input=True), np.zeros((3, 3), np.int64)
    ends = {"low": -40, "high": 40}
    beyond = ends[end] + (1 if end == "high" else -1)
    wider = other_attributes(GRAPHS["input"](), "input", **{end: beyond})
    sibling = build_circuit(wider, public_input=True, logrows=honest.circuit.logrows)
    assert_forgery_fails(honest, sibling, x, np.full((3, 3), beyond), cache, tmp_path / "sibling")


def test_every_operation_has_a_sibling() -> None:
    # That of the input is the test above.
    assert {name.split(":")[0] for name in SIBLINGS} == set(OPERATIONS) - {"input"}


def test_private_input_is_not_bound_to_the_column_order_which_is_why_siblings_show_it() -> None:
    graph, sibling = SIBLINGS["linear: columns permuted"]
    x = random_input(graph)
    honest, other = build_circuit(graph), build_circuit(sibling)
    assert mock(other.circuit, [other.witness(x[:, ::-1])]) == [True]
    assert other.witness(x[:, ::-1]).public["logits"] == honest.witness(x).public["logits"]
