"""The honest path: what a user sees when nothing is wrong."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import subprocess
import sys
import time

import pytest
from click.testing import CliRunner

from cli.verify import command
from tests.zk.conftest import Honest, tiny_circuit, tiny_witness
from zk.keys import make_keys
from zk.package import decode_package
from zk.prove import mock, prove
from zk.verify import verify


def test_honest_proof_verifies_with_its_public_values(honest: Honest) -> None:
    verdict = verify(honest.proof_path, honest.package_path, honest.circuit.model_id)
    assert (verdict.valid, verdict.reason) == (True, "")
    assert verdict.public == {"logits": [2, -21, 20]}
    assert verdict.model_id == honest.circuit.model_id
    assert verdict.circuit_id == honest.keys.circuit_id
    assert verdict.statement["classes"] == ["cat", "dog", "owl"]
    assert verdict.srs_kind == "development"


def test_one_key_pair_proves_other_inputs_too(honest: Honest) -> None:
    extreme = (-128, 119, 0)
    result = prove(honest.circuit, tiny_witness(extreme), honest.keys, honest.package_bytes)
    assert json.loads(result.file)["public"] == {"logits": [-256, 357, 0]}
    assert result.proof_bytes == honest.keys.proof_bytes
    assert 0 < result.prove_seconds < 10
    assert 10e6 < result.peak_bytes < 1e9


def test_keys_are_made_once(honest: Honest) -> None:
    again = make_keys(honest.circuit, honest.witness, honest.srs, honest.keys.folder.parent.parent)
    assert honest.keys.keygen_seconds > 0
    assert again == dataclasses.replace(honest.keys, keygen_seconds=0.0)


def test_another_cache_and_sample_give_the_same_package(honest: Honest, tmp_path: object) -> None:
    from pathlib import Path

    sample = tiny_witness((3, 3, 3))
    keys = make_keys(honest.circuit, sample, honest.srs, Path(str(tmp_path)))
    assert keys.package(honest.package.statement).encode() == honest.package_bytes


def test_package_survives_a_round_trip(honest: Honest) -> None:
    assert decode_package(honest.package_bytes, "test").encode() == honest.package_bytes


def test_proofs_do_not_contain_the_private_input(honest: Honest) -> None:
    assert set(json.loads(honest.result.file)) == {
        "format",
        "version",
        "model_id",
        "circuit_id",
        "verifier_package",
        "public",
        "segments",
    }
    assert not (honest.keys.folder / "input.json").exists()
    assert not (honest.keys.folder / "witness.json").exists()


def test_mock_accepts_the_honest_witness_only(honest: Honest) -> None:
    truth = honest.witness
    spare_positive = dataclasses.replace(truth, private={"x": [1, -7, 4], "spare": [5]}, public={})
    below = dataclasses.replace(truth, private={"x": [-129, -7, 4], "spare": [-1]}, public={})
    above = dataclasses.replace(truth, private={"x": [120, -7, 4], "spare": [-1]}, public={})
    half = dataclasses.replace(truth, private={"x": [pow(2, -1, 2**255 - 19), 0, 0], "spare": [0]}, public={})
    claim = dataclasses.replace(truth, public={"logits": [2, -21, 21]})
    computed = dataclasses.replace(truth, public={})
    witnesses = [truth, computed, spare_positive, below, above, half, claim]
    assert mock(honest.circuit, witnesses) == [True, True, False, False, False, False, False]


def test_verify_command_shows_the_result_and_what_was_trusted(honest: Honest) -> None:
    result = CliRunner().invoke(command, [str(honest.proof_path)])
    assert result.exit_code == 0
    assert result.output.startswith("VALID")
    for expected in ("2 -21 20", '"owl"', honest.circuit.model_id, "verifier.zip", "development SRS"):
        assert expected in result.output


def test_verify_command_as_json(honest: Honest) -> None:
    result = CliRunner().invoke(command, [str(honest.proof_path), "--json"])
    answer = json.loads(result.output)
    assert set(answer) == {
        "valid",
        "model_id",
        "circuit_id",
        "commitments",
        "outputs",
        "public",
        "verify_seconds",
        "srs",
        "verifier",
    }
    assert answer["valid"] is True
    assert answer["outputs"] == [2, -21, 20]
    assert answer["verifier"]["sha256"] == hashlib.sha256(honest.package_bytes).hexdigest()


def test_verify_is_one_fast_process_without_torch(honest: Honest) -> None:
    code = (
        "import sys, cli.main; sys.argv[0] = 'mambaint'\n"
        "try: cli.main.main()\n"
        "finally:\n"
        "    heavy = {'torch', 'onnx', 'onnxruntime', 'numpy'} & set(sys.modules)\n"
        "    assert not heavy, heavy\n"
    )
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code, "verify", str(honest.proof_path)], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    # 0.1 s on an idle machine; the limit leaves room for a busy one.
    assert time.perf_counter() - started < 3


def test_ezkl_prints_nothing_on_the_users_terminal(honest: Honest, capfd: pytest.CaptureFixture[str]) -> None:
    prove(honest.circuit, honest.witness, honest.keys, honest.package_bytes)
    mock(tiny_circuit((9, 9, 9)), [tiny_witness((0, 0, 0), (9, 9, 9))])
    assert capfd.readouterr() == ("", "")
