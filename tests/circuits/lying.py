"""How a prover can lie: about one cell or several, carrying the lie on or not, in integers or fractions."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from circuits.cells import CHALLENGE, FIELD, Values
from circuits.circuit import Witness
from circuits.lowering import LoweredCircuit
from tests.circuits.conftest import Array
from zk.prove import mock

Lie = Callable[[Values], Values]


def add_at(*changes: tuple[int, int]) -> Lie:
    """Add ``delta`` at each flat ``index``."""

    def lie(values: Values) -> Values:
        flat = values.ravel().copy()
        for index, delta in changes:
            flat[index] += delta
        return flat.reshape(values.shape)

    return lie


def forge(lowered: LoweredCircuit, x: Array, lies: Mapping[str, Lie]) -> Witness:
    """A liar's witness: whatever is computed after the lie is computed from the lie, outputs included."""
    return dataclasses.replace(lowered.witness(x, lies=lies), public={})


def override(honest: Witness, name: str, changes: Sequence[tuple[int, int]]) -> Witness:
    """A liar's witness in which nothing but these private cells is changed, as field elements."""
    values = list(honest.private[name])
    for index, delta in changes:
        values[index] = (values[index] + delta) % FIELD
    return Witness(private={**honest.private, name: values}, public={})


def privates(lowered: LoweredCircuit) -> dict[str, int]:
    """Every private tensor but the model input, with its size without the spare cell."""
    read = {int(cell) for base in lowered.cells.bases for ids in base.operands for cell in np.unique(ids)}
    return {
        base.name: sum(cell in read for cell in range(base.first, base.first + base.size))
        for base in lowered.cells.bases
        if base.op == "private" and base.name != "model_input"
    }


def satisfied(lowered: LoweredCircuit, witness: Witness) -> bool:
    """Whether a witness satisfies the constraint graph over the field: what EZKL's mock is asked as well.

    A thousand times faster than mock, so it can look at every cell; tests compare the two verdicts.
    """
    cells = lowered.cells
    flat = np.zeros(cells._next, dtype=object)
    for base in cells.bases:
        operands = [flat[ids] for ids in base.operands]
        if base.op == "private":
            values = np.array(witness.private[base.name], dtype=object)
        elif base.op == "challenge":
            # Whatever the prover chose is hashed, so the challenge cannot have been known before.
            fixed = hashlib.sha512(repr(sorted(witness.private.items())).encode()).digest()
            values = np.array([int.from_bytes(fixed, "big"), 0], dtype=object)
        elif base.op == "constant":
            assert base.constant is not None
            values = base.constant
        elif base.op == "relu":
            values = np.where(operands[0] > FIELD // 2, operands[0] - FIELD, operands[0])
            if values.min() < cells.low or values.max() > cells.high:
                return False
            values = np.maximum(values, 0)
        elif base.op == "dot":
            values = np.einsum(base.equation, *operands)
        else:
            a, b = operands
            values = {"add": a + b, "sub": a - b, "mul": a * b}[base.op]
        flat[base.first : base.first + base.size] = np.asarray(values, dtype=object).ravel() % FIELD
    forced = {tensor.name: tensor.forced for tensor in lowered.circuit.public}
    for name, ids in lowered.outputs.items():
        if name == CHALLENGE:
            continue
        claimed = witness.public.get(name, [forced[name]] * ids.size)
        if any(
            c is not None and (int(v) - c) % FIELD for v, c in zip(flat[ids.ravel()], claimed, strict=True)
        ):
            return False
    return True


def accepted(lowered: LoweredCircuit, x: Array, lies: Sequence[Witness]) -> list[bool]:
    """The verdict on each lie, after the honest witness and its true outputs passed."""
    truth = lowered.witness(x)
    control, *verdicts = mock(lowered.circuit, [truth, *lies])
    assert control, "the honest witness must pass, or a rejection means nothing"
    return verdicts


def reject_all(lowered: LoweredCircuit, x: Array, lies: Mapping[str, Witness]) -> None:
    """Every lie must be rejected, by EZKL and by :func:`satisfied` alike."""
    refuse_all(lowered, x, lies)
    verdicts = accepted(lowered, x, list(lies.values()))
    passed = [what for what, verdict in zip(lies, verdicts, strict=True) if verdict]
    assert not passed, f"EZKL accepts {passed}"


def refuse_all(lowered: LoweredCircuit, x: Array, lies: Mapping[str, Witness]) -> None:
    """Every lie must break a constraint; the honest witness must not."""
    assert lies
    assert satisfied(lowered, lowered.witness(x))
    passed = [what for what, lie in lies.items() if satisfied(lowered, lie)]
    assert not passed, f"accepted: {passed}"
