"""From a model to its circuit, keys and verifier package, and from an input to its witness."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from circuits.circuit import Witness
from circuits.lowering import LoweredCircuit, build_circuit
from circuits.sample import sample_input
from mamba_int.errors import MambaintError
from mamba_int.graph import Graph, IntArray, Node
from mamba_int.interpreter import evaluate
from zk.calibration import stored_calibration
from zk.estimate import Size, require_memory
from zk.keys import Keys, keys_folder, make_keys
from zk.srs import check_choice, chosen_srs


@dataclass(frozen=True)
class Provable:
    """A model with its circuit and keys.

    Attributes:
        graph: the integer graph.
        lowered: its circuit, which computes witnesses.
        keys: proving and verifying key.
        package: bytes of the verifier package.
    """

    graph: Graph
    lowered: LoweredCircuit
    keys: Keys
    package: bytes


def statement(graph: Graph, public_input: bool, commit_input: bool, lookups: str) -> dict[str, Any]:
    """What a proof of this circuit states, in words and names, for the verifier package."""
    card = graph.card
    described = card.get("input")
    scaling = {
        key: described[key]
        for key in ("feature_offset", "feature_scale")
        if isinstance(described, dict) and key in described
    }
    return {
        "task": card.get("task", ""),
        "classes": card.get("classes", []),
        "dataset": card.get("dataset", ""),
        "seq_len": graph.seq_len,
        "input": {key: graph.input.integer(key) for key in ("low", "high", "features")} | scaling,
        "input_is_public": public_input,
        "input_is_committed": commit_input,
        "lookups": lookups,
        "logits_frac": graph.by_name[graph.output].frac,
    }


def input_graph(stated: dict[str, Any]) -> Graph:
    """The input of the model that a :func:`statement` describes, as a graph of one node.

    Raises:
        MambaintError: if the statement describes none.
    """
    domain, steps = stated.get("input"), stated.get("seq_len")
    names = ("low", "high", "features")
    if not isinstance(domain, dict) or any(type(v) is not int for v in (steps, *map(domain.get, names))):
        raise MambaintError(
            "the verifier package does not describe the model's input", "get the package of this mambaint"
        )
    node = Node("input", "input", attributes={name: domain[name] for name in names})
    return Graph((node,), "input", int(str(steps)), {"input": domain}).verify()


def prepare(
    graph: Graph,
    public_input: bool = False,
    commit_input: bool = False,
    logrows: int | None = None,
    lookups: str = "table",
    srs_path: Path | None = None,
    srs_sha256: str | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Provable:
    """Build the circuit of a model, and get its keys: from the cache, or made now.

    Args:
        graph: the model.
        public_input: show the input in proofs. commit_input: commit to it instead.
        logrows: make a circuit of 2^logrows rows; None for the fewest that hold it.
        lookups: ``table`` or ``none``: how ranges are checked.
        srs_path, srs_sha256: SRS of a ceremony and its hash; None for one made here.
        say: told what is being done.

    Raises:
        MambaintError: for any of the faults of lowering, the SRS and key generation; before anything is
            made if this machine was measured (see zk.calibration) and has too little memory.
    """
    check_choice(srs_path, srs_sha256)
    if public_input and commit_input:
        raise MambaintError(
            "--public-input shows the input and --commit-input hides it", "give one of the two"
        )
    say("building the circuit")
    lowered = build_circuit(
        graph, public_input, logrows, commit_input=commit_input, lookups=lookups == "table"
    )
    calibration = stored_calibration()
    prediction = calibration.predict(Size.of(lowered.circuit)) if calibration is not None else None
    if prediction is not None:
        require_memory(prediction.prove_peak_bytes)
    logrows = lowered.circuit.logrows
    if srs_path is None:
        say(f"development SRS for 2^{logrows} rows")
    srs = chosen_srs(srs_path, srs_sha256, logrows)
    if prediction is not None and not keys_folder(lowered.circuit, srs).exists():
        require_memory(prediction.setup_peak_bytes)
    say(f"keys for {lowered.circuit.rows:,} rows (made once)")
    keys = make_keys(lowered.circuit, witness_of(graph, lowered, sample_input(graph)), srs)
    stated = statement(graph, public_input, commit_input, lookups)
    return Provable(graph, lowered, keys, keys.package(stated).encode())


def witness_of(graph: Graph, lowered: LoweredCircuit, inputs: IntArray) -> Witness:
    """The witness of one inference, checked against the interpreter.

    Args:
        inputs: int64 without batch axis.

    Raises:
        MambaintError: if the circuit computes other integers than the specification: an internal fault.
    """
    witness = lowered.witness(inputs)
    wanted = [int(value) for value in evaluate(graph, inputs[None])[0].ravel()]
    if witness.public["logits"] != wanted:
        raise MambaintError(
            "the circuit and the interpreter disagree on this input",
            "report this with the model and the input",
        )
    return witness
