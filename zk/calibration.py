"""Measuring this machine once, with small circuits through the jobs that real proving uses."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from circuits.lowering import LoweredCircuit, build_circuit
from circuits.sample import sample_input
from mamba_int.errors import MambaintError
from mamba_int.files import canonical_json, read_json, write_json
from mamba_int.graph import Graph, Node
from zk import store
from zk.estimate import QUANTITIES, Calibration, Measurement, Size, fit
from zk.ezkl_calls import installed_version
from zk.keys import make_keys
from zk.package import decode_package
from zk.processor import processor_name
from zk.prove import prove
from zk.srs import development_srs
from zk.verify import check

FORMAT = "mambaint-calibration"
VERSION = 1
REPEATS = 2
"""Keys and proofs of each circuit; the fastest counts, since other programs can only slow one down."""
VERIFICATIONS = 10
"""Likewise, of each proof: they take milliseconds."""

CIRCUITS = (
    (10, 5, 0.9, 4),
    (10, 5, 0.3, 4),
    (12, 5, 0.9, 1.0),
    (12, 300, 0.9, 4),
    (14, 5, 0.3, 4),
    (14, 5, 0.95, 1.0),
    (14, 300, 0.95, 4),
)
"""Logrows, operations, share of the rows to fill, and how many channels (or all) are shown as output.

Chosen to vary one term of :meth:`zk.estimate.Size.terms` while others stay. Of one channel alone EZKL
takes three times as long to read the graph, so none has only one."""
_STEPS = 4
_CHAIN = 30
"""Operations in a row; more of them start at the input again."""


def machine() -> dict[str, Any]:
    """What a calibration holds for: processor, usable cores, EZKL."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    # EZKL's threads obey this variable.
    threads = os.environ.get("RAYON_NUM_THREADS", "")
    return {"cpu": processor_name(), "cores": cores, "threads": threads, "ezkl": installed_version()}


def calibration_path(cache: Path | None = None) -> Path:
    """Where this machine's calibration is kept."""
    name = hashlib.sha256(canonical_json(machine())).hexdigest()[:16]
    return store.cache_folder(cache) / "calibration" / f"{name}.json"


def stored_calibration(cache: Path | None = None) -> Calibration | None:
    """This machine's calibration if there is one that can be read; a damaged or foreign file is none."""
    path = calibration_path(cache)
    if not path.exists():
        return None
    try:
        content = read_json(path)
    except MambaintError:
        return None
    return _decode(content)


def calibrate(say: Callable[[str], None], cache: Path | None = None) -> Calibration:
    """Measure this machine (about half a minute), store and return the calibration.

    Args:
        say: told what is being measured.
        cache: see :func:`zk.store.cache_folder`; development SRS files made here stay in it.

    Raises:
        MambaintError: if EZKL fails or the cache cannot be written.
    """
    measurements = []
    for index, (logrows, operations, filled, shown) in enumerate(CIRCUITS):
        say(f"measuring this machine, once: {index + 1} of {len(CIRCUITS)}")
        graph, lowered = calibration_circuit(logrows, operations, filled, shown)
        measurements.append(measure(graph, lowered, REPEATS, cache))
    calibration = fit(machine(), measurements)
    write_json(calibration_path(cache), {"format": FORMAT, "version": VERSION, **asdict(calibration)})
    return calibration


