"""Tiny circuits (2^8 rows, a proof in a tenth of a second) built by hand, and one honest proof of them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from circuits.circuit import Circuit, InputTensor, PublicTensor, Witness
from zk.keys import Keys, make_keys
from zk.package import Package, decode_package
from zk.prove import ProofResult, prove
from zk.srs import Srs, development_srs

LOGROWS = 8
STATEMENT = {"task": "toy", "classes": ["cat", "dog", "owl"], "input": "private"}


def build_onnx(
    nodes: list[Any], inputs: dict[str, int], outputs: dict[str, int], constants: dict[str, Any]
) -> bytes:
    """A serialised graph over flat float tensors."""

    def ends(sizes: dict[str, int]) -> list[Any]:
        return [helper.make_tensor_value_info(n, TensorProto.FLOAT, [s]) for n, s in sizes.items()]

    initializers = [numpy_helper.from_array(np.asarray(v), n) for n, v in constants.items()]
    graph = helper.make_graph(nodes, "tiny", ends(inputs), ends(outputs), initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    return bytes(model.SerializeToString())


def tiny_circuit(weights: tuple[int, int, int] = (2, 3, 5), op: str = "Mul", rows: int = 9) -> Circuit:
    """logits = x op weights over three private x; x and a spare are looked up, the spare's relu is 0."""
    nodes = [
        helper.make_node("Concat", ["x", "spare"], ["all"], axis=0),
        helper.make_node("HardSwish", ["all"], ["looked"]),
        helper.make_node("Gather", ["looked", "last"], ["anchor"], axis=0),
        helper.make_node(op, ["x", "w"], ["logits"]),
    ]
    constants = {"w": np.array(weights, np.float32), "last": np.array([3], np.int64)}
    onnx = build_onnx(nodes, {"x": 3, "spare": 1}, {"logits": 3, "anchor": 1}, constants)
    inputs = tuple(InputTensor(name, ((name, size),)) for name, size in (("x", 3), ("spare", 1)))
    return Circuit(
        model_id=hashlib.sha256(repr((weights, op)).encode()).hexdigest(),
        onnx=onnx,
        logrows=LOGROWS,
        rows=rows,
        inputs=inputs,
        public=(PublicTensor("logits", (3,)), PublicTensor("anchor", (1,), forced=0)),
    )


def tiny_witness(x: tuple[int, int, int] = (1, -7, 4), weights: tuple[int, int, int] = (2, 3, 5)) -> Witness:
    """The honest witness of :func:`tiny_circuit`."""
    logits = [value * weight for value, weight in zip(x, weights, strict=True)]
    return Witness(private={"x": list(x), "spare": [-1]}, public={"logits": logits, "anchor": [0]})


@dataclass(frozen=True)
class Honest:
    """An honest run: everything up to the proof, and the two files on disk."""

    circuit: Circuit
    witness: Witness
    srs: Srs
    keys: Keys
    package: Package
    package_bytes: bytes
    result: ProofResult
    proof_path: Path
    package_path: Path


def run_honestly(circuit: Circuit, witness: Witness, cache: Path, folder: Path) -> Honest:
    """Keys, package and proof for one witness."""
    srs = development_srs(circuit.logrows, cache)
    keys = make_keys(circuit, witness, srs, cache)
    package_bytes = keys.package(STATEMENT).encode()
    result = prove(circuit, witness, keys, package_bytes)
    folder.mkdir()
    (folder / "proof.json").write_bytes(result.file)
    (folder / "verifier.zip").write_bytes(package_bytes)
    return Honest(
        circuit=circuit,
        witness=witness,
        srs=srs,
        keys=keys,
        package=decode_package(package_bytes, "test"),
        package_bytes=package_bytes,
        result=result,
        proof_path=folder / "proof.json",
        package_path=folder / "verifier.zip",
    )


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def honest(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Honest:
    folder = tmp_path_factory.mktemp("honest") / "run"
    return run_honestly(tiny_circuit(), tiny_witness(), cache, folder)


@pytest.fixture(scope="session")
def other(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Honest:
    """A sibling: the same shapes, other weights."""
    folder = tmp_path_factory.mktemp("other") / "run"
    weights = (7, 3, 5)
    return run_honestly(tiny_circuit(weights), tiny_witness(weights=weights), cache, folder)
