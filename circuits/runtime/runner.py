"""Running the exported graph in ONNX Runtime, on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from circuits.runtime.export import NEXT, POSITION, decoding_onnx, runtime_onnx
from mamba_int.decoding_state import DecodingState
from mamba_int.errors import MambaintError
from mamba_int.graph import Graph, IntArray
from mamba_int.interpreter import check_input
from mamba_int.operations.base import Trace

HELD_VALUES = 1 << 26
"""Of the outputs of one run about so many values are held, unless a single one has more."""


class OnnxRunner:
    """A graph in ONNX Runtime.

    Args:
        model: the graph, or the bytes :func:`runtime_onnx` made of it.
        threads: for one operation.
    """

    def __init__(self, model: Graph | bytes, threads: int = 1) -> None:
        self._model = model
        self._threads = threads

    @cached_property
    def _plain(self) -> Any:
        content = self._model if isinstance(self._model, bytes) else runtime_onnx(self._model)
        return session(content, self._threads)

    @cached_property
    def _traced(self) -> Any:
        if isinstance(self._model, bytes):
            return self._plain
        return session(runtime_onnx(self._model, True), self._threads)

    def __call__(self, inputs: IntArray, trace: Trace | None = None) -> IntArray:
        """The logits of a batch.

        Args:
            inputs: int64 [batch, T, ...], checked as by ``mamba_int.interpreter.check_input``.
            trace: if given, receives every tensor by name, as in the interpreter. A runner made of bytes
                gives the tensors that those have as outputs: all of them with ``runtime_onnx(graph, True)``.

        Returns:
            int64 [batch, ...].

        Raises:
            MambaintError: if the bytes are not an ONNX model, or the input does not fit it.
        """
        found = self._plain if trace is None else self._traced
        (source,) = found.get_inputs()
        feed = {source.name: inputs.astype(_dtype(source))}
        outputs = found.get_outputs()
        groups = [[outputs[0].name]] if trace is None else _groups(outputs, len(inputs))
        if trace is not None:
            trace[source.name] = inputs
        logits: IntArray = np.zeros(0, np.int64)
        for names in groups:
            try:
                results = found.run(names, feed)
            except Exception as error:  # the exceptions of ONNX Runtime share no base class
                raise MambaintError(
                    f"ONNX Runtime cannot run the model: {_first_line(error)}",
                    f"give an input of shape {source.shape}",
                ) from error
            for name, result in zip(names, results, strict=True):
                values: IntArray = result.astype(np.int64)
                if trace is not None:
                    trace[name] = values
                if name == outputs[0].name:
                    logits = values
        return logits


def _groups(outputs: Sequence[Any], batch: int) -> list[list[str]]:
    """Names of outputs that are held together: a large model's would not all fit the memory."""
    groups: list[list[str]] = []
    held = HELD_VALUES
    for output in outputs:
        size = batch * prod(length for length in output.shape if isinstance(length, int))
        if held + size > HELD_VALUES:
            groups.append([])
            held = 0
        groups[-1].append(output.name)
        held += size
    return groups