def calibration_circuit(
    logrows: int, operations: int, filled: float, shown: float
) -> tuple[Graph, LoweredCircuit]:
    """Chains of additions and relus over as many channels as fill a share of 2^logrows rows.

    Args:
        logrows: of the circuit.
        operations: pairs of an addition and a relu.
        filled: share of the rows, at most.
        shown: channels of the output; 1.0 stands for all.
    """

    def build(channels: int) -> tuple[Graph, LoweredCircuit]:
        nodes = [Node("input", "input", (), {"low": -40, "high": 40, "features": channels})]
        sums, last = [], "input"
        for i in range(operations):
            # Distinct constants, as in a model, and of both signs: values stay inside the lookup table.
            value = {"value": np.array((-1) ** i * (i + 1), dtype=np.int64)}
            nodes.append(Node(f"add{i}", "add", (last,), {}, value))
            nodes.append(Node(f"relu{i}", "relu", (f"add{i}",)))
            last = f"relu{i}"
            if (i + 1) % _CHAIN == 0 or i + 1 == operations:
                sums.append(last)
                last = "input"
        last = sums[0]
        for i, other in enumerate(sums[1:]):
            nodes.append(Node(f"sum{i}", "add", (last, other)))
            last = f"sum{i}"
        stop = channels if shown == 1.0 else min(int(shown), channels)
        nodes.append(Node("output", "slice", (last,), {"start": 0, "stop": stop}))
        graph = Graph(tuple(nodes), "output", _STEPS).verify()
        return graph, build_circuit(graph, logrows=logrows, challenged=False)

    # Rows are linear in the channels but for rounding: two small circuits tell the slope.
    few, more = (build(channels)[1].circuit.rows for channels in (1, 3))
    return build(max(1, 1 + int((filled * (1 << logrows) - few) / ((more - few) / 2))))


def measure(graph: Graph, lowered: LoweredCircuit, repeats: int, cache: Path | None = None) -> Measurement:
    """Make keys, prove and verify a sample; the fastest of the repeats counts. No keys are left.

    Raises:
        MambaintError: if any of it fails.
    """
    circuit, witness = lowered.circuit, lowered.witness(sample_input(graph))
    srs = development_srs(circuit.logrows, cache)
    made, proofs, verifications = [], [], []
    for _ in range(repeats):
        with TemporaryDirectory(prefix="mambaint-") as folder:
            keys = make_keys(circuit, witness, srs, Path(folder))
            package = keys.package({}).encode()
            made.append(keys)
            proofs.append(prove(circuit, witness, keys, package))
        trusted, digest = decode_package(package, "measured"), hashlib.sha256(package).hexdigest()
        verifications += [check(proofs[-1].file, trusted, digest) for _ in range(VERIFICATIONS)]
    return Measurement(
        size=Size.of(circuit),
        keygen_seconds=min(keys.keygen_seconds for keys in made),
        prove_seconds=min(proof.prove_seconds for proof in proofs),
        verify_seconds=min(verdict.verify_seconds for verdict in verifications),
        setup_peak_bytes=max(keys.peak_bytes for keys in made),
        prove_peak_bytes=max(proof.peak_bytes for proof in proofs),
        proof_bytes=keys.proof_bytes,
        proving_key_bytes=keys.sizes["pk.key"],
    )


def _decode(content: Any) -> Calibration | None:
    fields = {"format", "version", "machine", "coefficients", "proof_bytes", "key_bytes_per_row"}
    if not isinstance(content, dict) or set(content) != fields:
        return None
    known = content["format"] == FORMAT and content["version"] == VERSION
    coefficients, terms = content["coefficients"], len(Size(1, 1, 1, 1).terms())
    whole = (
        isinstance(coefficients, dict)
        and set(coefficients) == set(QUANTITIES)
        and all(isinstance(row, list) and len(row) == terms for row in coefficients.values())
        and all(_is_amount(value) for row in coefficients.values() for value in row)
        and type(content["proof_bytes"]) is int
        and _is_amount(content["key_bytes_per_row"])
    )
    if not known or not whole or content["machine"] != machine():
        return None
    return Calibration(
        machine=content["machine"],
        coefficients={name: tuple(row) for name, row in coefficients.items()},
        proof_bytes=content["proof_bytes"],
        key_bytes_per_row=content["key_bytes_per_row"],
    )


def _is_amount(value: Any) -> bool:
    return type(value) in (int, float) and value >= 0
