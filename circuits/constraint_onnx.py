"""Cells to the ONNX file EZKL reads: views become Concat, Gather and Reshape, constants are kept distinct."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from circuits.cells import Base, Cells, Ids, Values
from circuits.circuit import InputTensor
from mamba_int.errors import MambaintError

OPSET = 17
IR_VERSION = 8
ONNX_OPS = {"add": "Add", "sub": "Sub", "mul": "Mul", "dot": "Einsum", "relu": "HardSwish"}
"""On integers at scale 0 HardSwish is relu; as a static lookup its table is also the range check."""


@dataclass
class _Writer:
    cells: Cells
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: list[onnx.TensorProto] = field(default_factory=list)
    constants: set[tuple[int, ...]] = field(default_factory=set)
    count: int = 0

    def fresh(self) -> str:
        self.count += 1
        return f"t{self.count}"

    def node(self, op: str, inputs: list[str], **attributes: Any) -> str:
        name = self.fresh()
        self.nodes.append(helper.make_node(op, inputs, [name], **attributes))
        return name

    def integers(self, values: list[int]) -> str:
        name = self.fresh()
        self.initializers.append(numpy_helper.from_array(np.array(values, dtype=np.int64), name))
        return name

    def constant(self, values: Values) -> str:
        """A float32 initializer; every value must be exactly representable."""
        with np.errstate(over="ignore"):
            array = values.astype(np.float64).astype(np.float32)
        if not np.isfinite(array).all() or any(
            int(a) != int(b) for a, b in zip(array.ravel().tolist(), values.ravel().tolist(), strict=True)
        ):
            raise MambaintError(
                "a constant of the circuit is not exact in float32, which is all that ONNX lets EZKL see",
                "lower the bit budget of the model",
            )
        name = self.fresh()
        self.initializers.append(numpy_helper.from_array(array, name))
        return name

    def reshape(self, name: str, shape: tuple[int, ...]) -> str:
        return self.node("Reshape", [name, self.integers(list(shape))])

    def view(self, ids: Ids, company: Base | None = None) -> str:
        """A tensor holding the cells of a view.

        EZKL merges equal constants and range-decomposes any that is used twice, adding lookups. A constant
        that was written before is therefore written again with a serial number behind it and gathered out
        of a concatenation with ``company``, a computed tensor, which no optimizer can fold away.
        """
        bases = self.cells.base_of(ids)
        whole = len(bases) == 1 and ids.size == bases[0].size and (np.diff(ids.ravel()) == 1).all()
        if all(base.op == "constant" for base in bases):
            values = self.cells.constant_values(ids)
            key = tuple(values.ravel().tolist())
            if key not in self.constants:
                self.constants.add(key)
                return self.constant(values)
            if company is None:
                raise ValueError("a repeated constant needs a computed tensor beside it")
            bases = [company, *bases]
        elif whole:
            return bases[0].name if ids.shape == bases[0].shape else self.reshape(bases[0].name, ids.shape)
        in_order = np.concatenate([np.arange(base.first, base.first + base.size) for base in bases])
        if len(bases) > 1 and np.array_equal(in_order, ids.ravel()):
            # A Concat that no Gather follows would make the optimizer split the einsum that reads it.
            bases.reverse()
        flat, position, offset = [], np.zeros(ids.shape, dtype=np.int64), 0
        for base in bases:
            inside = (ids >= base.first) & (ids < base.first + base.size)
            position[inside] = ids[inside] - base.first + offset
            if base.op == "constant":
                assert base.constant is not None
                serial = 1 + len(self.constants)
                while (*base.constant.ravel().tolist(), serial) in self.constants:
                    serial += 1
                values = np.append(base.constant.ravel(), serial)
                self.constants.add(tuple(int(v) for v in values))
                flat.append(self.constant(values))
                offset += base.size + 1
            else:
                flat.append(base.name if len(base.shape) == 1 else self.reshape(base.name, (base.size,)))
                offset += base.size
        joined = flat[0] if len(flat) == 1 else self.node("Concat", flat, axis=0)
        order = position.ravel().tolist()
        # Gather with a single index becomes a Slice that costs its whole input; GatherElements is free.
        op = "Gather" if len(order) > 1 else "GatherElements"
        joined = self.node(op, [joined, self.integers(order)], axis=0)
        return joined if ids.ndim == 1 else self.reshape(joined, ids.shape)


def needed(cells: Cells, outputs: list[Ids]) -> list[Base]:
    """The base tensors that the outputs depend on, in order of creation."""
    keep: set[int] = set()
    stack = [base for ids in outputs for base in cells.base_of(ids)]
    while stack:
        base = stack.pop()
        if base.first not in keep:
            keep.add(base.first)
            stack += [b for ids in base.operands for b in cells.base_of(ids)]
    return [base for base in cells.bases if base.first in keep]


def write_onnx(cells: Cells, groups: tuple[InputTensor, ...], outputs: dict[str, Ids]) -> bytes:
    """Serialise a constraint graph; the same graph gives the same bytes.

    Args:
        cells: the constraint graph, closed.
        groups: its private tensors as ONNX inputs.
        outputs: public tensors by name, in order.
    """
    writer = _Writer(cells)
    inputs = [helper.make_tensor_value_info(g.name, TensorProto.FLOAT, [g.size]) for g in groups]
    bases = needed(cells, list(outputs.values()))
    used = {base.first for base in bases}
    unused = [base.name for base in cells.bases if base.op != "constant" and base.first not in used]
    if unused:
        raise ValueError(f"cells that no output depends on would be pruned: {unused[0]}")
    places = {
        member: (group.name, sum(size for _, size in group.members[:i]))
        for group in groups
        for i, (member, _) in enumerate(group.members)
    }
    for base in bases:
        if base.op == "challenge":
            inputs.append(helper.make_tensor_value_info(base.name, TensorProto.FLOAT, list(base.shape)))
        elif base.op == "private":
            group, offset = places[base.name]
            flat = writer.node(
                "Gather", [group, writer.integers([*range(offset, offset + base.size)])], axis=0
            )
            shape = writer.integers(list(base.shape))
            writer.nodes.append(helper.make_node("Reshape", [flat, shape], [base.name]))
        elif base.op != "constant":
            company = next(
                (b for ids in base.operands for b in cells.base_of(ids) if b.op != "constant"), None
            )
            operands = [writer.view(ids, company) for ids in base.operands]
            attributes = {"equation": base.equation} if base.op == "dot" else {}
            writer.nodes.append(helper.make_node(ONNX_OPS[base.op], operands, [base.name], **attributes))
    results = []
    for name, ids in outputs.items():
        writer.nodes.append(
            helper.make_node("Reshape", [writer.view(ids), writer.integers([ids.size])], [name])
        )
        results.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [ids.size]))
    graph = helper.make_graph(writer.nodes, "mambaint", inputs, results, writer.initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    model.producer_name = "mambaint"
    content: bytes = model.SerializeToString(deterministic=True)
    return content
