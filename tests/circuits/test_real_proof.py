"""A whole model through keys and EZKL's prover: the proof shows the interpreter's logits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from circuits.lowering import build_circuit
from tests.circuits.conftest import MODELS, interpret, native_graph, random_input
from zk.keys import make_keys
from zk.prove import prove
from zk.srs import development_srs


def test_a_real_proof_of_a_whole_model_shows_the_interpreters_logits(tmp_path: Path) -> None:
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
    keys = make_keys(lowered.circuit, witness, development_srs(lowered.circuit.logrows, tmp_path), tmp_path)
    package = keys.package({}).encode()
    result = prove(lowered.circuit, witness, keys, package)
    assert json.loads(result.file)["public"] == {"logits": truth[graph.output].ravel().tolist()}
    other = random_input(graph, 6)
    again = prove(lowered.circuit, lowered.witness(other), keys, package)
    assert json.loads(again.file)["public"] == {"logits": interpret(graph, other)["logits"].ravel().tolist()}
    shutil.rmtree(keys.folder)
