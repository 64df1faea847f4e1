"""Identities: what a SHA-256 looks like, and the id of a circuit."""

from __future__ import annotations

import hashlib
from typing import Any

from circuits.circuit import Circuit
from mamba_int.files import canonical_json
from zk.jobs import committed_inputs, pack_public
from zk.settings import run_arguments

KEYS_VERSION = 2
"""Raised when the way keys are made changes, so that old keys are not used."""


def is_sha256(value: Any) -> bool:
    """Whether ``value`` is a SHA-256 as we write it: 64 lower-case hex digits."""
    return isinstance(value, str) and len(value) == 64 and not set(value) - set("0123456789abcdef")


def circuit_id(circuit: Circuit, srs_sha256: str, ezkl_version: str) -> str:
    """SHA-256 (hex) over everything the keys depend on; equal ids mean equal verifying keys."""
    parts = {
        "keys_version": KEYS_VERSION,
        "model_id": circuit.model_id,
        "onnx_sha256": hashlib.sha256(circuit.onnx).hexdigest(),
        "logrows": circuit.logrows,
        "rows": circuit.rows,
        "lookups": circuit.lookups,
        "inputs": [[group.name, group.committed, *map(list, group.members)] for group in circuit.inputs],
        "public": pack_public(circuit.public),
        "run_args": run_arguments(circuit.logrows, bool(committed_inputs(circuit))),
        "ezkl_version": ezkl_version,
        "srs_sha256": srs_sha256,
    }
    return hashlib.sha256(canonical_json(parts)).hexdigest()
