"""How a circuit and its witnesses travel to the worker process: as JSON, checked before they leave."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

from circuits.circuit import SALTS, Circuit, InputTensor, PublicTensor, Witness
from mamba_int.errors import MambaintError
from zk import field

CHALLENGE = "challenge"
"""Name of the public value that is the challenge, and of the committed input it comes from."""
CHALLENGE_SIZE = 2
"""Elements of the ONNX input ``challenge``: the challenge, and a spare cell that nothing reads."""


def pack_circuit(circuit: Circuit) -> dict[str, Any]:
    """What the worker needs of a circuit besides the ONNX file."""
    return {
        "logrows": circuit.logrows,
        "rows": circuit.rows,
        "public": pack_public(circuit.public),
        "committed": [size for _, size in committed_inputs(circuit)],
        "lookups": circuit.lookups,
    }


def committed_inputs(circuit: Circuit) -> tuple[tuple[str, int], ...]:
    """Names and sizes of the inputs EZKL commits to: all or none, the challenge too, which comes last."""
    if not any(group.committed for group in circuit.inputs):
        return ()
    challenge = ((CHALLENGE, CHALLENGE_SIZE),) if circuit.challenged else ()
    return tuple((group.name, group.size) for group in circuit.inputs) + challenge


def pack_public(tensors: Sequence[PublicTensor]) -> list[dict[str, Any]]:
    """Public tensors as JSON: name, shape, forced value or null, whether it is the challenge."""
    return [
        {"name": t.name, "shape": list(t.shape), "forced": t.forced, "challenge": t.challenge}
        for t in tensors
    ]


def unpack_public(values: list[dict[str, Any]]) -> tuple[PublicTensor, ...]:
    """The reverse of :func:`pack_public`."""
    return tuple(PublicTensor(v["name"], tuple(v["shape"]), v["forced"], v["challenge"]) for v in values)


def _fault(reason: str) -> MambaintError:
    return MambaintError(
        f"the witness does not fit the circuit: {reason}",
        "make circuit and witness from the same model and segment length",
    )


def draw_salts() -> list[int]:
    """Fresh salts for one committed input."""
    return [secrets.randbelow(field.PRIME) for _ in range(SALTS)]


def _salts(group: InputTensor, witness: Witness) -> list[int]:
    if not group.committed:
        return []
    salts = witness.salts.get(group.name) or draw_salts()
    if len(salts) != SALTS:
        raise _fault(f"{group.name} has {len(salts)} salts and must have {SALTS}")
    return salts


def _inputs(circuit: Circuit, witness: Witness) -> list[list[str]]:
    expected = dict(circuit.private)
    if set(witness.private) != set(expected):
        raise _fault(f"its inputs are {sorted(witness.private)} and must be {sorted(expected)}")
    for name, size in circuit.private:
        if len(witness.private[name]) != size:
            raise _fault(f"{name} has {len(witness.private[name])} values and must have {size}")
    return [
        [
            field.encode(v)
            for values in (*(witness.private[name] for name, _ in group.members), _salts(group, witness))
            for v in values
        ]
        for group in circuit.inputs
    ]


def _check_public(tensor: PublicTensor, values: list[int]) -> None:
    if len(values) != tensor.size:
        raise _fault(f"{tensor.name} has {len(values)} values and must have {tensor.size}")


def pack_witness(circuit: Circuit, witness: Witness) -> dict[str, Any]:
    """An honest witness: every input and every output but the challenge, forced outputs at their value.

    Raises:
        MambaintError: if the witness is of another circuit or breaks a forced output.
    """
    known = [tensor for tensor in circuit.public if not tensor.challenge]
    if set(witness.public) != {tensor.name for tensor in known}:
        raise _fault(f"its outputs are {sorted(witness.public)}")
    for tensor in known:
        values = witness.public[tensor.name]
        _check_public(tensor, values)
        if tensor.forced is not None and any(value != tensor.forced for value in values):
            raise _fault(f"{tensor.name} must be {tensor.forced} everywhere")
    return {
        "inputs": _inputs(circuit, witness),
        "public": [
            None if t.challenge else [field.encode(v) for v in witness.public[t.name]] for t in circuit.public
        ],
        "stated": stated_values(circuit, witness),
    }


def stated_values(circuit: Circuit, witness: Witness) -> dict[str, list[int]]:
    """The public values that are part of the statement."""
    return {t.name: [int(v) for v in witness.public[t.name]] for t in circuit.public if t.stated}


def pack_claim(circuit: Circuit, witness: Witness) -> dict[str, Any]:
    """A witness that may lie: outputs it leaves out are null, for the worker to fill in.

    Raises:
        MambaintError: if names or sizes do not fit the circuit.
    """
    unknown = set(witness.public) - {tensor.name for tensor in circuit.public}
    if unknown:
        raise _fault(f"it has unknown outputs {sorted(unknown)}")
    public: list[list[str] | None] = []
    for tensor in circuit.public:
        if tensor.forced is not None:
            public.append([field.encode(tensor.forced)] * tensor.size)
        elif tensor.name in witness.public:
            _check_public(tensor, witness.public[tensor.name])
            public.append([field.encode(v) for v in witness.public[tensor.name]])
        else:
            public.append(None)
    return {"inputs": _inputs(circuit, witness), "public": public, "challenged": circuit.challenged}
