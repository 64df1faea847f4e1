"""How a circuit and its witnesses travel to the worker process: as JSON, checked before they leave."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from circuits.circuit import Circuit, PublicTensor, Witness
from mamba_int.errors import MambaintError
from zk import field


def pack_circuit(circuit: Circuit) -> dict[str, Any]:
    """What the worker needs of a circuit besides the ONNX file."""
    return {
        "logrows": circuit.logrows,
        "rows": circuit.rows,
        "public": pack_public(circuit.public),
    }


def pack_public(tensors: Sequence[PublicTensor]) -> list[dict[str, Any]]:
    """Public tensors as JSON: name, shape, forced value or null."""
    return [{"name": t.name, "shape": list(t.shape), "forced": t.forced} for t in tensors]


def unpack_public(values: list[dict[str, Any]]) -> tuple[PublicTensor, ...]:
    """The reverse of :func:`pack_public`."""
    return tuple(PublicTensor(v["name"], tuple(v["shape"]), v["forced"]) for v in values)


def _fault(reason: str) -> MambaintError:
    return MambaintError(
        f"the witness does not fit the circuit: {reason}",
        "make circuit and witness from the same model and segment length",
    )


def _private(circuit: Circuit, witness: Witness) -> list[list[str]]:
    expected = dict(circuit.private)
    if set(witness.private) != set(expected):
        raise _fault(f"its inputs are {sorted(witness.private)} and must be {sorted(expected)}")
    for name, size in circuit.private:
        if len(witness.private[name]) != size:
            raise _fault(f"{name} has {len(witness.private[name])} values and must have {size}")
    return [[field.encode(v) for v in witness.private[name]] for name, _ in circuit.private]


def _check_public(tensor: PublicTensor, values: list[int]) -> None:
    if len(values) != tensor.size:
        raise _fault(f"{tensor.name} has {len(values)} values and must have {tensor.size}")


def pack_witness(circuit: Circuit, witness: Witness) -> dict[str, Any]:
    """An honest witness: every input and every output must be there, forced outputs at their value.

    Raises:
        MambaintError: if the witness is of another circuit or breaks a forced output.
    """
    if set(witness.public) != {tensor.name for tensor in circuit.public}:
        raise _fault(f"its outputs are {sorted(witness.public)}")
    for tensor in circuit.public:
        values = witness.public[tensor.name]
        _check_public(tensor, values)
        if tensor.forced is not None and any(value != tensor.forced for value in values):
            raise _fault(f"{tensor.name} must be {tensor.forced} everywhere")
    return {
        "private": _private(circuit, witness),
        "public": [[field.encode(v) for v in witness.public[t.name]] for t in circuit.public],
    }


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
    return {"private": _private(circuit, witness), "public": public}
