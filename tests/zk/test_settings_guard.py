"""Settings under which a proof would not mean what we say: each refused, by name."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper

from circuits.circuit import Circuit, InputTensor, PublicTensor, Witness
from mamba_int.errors import MambaintError
from tests.zk.conftest import Honest, build_onnx, run_honestly, tiny_circuit, tiny_witness
from zk.keys import make_keys
from zk.prove import mock
from zk.settings import canonical_settings, check_settings, run_arguments
from zk.verify import verify


def guard(honest: Honest, settings: Any, rows: int | None = 9) -> None:
    check_settings(
        settings, logrows=8, public=honest.circuit.public, committed=(), ezkl_version="23.0.5", rows=rows
    )


def altered(honest: Honest, path: str, value: Any) -> Any:
    settings = json.loads(honest.package.settings)
    *parents, last = path.split(".")
    target = settings
    for parent in parents:
        target = target[parent]
    target[last] = value
    return settings


def test_honest_settings_pass(honest: Honest) -> None:
    guard(honest, json.loads(honest.package.settings))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("run_args.disable_freivalds", False),
        ("run_args.disable_freivalds", 1),
        ("run_args.ignore_range_check_inputs_outputs", False),
        ("run_args.input_scale", 7),
        ("run_args.param_scale", 7),
        ("run_args.scale_rebase_multiplier", 10),
        ("run_args.input_visibility", "Public"),
        ("run_args.output_visibility", "Private"),
        ("run_args.param_visibility", "Private"),
        ("run_args.num_inner_cols", 4),
        ("run_args.logrows", 9),
        ("run_args.lookup_range", [-128, 200]),
        ("run_args.lookup_range", [0, 64]),
        ("run_args.decomp_base", 2),
        ("run_args.bounded_log_lookup", True),
        ("version", "23.0.4"),
        ("einsum_params.total_einsum_col_size", 12),
        ("required_range_checks", [[-1, 1]]),
        ("required_lookups", [{"HardSwish": {"scale": 2.0}}]),
        ("required_lookups", [{"Sigmoid": {"scale": 1.0}}]),
        ("required_lookups", [{"HardSwish": {"scale": 1.0}}, {"Tanh": {"scale": 1.0}}]),
        ("num_dynamic_lookups", 1),
        ("num_shuffles", 1),
        ("model_output_scales", [0, 1]),
        ("model_output_scales", [0]),
        ("model_input_scales", [0, 3]),
        ("model_instance_shapes", [[3]]),
        ("model_instance_shapes", [[1, 3], [1]]),
        ("module_sizes.polycommit", [3]),
        ("module_sizes.poseidon", [1, [1]]),
        ("num_rows", "9"),
    ],
)
def test_unsound_setting(honest: Honest, path: str, value: Any) -> None:
    with pytest.raises(MambaintError, match="are refused") as caught:
        guard(honest, altered(honest, path, value))
    assert path.rsplit(".", 1)[-1] in caught.value.cause


@pytest.mark.parametrize("name", ["required_range_checks", "num_shuffles", "run_args", "version"])
def test_missing_setting(honest: Honest, name: str) -> None:
    settings = json.loads(honest.package.settings)
    del settings[name]
    with pytest.raises(MambaintError, match="is missing"):
        guard(honest, settings)


def test_unknown_run_argument(honest: Honest) -> None:
    with pytest.raises(MambaintError, match="is not the known one"):
        guard(honest, altered(honest, "run_args.turbo", True))


@pytest.mark.parametrize("settings", [None, [], "x", {"run_args": []}])
def test_settings_that_are_not_settings(honest: Honest, settings: Any) -> None:
    with pytest.raises(MambaintError, match="are refused"):
        guard(honest, settings)


def test_wrong_row_prediction_is_its_own_error(honest: Honest) -> None:
    with pytest.raises(MambaintError, match="predicts 10 rows and EZKL lays out 9"):
        guard(honest, json.loads(honest.package.settings), rows=10)


@pytest.mark.parametrize("name", ["num_rows", "total_const_size"])
def test_circuit_that_does_not_fit_its_rows(honest: Honest, name: str) -> None:
    guard(honest, altered(honest, name, 244), rows=None)
    with pytest.raises(MambaintError, match="needs 245 rows"):
        guard(honest, altered(honest, name, 245), rows=None)


@pytest.mark.parametrize("logrows", [7, 27])
def test_impossible_number_of_rows(logrows: int) -> None:
    with pytest.raises(MambaintError, match="cannot have"):
        run_arguments(logrows, False)


@pytest.mark.parametrize("logrows", range(8, 27))
def test_declared_table_needs_one_column_and_ends_below_the_true_top(logrows: int) -> None:
    low, high = run_arguments(logrows, False)["lookup_range"]
    usable = (1 << logrows) - 8
    assert (high - low) // usable + 1 == 1
    assert low < high < low + usable - 1


def test_canonical_settings_forget_time_and_hash_order() -> None:
    first = canonical_settings({"timestamp": 1, "einsum_params": {"equations": [["i", {"i": 3, "j": 4}]]}})
    second = canonical_settings({"einsum_params": {"equations": [["i", {"j": 4, "i": 3}]]}, "timestamp": 2})
    assert first == second


def one_node(op: str, public: tuple[PublicTensor, ...], rows: int) -> Circuit:
    onnx = build_onnx([helper.make_node(op, ["x"], ["y"])], {"x": 3}, {"y": 3}, {})
    return Circuit("0" * 64, onnx, 8, rows, (InputTensor("x", (("x", 3),)),), public)


@pytest.mark.parametrize(
    ("op", "because"),
    [("Relu", "required_range_checks"), ("Sigmoid", "required_lookups"), ("Abs", "required_range_checks")],
)
def test_circuit_built_from_forbidden_operations(op: str, because: str) -> None:
    circuit = one_node(op, (PublicTensor("y", (3,)),), 3)
    with pytest.raises(MambaintError, match=because):
        mock(circuit, [Witness({"x": [1, 2, 3]}, {})])


def test_two_lookup_types_in_one_circuit() -> None:
    nodes = [helper.make_node("HardSwish", ["x"], ["h"]), helper.make_node("Sigmoid", ["h"], ["y"])]
    circuit = Circuit(
        "0" * 64,
        build_onnx(nodes, {"x": 3}, {"y": 3}, {}),
        8,
        3,
        (InputTensor("x", (("x", 3),)),),
        (PublicTensor("y", (3,)),),
    )
    with pytest.raises(MambaintError, match="required_lookups"):
        mock(circuit, [Witness({"x": [1, 2, 3]}, {})])


def test_circuit_that_declares_other_outputs_than_it_has() -> None:
    circuit = dataclasses.replace(tiny_circuit(), public=(PublicTensor("logits", (4,)),))
    with pytest.raises(MambaintError, match="model_instance_shapes"):
        mock(circuit, [Witness({"x": [1, 2, 3], "spare": [0]}, {})])


def test_keys_are_refused_for_a_wrong_row_prediction(honest: Honest, tmp_path: Path) -> None:
    with pytest.raises(MambaintError, match="predicts 12 rows"):
        make_keys(tiny_circuit(rows=12), tiny_witness(), honest.srs, tmp_path)
    assert not list((tmp_path / "keys").glob("[!.]*"))


def test_lookup_free_circuit_with_einsums_and_two_dimensional_outputs(cache: Path, tmp_path: Path) -> None:
    weights = np.arange(1, 7, dtype=np.float32).reshape(3, 2)
    nodes = [
        helper.make_node("Reshape", ["x", "shape"], ["m"]),
        helper.make_node("Einsum", ["m", "w"], ["logits"], equation="ij,jk->ik"),
    ]
    inputs = {"x": 6}
    graph_outputs = {"logits": 4}
    constants = {"w": weights, "shape": np.array([2, 3], np.int64)}
    onnx = build_onnx(nodes, inputs, graph_outputs, constants)
    circuit = Circuit(
        "e" * 64, onnx, 8, 13, (InputTensor("x", (("x", 6),)),), (PublicTensor("logits", (2, 2)),)
    )
    x = np.array([[1, -2, 3], [400, 5, -60000]])
    witness = Witness({"x": x.flatten().tolist()}, {"logits": (x @ weights.astype(int)).flatten().tolist()})
    run = run_honestly(circuit, witness, cache, tmp_path / "run")
    assert verify(run.proof_path, run.package_path).public == witness.public