class OnnxDecoder:
    """A batch of sequences, decoded together in ONNX Runtime: the integers of ``mamba_int.decoder.Decoder``.

    Prompts are entered step by step, or by that decoder's ``prefill``, whose ``snapshot`` goes in here with
    :meth:`restore`.

    Args:
        graph: a causal model, such as a language model.
        batch: number of sequences.
        threads: for one operation.

    Attributes:
        graph, batch: as given.

    Raises:
        MambaintError: for a graph that is not causal.
    """

    def __init__(self, graph: Graph, batch: int = 1, threads: int = 1) -> None:
        self.graph, self.batch = graph, batch
        model = decoding_onnx(graph)
        self._threads, self._chunks = threads, model.chunks
        self._step = session(model.step, threads)
        self._chunk_end = None if model.chunk_end is None else session(model.chunk_end, threads)
        self._start = DecodingState.of(graph, batch)
        self._position: IntArray = np.zeros(batch, np.int64)
        source, logits = self._step.get_inputs()[0], self._step.get_outputs()[0]
        self._dtype = _dtype(source)
        self._inputs = np.zeros((batch, *source.shape[1:]), self._dtype)
        self._logits = np.zeros((batch, *logits.shape[1:]), self._dtype)
        # What a step reads and what it writes are two sets of tensors, which take turns.
        states = {
            f"{node}:{name}": value
            for node, memory in self._start.memories.items()
            for name, value in memory.items()
        }
        changing = {output.name.removeprefix(NEXT) for output in self._step.get_outputs()[1:]}
        kinds = {source.name: _dtype(source) for source in self._step.get_inputs()}
        here = {name: value.astype(kinds[name]) for name, value in states.items()}
        there = {name: value.copy() if name in changing else value for name, value in here.items()}
        self._sets, self._turn = (here, there), 0
        self._bindings = tuple(
            self._bound(self._step, (here, there)[i], (here, there)[1 - i], changing) for i in range(2)
        )

    def _bound(
        self, found: Any, read: dict[str, NDArray[Any]], written: dict[str, NDArray[Any]], changing: set[str]
    ) -> Any:
        """A step from one set of tensors to the other, without copies."""
        from onnxruntime import OrtValue

        def value(array: NDArray[Any]) -> Any:
            return OrtValue.ortvalue_from_numpy(array)

        binding = found.io_binding()
        binding.bind_ortvalue_input(self.graph.input.name, value(self._inputs))
        binding.bind_ortvalue_input(POSITION, value(self._position))
        for name, array in read.items():
            binding.bind_ortvalue_input(name, value(array))
        binding.bind_ortvalue_output(self.graph.output, value(self._logits))
        for name in sorted(changing):
            binding.bind_ortvalue_output(f"{NEXT}{name}", value(written[name]))
        return binding

    @cached_property
    def _traced(self) -> Any:
        return session(decoding_onnx(self.graph, True).step, self._threads)

    @property
    def _memories(self) -> dict[str, NDArray[Any]]:
        return self._sets[self._turn]

    def step(self, inputs: ArrayLike, trace: dict[str, IntArray] | None = None) -> IntArray:
        """Consume one step of every sequence.

        Args:
            inputs: integers [batch, ...], such as token ids [batch].
            trace: if given, receives every tensor [batch, 1, ...] and every intermediate of the step but
                those of the end of a chunk.

        Returns:
            The logits of the step, int64 [batch, ...].

        Raises:
            MambaintError: for inputs that do not fit, or a step beyond what the model can carry.
        """
        array = np.asarray(inputs)
        wanted = [self.batch, *self._inputs.shape[2:]]
        if list(array.shape) != wanted:
            raise MambaintError(
                f"a step has shape {list(array.shape)}, the decoder takes {wanted}",
                f"give one step of each of its {self.batch} sequences",
            )
        self._inputs[:] = check_input(self.graph, array[:, None])
        self._start.require_room(int(self._position.max()) + 1)
        if trace is not None:
            trace[self.graph.input.name] = self._inputs.astype(np.int64)
            names = [output.name for output in self._traced.get_outputs()]
            tensors = [name for name in names if not name.startswith(NEXT)]
            found = self._traced.run(tensors, self._feed(self._traced))
            trace.update((name, value.astype(np.int64)) for name, value in zip(tensors, found, strict=True))
        self._step.run_with_iobinding(self._bindings[self._turn])
        self._turn = 1 - self._turn
        self._position += 1
        if self._chunk_end and any((self._position % chunk == 0).any() for chunk in self._chunks):
            names = [output.name for output in self._chunk_end.get_outputs()]
            for name, value in zip(
                names, self._chunk_end.run(names, self._feed(self._chunk_end)), strict=True
            ):
                self._memories[name.removeprefix(NEXT)][:] = value
        return self._logits[:, 0].astype(np.int64)

    def _feed(self, found: Any) -> dict[str, NDArray[Any]]:
        held = {self.graph.input.name: self._inputs, POSITION: self._position} | self._memories
        return {source.name: held[source.name] for source in found.get_inputs()}

    def reset(self) -> None:
        """Put all sequences before their first step."""
        self._start.reset()
        self.restore(self._start)

    def snapshot(self) -> DecodingState:
        """The state as int64: to save, to copy, or to go on with elsewhere."""
        state = self._start.copy()
        state.position[:] = self._position
        for node, memory in state.memories.items():
            for name, value in memory.items():
                value[:] = self._memories[f"{node}:{name}"]
        return state

    def restore(self, state: DecodingState) -> None:
        """Go on from a state of this model and batch size.

        Raises:
            MambaintError: if it is of another model, or of another number of sequences.
        """
        state.require(self.graph.model_id, self.batch)
        self._position[:] = state.position
        for node, memory in state.memories.items():
            for name, value in memory.items():
                self._memories[f"{node}:{name}"][:] = value


def session(content: bytes, threads: int = 1) -> Any:
    """An ONNX Runtime session on the CPU.

    Raises:
        MambaintError: if the bytes are not an ONNX model.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Its planner takes a time that grows with the square of the nodes: 23 s for two layers, instead of one.
    options.enable_mem_reuse = False
    try:
        return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the exceptions of ONNX Runtime share no base class
        raise MambaintError(
            f"ONNX Runtime cannot load the model: {_first_line(error)}", "quantize the checkpoint again"
        ) from error


def _dtype(source: Any) -> type[np.number[Any]]:
    kinds: dict[str, type[np.number[Any]]] = {
        "tensor(int32)": np.int32,
        "tensor(int64)": np.int64,
        "tensor(float)": np.float32,
        "tensor(double)": np.float64,
    }
    return kinds[source.type]


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
