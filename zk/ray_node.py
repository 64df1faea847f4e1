"""What a node of a Ray cluster does with a segment: puts the keys in their place once, and proves."""

from __future__ import annotations

import pickle
import socket
from dataclasses import dataclass
from typing import Any

from circuits.circuit import Circuit, Witness
from mamba_int.errors import MambaintError
from zk.keys import Keys
from zk.parcels import Fetch, KeyParcels
from zk.process import JobKilled
from zk.prove import prove_witness


@dataclass(frozen=True)
class Order:
    """What all segments of one circuit share."""

    circuit: Circuit
    keys: Keys
    parcels: KeyParcels


_placed: dict[str, tuple[Circuit, Keys]] = {}
"""By circuit id: what this process of Ray has checked already."""


def prove_here(
    circuit_id: str, order: Fetch, fetch: Fetch, witness: bytes, timeout: float | None, threads: int
) -> dict[str, Any]:
    """Prove one segment in a child process.

    Args:
        circuit_id: of its circuit.
        order: from the circuit id to its pickled :class:`Order`.
        fetch: from the SHA-256 of a key file to its content.
        witness: pickled.
        timeout: as of :func:`zk.prove.prove_witness`. threads: of the prover.

    Returns:
        The answer of :func:`zk.prove.prove_witness`, or ``cause``, ``remedy`` and ``killed``: faults do not
        travel as exceptions, whose classes another version may not have.
    """
    try:
        if circuit_id not in _placed:
            known: Order = pickle.loads(order(circuit_id))
            _placed[circuit_id] = known.circuit, known.parcels.unpack(known.keys, fetch)
        circuit, keys = _placed[circuit_id]
        values: Witness = pickle.loads(witness)
        return prove_witness(circuit, values, keys, timeout, threads)
    except MambaintError as error:
        return {
            "cause": f"on node {socket.gethostname()}: {error.cause}",
            "remedy": error.remedy,
            "killed": isinstance(error, JobKilled),
        }
