"""Token-by-token execution of an integer graph in PyTorch: constant memory, the integers of the whole run.

The state of the past is the row A[t, .] and the tokens of the open chunk, H, and the window of each
convolution; see ``mamba_int.operations.ssd``. It lives in preallocated tensors that a step changes in place,
so that a CUDA graph can replay it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from mamba_int.decoding_state import DecodingState
from mamba_int.errors import MambaintError
from mamba_int.executor import Executor
from mamba_int.graph import Graph, IntArray, Node
from mamba_int.interpreter import check_input
from mamba_int.operations import OPERATIONS
from mamba_int.operations.base import recorder

PREFILL_STEPS = 1 << 16
"""Prompts are run together as long as they have no more steps than this, padding included."""
WARM_UP = 3
"""Eager steps before a CUDA graph is captured: libraries allocate their workspaces in the first ones."""


class _Replay(NamedTuple):
    """A captured step.

    Attributes:
        step, chunk_end: what to replay.
        logits: where a replayed step leaves them.
    """

    step: torch.cuda.CUDAGraph
    chunk_end: torch.cuda.CUDAGraph
    logits: Tensor


class Decoder:
    """A batch of sequences, decoded together, each at a position of its own.

    Args:
        graph: a causal model, such as a language model.
        batch: number of sequences.
        device: where to run.
        cuda_graph: capture a step once and replay it, on a CUDA device.

    Attributes:
        graph, batch, device: as given.
        state: what the past has left, on the device. Its tensors are changed in place, never replaced.

    Raises:
        MambaintError: for a graph that is not causal, or a CUDA graph elsewhere than on CUDA.
    """

    def __init__(
        self, graph: Graph, batch: int = 1, device: torch.device | str = "cpu", cuda_graph: bool = False
    ) -> None:
        executor = Executor(graph, device)
        if cuda_graph and executor.device.type != "cuda":
            raise MambaintError(
                f"there are no CUDA graphs on the device '{executor.device}'",
                "leave cuda_graph out, or use cuda",
            )
        self.graph, self.batch, self.device = graph, batch, executor.device
        self._dtype, self._nodes = executor.dtype, executor.nodes
        self._start = DecodingState.of(graph, batch)
        self.state = self._on_device(self._start)
        self._position = np.zeros(batch, np.int64)
        """The positions once more, on the host: when a chunk ends is known without asking the device."""
        self._chunks = {
            node.name: chunk for node in graph.nodes if (chunk := OPERATIONS[node.op].chunk(node)) is not None
        }
        self._done = _last_reads(graph)
        low, shape = graph.input.integer("low"), graph.types[graph.input.name].shape[1:]
        self._inputs = torch.full((batch, 1, *shape), low, dtype=self._dtype, device=self.device)
        self._replay = self._capture() if cuda_graph else None

    # -- the state ----------------------------------------------------------------------------------------

    def reset(self, rows: Sequence[int] | None = None) -> None:
        """Put these sequences, or all, before their first step."""
        self.state.reset(rows)
        self._position[slice(None) if rows is None else list(rows)] = 0

    def inspect(self) -> dict[str, Any]:
        """Positions, bytes and every tensor of the state; see :meth:`DecodingState.inspect`."""
        return self.state.inspect()

    def snapshot(self) -> DecodingState:
        """The state as int64 on the host: to save, to copy, or to go on with elsewhere."""
        host = self._start.copy()
        host.position[:] = self._position
        for node, memory in self.state.memories.items():
            for name, value in memory.items():
                host.memories[node][name][:] = value.cpu().numpy()
        return host

    def restore(self, state: DecodingState) -> None:
        """Go on from a state on the host, of this model and batch size.

        Raises:
            MambaintError: if it is of another model, or of another number of sequences.
        """
        state.require(self.graph.model_id, self.batch)
        self._position[:] = state.position
        self.state.position.copy_(torch.from_numpy(state.position))
        for node, memory in state.memories.items():
            for name, value in memory.items():
                self.state.memories[node][name].copy_(torch.from_numpy(value))

    def _on_device(self, state: DecodingState) -> DecodingState:
        def held(memories: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
            return {
                node: {
                    name: torch.tensor(value, dtype=self._dtype, device=self.device)
                    for name, value in memory.items()
                }
                for node, memory in memories.items()
            }

        position = torch.tensor(state.position, device=self.device)
        return replace(state, position=position, memories=held(state.memories), initial=held(state.initial))

    # -- one step -----------------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self, inputs: Tensor | ArrayLike, trace: dict[str, Tensor] | None = None) -> Tensor:
        """Consume one step of every sequence.

        Args:
            inputs: integers [batch, ...], such as token ids [batch]. Tensors that are on a GPU already are
                not checked against the model's domain, which would wait for it.
            trace: if given, receives every tensor [batch, 1, ...] and every intermediate of the step; those
                of the end of a chunk mean something only in rows where one ended. Such a step is eager.

        Returns:
            The logits of the step, int64 [batch, ...].

        Raises:
            MambaintError: for inputs that do not fit, or a step beyond what the model can carry.
        """
        tensor = inputs if isinstance(inputs, Tensor) else torch.from_numpy(np.asarray(inputs))
        wanted = [self.batch, *self._inputs.shape[2:]]
        if list(tensor.shape) != wanted:
            raise MambaintError(
                f"a step has shape {list(tensor.shape)}, the decoder takes {wanted}",
                f"give one step of each of its {self.batch} sequences",
            )
        if tensor.device.type == "cpu":
            check_input(self.graph, tensor.numpy()[:, None])
        self.state.require_room(int(self._position.max()) + 1)
        self._inputs.copy_(tensor[:, None])
        replay = self._replay if trace is None else None
        if replay is None:
            logits = self._advance(trace)
        else:
            replay.step.replay()
            logits = replay.logits.clone()
        self._position += 1
        if self._chunk_ended():
            if replay is None:
                self._end_chunks(trace=trace)
            else:
                replay.chunk_end.replay()
        return logits

    def _chunk_ended(self) -> bool:
        """Whether any row is at the end of a chunk of any operation, as the host counts them."""
        return any((self._position % chunk == 0).any() for chunk in set(self._chunks.values()))

    def _advance(self, trace: dict[str, Tensor] | None = None) -> Tensor:
        """The step itself: what a CUDA graph holds."""

        def run(node: Node, operands: list[Tensor]) -> Tensor:
            memory, record = self.state.memories.get(node.name, {}), recorder(node, trace)
            value = OPERATIONS[node.op].execute_step(node, operands, memory, self.state.position, record)
            if trace is not None:
                trace[node.name] = value
            return value

        logits = self._walk(self._inputs, run)[:, 0].long()
        self.state.position += 1
        return logits

    def _end_chunks(self, rows: Tensor | None = None, trace: dict[str, Tensor] | None = None) -> None:
        """Bring ``rows``, bool [batch] or all, over the ends of the chunks they have just filled."""
        for node in self._nodes:
            if node.name in self._chunks:
                ended = self.state.position % self._chunks[node.name] == 0
                if rows is not None:
                    ended &= rows
                memory = self.state.memories[node.name]
                OPERATIONS[node.op].execute_chunk_end(node, memory, ended, recorder(node, trace))

    def _walk(self, inputs: Tensor, run: Callable[[Node, list[Tensor]], Tensor]) -> Tensor:
        """Every node in its order, forgetting what no later one reads; the value of the output."""
        values: dict[str, Tensor] = {}
        for node in self._nodes:
            operands = [inputs] if node.op == "input" else [values[name] for name in node.inputs]
            values[node.name] = run(node, operands)
            for name in self._done[node.name]:
                del values[name]
        return values[self.graph.output]

    @torch.inference_mode()
    def _capture(self) -> _Replay:
        """Capture a step and the end of a chunk, and start anew."""
        step, chunk_end = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device):
            for _ in range(WARM_UP):
                self._advance()
                self._end_chunks()
            with torch.cuda.graph(step):
                logits = self._advance()
            with torch.cuda.graph(chunk_end, pool=step.pool()):
                self._end_chunks()
        self.reset()
        return _Replay(step, chunk_end, logits)

    # -- prompts ------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def prefill(self, prompts: Sequence[ArrayLike], rows: Sequence[int] | None = None) -> Tensor:
        """Start sequences from prompts, by the chunked run over whole sequences: as if stepped, but faster.

        Prompts of different lengths are padded on the right, where a causal model cannot see it. This takes
        memory in proportion to the prompts; stepping through them does not.

        Args:
            prompts: integers [T_i, ...], such as lists of token ids; each at least one step.
            rows: which sequences of the batch to start, all by default; they are reset, others stay.

        Returns:
            The logits after each prompt, int64 [len(prompts), ...].

        Raises:
            MambaintError: for an empty prompt, integers outside the model's domain, or one prompt too many.
        """
        chosen = list(range(self.batch)) if rows is None else list(rows)
        if len(prompts) != len(chosen) or len(set(chosen)) != len(chosen):
            raise MambaintError(
                f"{len(prompts)} prompts for {len(chosen)} sequences", "give one prompt for each, in a list"
            )
        checked = []
        for i, prompt in enumerate(prompts):
            if len(np.asarray(prompt)) == 0:
                raise MambaintError(f"prompt {i} is empty", "give at least one token")
            checked.append(check_input(self.graph, np.asarray(prompt)[None])[0])
        lengths = np.array([len(prompt) for prompt in checked], np.int64)
        self.state.require_room(int(lengths.max()))
        self.reset(chosen)
        logits: dict[int, Tensor] = {}
        for group in _groups(lengths):
            found = self._prefill_group([checked[i] for i in group], [chosen[i] for i in group])
            logits.update(zip(group, found, strict=True))
        started = torch.zeros(self.batch, dtype=torch.bool, device=self.device)
        started[chosen] = True
        self._position[chosen] = lengths
        self.state.position[chosen] = torch.from_numpy(lengths).to(self.device)
        self._end_chunks(started)
        return torch.stack([logits[i] for i in range(len(checked))])

    def _prefill_group(self, prompts: list[IntArray], rows: list[int]) -> list[Tensor]:
        """Run prompts together and enter what they leave into their ``rows``; the logits after each."""
        lengths = np.array([len(prompt) for prompt in prompts])
        shape = len(prompts), int(lengths.max()), *prompts[0].shape[1:]
        padded = np.full(shape, self.graph.input.integer("low"))
        for i, prompt in enumerate(prompts):
            padded[i, : len(prompt)] = prompt
        by_length = [
            (
                int(length),
                torch.from_numpy(np.flatnonzero(lengths == length)).to(self.device),
                torch.from_numpy(np.array(rows)[lengths == length]).to(self.device),
            )
            for length in np.unique(lengths)
        ]

        def run(node: Node, operands: list[Tensor]) -> Tensor:
            operation, internals = OPERATIONS[node.op], dict[str, Tensor]()
            value = operation.execute(node, operands, internals.__setitem__, True)
            memory = self.state.memories.get(node.name)
            if memory is not None:
                for length, source, target in by_length:
                    operation.memorize(node, operands, internals, source, length, memory, target)
            return value

        values = self._walk(torch.from_numpy(padded).to(self.device, self._dtype), run)
        return [values[i, length - 1].long() for i, length in enumerate(lengths.tolist())]


def _groups(lengths: IntArray) -> list[list[int]]:
    """Indices of prompts to run together: of similar length, and no more than PREFILL_STEPS with padding."""
    groups: list[list[int]] = []
    for index in np.argsort(lengths, kind="stable").tolist():
        if groups and (len(groups[-1]) + 1) * int(lengths[index]) <= PREFILL_STEPS:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def _last_reads(graph: Graph) -> dict[str, list[str]]:
    """By node, the values that no node after it reads."""
    last = {name: node.name for node in graph.nodes for name in (node.name, *node.inputs)}
    done: dict[str, list[str]] = {node.name: [] for node in graph.nodes}
    for name, reader in last.items():
        if name != graph.output:
            done[reader].append(name)
    return done
