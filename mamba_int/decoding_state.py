"""What token-by-token decoding remembers of the past: as much after a million steps as after one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from mamba_int.errors import MambaintError
from mamba_int.files import canonical_json, parse_json, read_bytes, write_bytes
from mamba_int.graph import Graph, IntArray
from mamba_int.operations import OPERATIONS
from mamba_int.operations.base import Memory

FORMAT = "mambaint-decoding-state"
VERSION = 1
_REMEDY = "give a state saved while decoding this model"


def _initial_memories(graph: Graph) -> dict[str, dict[str, IntArray]]:
    """What every operation remembers before the first step, of one sequence: node -> name -> int64 array.

    Raises:
        MambaintError: for a graph with an operation that needs all steps at once.
    """
    memories = {}
    for node in graph.nodes:
        operation = OPERATIONS[node.op]
        if not operation.causal:
            raise MambaintError(
                f"the model cannot run token by token: its '{node.name}' ({node.op}) needs all steps at once",
                "give a language model, or run this one on whole sequences with 'mambaint run'",
            )
        memory = operation.initial_memory(node, [graph.types[name] for name in node.inputs])
        if memory:
            memories[node.name] = memory
    return memories


@dataclass
class DecodingState:
    """The memory of a batch of sequences, each at a position of its own.

    On the host it holds NumPy int64 arrays; that of a :class:`mamba_int.decoder.Decoder` holds the same
    integers as float tensors on its device.

    Attributes:
        model_id: of the graph it belongs to.
        position: int64 [batch], steps consumed.
        memories: node -> name -> [batch, ...].
        initial: node -> name -> [...], one sequence before its first step.
        longest: the most steps a sequence can have; None if any number.
    """

    model_id: str
    position: Any
    memories: dict[str, Memory]
    initial: dict[str, Memory]
    longest: int | None = None

    @classmethod
    def of(cls, graph: Graph, batch: int) -> Self:
        """The state before the first step, on the host.

        Raises:
            MambaintError: for a graph that is not causal.
        """
        initial = _initial_memories(graph)
        memories: dict[str, Memory] = {
            node: {name: np.repeat(value[None], batch, 0) for name, value in memory.items()}
            for node, memory in initial.items()
        }
        limits = [OPERATIONS[node.op].longest(node) for node in graph.nodes]
        longest = min((limit for limit in limits if limit is not None), default=None)
        return cls(graph.model_id, np.zeros(batch, np.int64), memories, dict(initial), longest)

    @property
    def batch(self) -> int:
        """Number of sequences."""
        return len(self.position)

    @property
    def nbytes(self) -> int:
        """Bytes held for all sequences; independent of their lengths."""
        tensors = [value for memory in self.memories.values() for value in memory.values()]
        return int(sum(value.nbytes for value in (self.position, *tensors)))

    def require(self, model_id: str, batch: int) -> None:
        """Refuse to be the state of another decoder.

        Raises:
            MambaintError: if it is of another model, or of another number of sequences.
        """
        if self.model_id != model_id:
            raise MambaintError(
                f"the state is of the model {self.model_id[:16]}..., not {model_id[:16]}...",
                "give a state of this model",
            )
        if self.batch != batch:
            raise MambaintError(
                f"the state is of {self.batch} sequences, the decoder of {batch}",
                f"make a decoder of batch {self.batch}",
            )

    def require_room(self, steps: int) -> None:
        """Refuse sequences of so many steps if there is no state to carry them that far.

        Raises:
            MambaintError: naming the limit.
        """
        if self.longest is not None and steps > self.longest:
            raise MambaintError(
                f"step {steps} is beyond the one chunk of {self.longest} steps that this model has",
                "give a model exported with more than one chunk, or shorter sequences",
            )

    def reset(self, rows: Sequence[int] | None = None) -> None:
        """Put these rows, or all, before their first step."""
        chosen: Any = slice(None) if rows is None else list(rows)
        self.position[chosen] = 0
        for node, memory in self.memories.items():
            for name, value in memory.items():
                value[chosen] = self.initial[node][name]

    def copy(self) -> DecodingState:
        """An independent copy of a state on the host."""
        memories = {
            node: {name: value.copy() for name, value in memory.items()}
            for node, memory in self.memories.items()
        }
        return replace(self, position=self.position.copy(), memories=memories)

    def inspect(self) -> dict[str, Any]:
        """Positions, bytes and every tensor with its shape, as JSON values."""
        tensors = [
            {
                "node": node,
                "name": name,
                "shape": list(value.shape),
                "dtype": str(value.dtype).removeprefix("torch."),
                "bytes": int(value.nbytes),
            }
            for node, memory in self.memories.items()
            for name, value in memory.items()
        ]
        return {
            "model_id": self.model_id,
            "batch": self.batch,
            "position": self.position.tolist(),
            "bytes": self.nbytes,
            "tensors": tensors,
        }

    def save(self, path: Path) -> None:
        """Write a state on the host atomically, as safetensors."""
        tensors = {
            f"{node}:{name}": value
            for node, memory in self.memories.items()
            for name, value in memory.items()
        }
        document = {"format": FORMAT, "version": VERSION, "model_id": self.model_id}
        # One key only: safetensors writes several in random order.
        metadata = {"mambaint": canonical_json(document).decode()}
        write_bytes(path, save_tensors(tensors | {"position": self.position}, metadata))

    @classmethod
    def load(cls, path: Path, graph: Graph) -> Self:
        """Read a state of ``graph``.

        Raises:
            MambaintError: if the file is missing, truncated, foreign or of another model, or holds integers
                that the model cannot have left.
        """
        content = read_bytes(path, _REMEDY)
        try:
            tensors = load_tensors(content)
            header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
            text = header["__metadata__"]["mambaint"]
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise MambaintError(f"{path} is not a decoding state, or is truncated", _REMEDY) from error
        document = parse_json(text.encode(), f"the description in {path}")
        if document != {"format": FORMAT, "version": VERSION, "model_id": graph.model_id}:
            raise MambaintError(
                f"{path} is not a decoding state of the model {graph.model_id[:16]}...", _REMEDY
            )
        position = tensors.pop("position", np.zeros(()))
        if position.ndim != 1 or position.dtype != np.int64 or (position < 0).any():
            raise MambaintError(f"{path} has no positions", _REMEDY)
        state = cls.of(graph, len(position))
        state.position[:] = position
        limit = 1 << graph.max_bits
        for node, memory in state.memories.items():
            for name, value in memory.items():
                found = tensors.pop(f"{node}:{name}", np.zeros(()))
                fits = found.shape == value.shape and found.dtype == np.int64
                # Not by the absolute value: that of -2^63 is itself.
                if not fits or ((found < -limit) | (found > limit)).any():
                    raise MambaintError(f"{path} has no usable '{name}' of '{node}'", _REMEDY)
                value[:] = found
        if tensors:
            raise MambaintError(f"{path} holds an unexpected tensor '{min(tensors)}'", _REMEDY)
        return state
