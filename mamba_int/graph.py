"""The integer graph: a flat, typed list of nodes. It *is* the model; its SHA-256 is the model id.

Every tensor holds integers, carries a proven interval [low, high], and stands for the real values
``integer * 2**-frac``. Time comes first: a tensor of shape (seq_len, ...) has one row per step; backends
put a batch axis before it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import ceil, sqrt
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from mamba_int.errors import MambaintError
from mamba_int.files import canonical_json, parse_json, read_bytes, write_bytes

FORMAT = "mambaint-graph"
VERSION = 1
MAX_CONSTANT_BITS = 53

IntArray = NDArray[np.int64]
AttributeValue = int | str | bool


@dataclass(frozen=True)
class TensorType:
    """What is known of a tensor before any input is seen.

    Attributes:
        shape: without the batch axis; the first entry is seq_len while the tensor has a time axis.
        low, high: proven bounds of every element.
        peak: proven bound of the magnitude of every intermediate of the operation that makes it
            (sums of |terms| in any order, values before a shift), the quantity the 24-bit rule limits.
        pair_norm: proven bound of sqrt(v_i^2 + v_{i+N/2}^2) over the last axis, where an operation knows one.
    """

    shape: tuple[int, ...]
    low: int
    high: int
    peak: int = 0
    pair_norm: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "peak", max(self.peak, abs(self.low), abs(self.high)))

    @property
    def magnitude(self) -> int:
        """Largest possible absolute value."""
        return max(abs(self.low), abs(self.high))

    @property
    def pair_bound(self) -> int:
        """``pair_norm``, or what the interval alone implies."""
        return self.pair_norm if self.pair_norm is not None else ceil(sqrt(2) * self.magnitude)


@dataclass(frozen=True)
class Node:
    """One operation and its result, which bears the node's name.

    Attributes:
        name: unique; a path such as ``layer0.in_proj``.
        op: a key of ``mamba_int.operations.OPERATIONS``.
        inputs: names of earlier nodes.
        attributes: static parameters.
        constants: integer arrays (NumPy int64 in a finished graph, float tensors while training).
        frac: binary places of the result.
    """

    name: str
    op: str
    inputs: tuple[str, ...] = ()
    attributes: Mapping[str, AttributeValue] = field(default_factory=dict)
    constants: Mapping[str, Any] = field(default_factory=dict)
    frac: int = 0

    def integer(self, key: str) -> int:
        """An integer attribute."""
        return int(self.attributes[key])


@dataclass(frozen=True)
class Graph:
    """A complete integer model.

    Attributes:
        nodes: in an order where every input precedes its use; the last is not necessarily the output.
        output: name of the node whose value is the logits.
        seq_len: length the graph is exported and proved at. Graphs without a ``reduce`` also run at others.
        card: JSON-able description: task, classes, features, and where the model came from.
    """

    nodes: tuple[Node, ...]
    output: str
    seq_len: int
    card: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def by_name(self) -> dict[str, Node]:
        """Nodes by name."""
        return {node.name: node for node in self.nodes}

    @cached_property
    def last_reader(self) -> dict[str, str]:
        """Of every tensor that is read, the node that reads it last: large models leave no room for it after
        that. The output is never read last."""
        return {name: node.name for node in self.nodes for name in node.inputs} | {self.output: ""}

    @cached_property
    def input(self) -> Node:
        """The node that receives the input."""
        return next(node for node in self.nodes if node.op == "input")

    @cached_property
    def types(self) -> dict[str, TensorType]:
        """Shape and interval of every tensor, computed anew from the nodes.

        Raises:
            MambaintError: if a node is malformed: the graph is not a model.
        """
        from mamba_int.operations import OPERATIONS

        types: dict[str, TensorType] = {}
        for node in self.nodes:
            if node.op not in OPERATIONS:
                raise _malformed(node.name, f"has unknown operation '{node.op}'")
            if node.name in types:
                raise _malformed(node.name, "is defined twice")
            missing = [name for name in node.inputs if name not in types]
            if missing:
                raise _malformed(node.name, f"reads '{missing[0]}' before it is defined")
            operation = OPERATIONS[node.op]
            try:
                types[node.name] = operation.infer(node, [types[name] for name in node.inputs], self.seq_len)
            except (KeyError, ValueError, IndexError, TypeError, OverflowError) as error:
                raise _malformed(node.name, f"({node.op}) is malformed: {error}") from error
        return types

    def verify(self, max_bits: int = 53) -> Graph:
        """Check the graph whole: operations, shapes, intervals and the bit rule; return it.

        Run after every pass that makes a graph.

        Args:
            max_bits: no intermediate may exceed 2**max_bits (24 for native models: exact in float32).

        Raises:
            MambaintError: naming the first node at fault.
        """
        for node in self.nodes:
            for key, value in node.constants.items():
                if value.size and max(abs(int(value.min())), abs(int(value.max()))) > 1 << MAX_CONSTANT_BITS:
                    raise _malformed(node.name, f"has a constant '{key}' beyond {MAX_CONSTANT_BITS} bits")
        if [node.op for node in self.nodes].count("input") != 1:
            raise MambaintError("the graph does not have exactly one input", "quantize the checkpoint again")
        types = self.types
        if self.output not in types:
            raise _malformed(self.output, "is named as output but not defined")
        for name, tensor in types.items():
            if tensor.peak > 1 << max_bits:
                raise MambaintError(
                    f"'{name}' can reach {tensor.peak}, beyond {max_bits} bits",
                    "lower the bit budget of its operands in [model]",
                )
        return self

    @property
    def max_bits(self) -> int:
        """Bits of the largest possible intermediate: 2**max_bits bounds them all."""
        return max((tensor.peak - 1).bit_length() for tensor in self.types.values())

    @cached_property
    def model_id(self) -> str:
        """SHA-256 (hex) of the canonical description: nodes, attributes and a digest of every constant."""
        return hashlib.sha256(canonical_json(self._description)).hexdigest()

    def with_nodes(self, nodes: list[Node]) -> Graph:
        """The same model with other nodes: what a pass returns."""
        return replace(self, nodes=tuple(nodes))

    @cached_property
    def _description(self) -> dict[str, Any]:
        def describe(array: IntArray) -> dict[str, Any]:
            little = np.ascontiguousarray(array, dtype="<i8")
            return {"shape": list(array.shape), "sha256": hashlib.sha256(little.data).hexdigest()}

        return {
            "format": FORMAT,
            "version": VERSION,
            "seq_len": self.seq_len,
            "output": self.output,
            "card": dict(self.card),
            "nodes": [
                {
                    "name": node.name,
                    "op": node.op,
                    "inputs": list(node.inputs),
                    "attributes": dict(node.attributes),
                    "constants": {key: describe(value) for key, value in sorted(node.constants.items())},
                    "frac": node.frac,
                }
                for node in self.nodes
            ],
        }

    def encoded(self) -> bytes:
        """The file: constants as safetensors, nodes as canonical JSON in its metadata."""
        tensors = {
            f"{node.name}:{key}": value.astype(smallest_dtype(value))
            for node in self.nodes
            for key, value in node.constants.items()
        }
        # One key only: safetensors writes several in random order.
        document = {"graph": self._description, "model_id": self.model_id}
        metadata = {"mambaint": canonical_json(document).decode()}
        return save_tensors(tensors, metadata)

    def save(self, path: Path) -> None:
        """Write the file atomically."""
        write_bytes(path, self.encoded())

    @classmethod
    def load(cls, path: Path) -> Graph:
        """Read a graph and check everything: structure, digests, intervals and the model id.

        Raises:
            MambaintError: if the file is missing, truncated, foreign, of another version or altered.
        """
        remedy = "make the graph anew with `mambaint quantize`"
        content = read_bytes(path, remedy)
        try:
            tensors = load_tensors(content)
            header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
            text = header["__metadata__"]["mambaint"]
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise MambaintError(f"{path} is not a mambaint graph, or is truncated", remedy) from error
        document = parse_json(text.encode(), str(path))
        try:
            described, model_id = document["graph"], document["model_id"]
            if described["format"] != FORMAT or described["version"] != VERSION:
                raise MambaintError(f"{path} has graph version {described['version']}, not {VERSION}", remedy)
            _check_fields(described, tensors)
            nodes = tuple(
                Node(
                    name=entry["name"],
                    op=entry["op"],
                    inputs=tuple(entry["inputs"]),
                    attributes=entry["attributes"],
                    constants={
                        key: tensors[f"{entry['name']}:{key}"].astype(np.int64) for key in entry["constants"]
                    },
                    frac=entry["frac"],
                )
                for entry in described["nodes"]
            )
            graph = cls(nodes, described["output"], described["seq_len"], described["card"])
        except KeyError as error:
            raise MambaintError(f"{path} lacks {error}", remedy) from error
        except (TypeError, AttributeError, ValueError) as error:
            raise MambaintError(f"{path} is not a well-formed graph ({error})", remedy) from error
        if graph.model_id != model_id or graph._description != described:
            raise MambaintError(f"{path} was altered: its content does not match its model id", remedy)
        return graph.verify()


def _check_fields(described: dict[str, Any], tensors: dict[str, NDArray[Any]]) -> None:
    """Refuse, with TypeError or ValueError, fields of other types than :meth:`Graph.save` writes."""

    def need(value: Any, kind: type, what: str) -> None:
        if type(value) is not kind:
            raise TypeError(f"{what} is not of type {kind.__name__}")

    need(described["card"], dict, "card")
    need(described["output"], str, "output")
    need(described["seq_len"], int, "seq_len")
    if described["seq_len"] < 1:
        raise ValueError("seq_len is not positive")
    named = set()
    for entry in described["nodes"]:
        for key, kind in (("name", str), ("op", str), ("inputs", list), ("attributes", dict), ("frac", int)):
            need(entry[key], kind, key)
        need(entry["constants"], dict, "constants")
        for name in entry["inputs"]:
            need(name, str, "an input")
        for value in entry["attributes"].values():
            if type(value) not in (int, str, bool):
                raise TypeError("an attribute is neither integer, text nor truth value")
        named |= {f"{entry['name']}:{key}" for key in entry["constants"]}
    lost = named - set(tensors)
    if lost:
        raise KeyError(min(lost))
    if named != set(tensors):
        raise ValueError("it holds constants that no node names")
    if any(tensor.dtype.kind != "i" for tensor in tensors.values()):
        raise TypeError("a constant is not of integer type")


def _malformed(name: str, what: str) -> MambaintError:
    return MambaintError(f"graph node '{name}' {what}", "quantize the checkpoint again")


def smallest_dtype(array: IntArray) -> type[np.signedinteger[Any]]:
    """The narrowest signed type that holds all of an array."""
    for dtype in (np.int8, np.int16, np.int32):
        info = np.iinfo(dtype)
        if array.size == 0 or (array.min() >= info.min and array.max() <= info.max):
            return dtype
    return np.int64
