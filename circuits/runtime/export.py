"""Integer graph to ONNX: of whole sequences, and of one step after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx
from onnx import TensorProto, helper

from circuits.runtime.builder import Builder
from circuits.runtime.clock import Clock
from circuits.runtime.operations import LOWERINGS, STEP_LOWERINGS
from circuits.runtime.ssd import ssd_chunk_end
from mamba_int.decoding_state import DecodingState
from mamba_int.graph import Graph, Node
from mamba_int.operations import OPERATIONS

OPSET = 17
IR_VERSION = 8
POSITION = "position"
NEXT = "next."
"""Before the name of a state that goes in, the name of what comes out for it."""


def runtime_onnx(graph: Graph, trace: bool = False) -> bytes:
    """Serialise a graph for ONNX Runtime; the same graph gives the same bytes.

    The file computes the integers of ``mamba_int.interpreter.evaluate``, every intermediate included.
    Tensors bear the names of their nodes, those inside an operation ``node.intermediate``. The input has
    the dtype of the output, int32 (int64 for graphs wider than 29 bits), and any batch size; its length
    is ``graph.seq_len``. The first output is the logits.

    Args:
        graph: the model.
        trace: make every tensor an output.
    """
    b = Builder(graph)
    source = graph.input.name
    tensors = {source: source}
    for node in graph.nodes:
        if node.name != source:
            result = LOWERINGS[node.op](b, node, [tensors[name] for name in node.inputs])
            tensors[node.name] = b.call(result, node.name)
    shapes = {name: tensor.shape for name, tensor in graph.types.items()}
    return _serialised(b, [_described(b, source, shapes[source])], _outputs(b, shapes, trace))


@dataclass(frozen=True)
class DecodingOnnx:
    """Two ONNX files that decode token by token, with the memory of ``mamba_int.decoding_state``.

    States go in as ``node:name`` [batch, ...], in the dtype of the graph, and come out as ``next.node:name``
    where they change; ``position``, int64 [batch], is the number of steps consumed.

    Attributes:
        step: the next token of every sequence, [batch, 1, ...], ``position`` and all states; gives the logits
            [batch, 1, ...] and the states that change.
        chunk_end: to be run after a step that fills a chunk in any sequence: the position after that step and
            the states of the scans; gives them all. None for a graph without chunks.
        chunks: numbers of steps after which a chunk is full.
    """

    step: bytes
    chunk_end: bytes | None
    chunks: tuple[int, ...]


def decoding_onnx(graph: Graph, trace: bool = False) -> DecodingOnnx:
    """Serialise a causal graph for decoding in ONNX Runtime; see :func:`runtime_onnx`.

    The files compute the integers of ``mamba_int.interpreter.evaluate_step``.

    Args:
        graph: the model.
        trace: make every tensor of a step an output.

    Raises:
        MambaintError: for a graph that is not causal.
    """
    states = {
        node: {name: value.shape for name, value in memory.items()}
        for node, memory in DecodingState.of(graph, 1).initial.items()
    }
    chunks = {
        node.name: size for node in graph.nodes if (size := OPERATIONS[node.op].chunk(node)) is not None
    }
    ended = [node for node in graph.nodes if node.name in chunks]
    chunk_end = _chunk_end(graph, ended, chunks, states) if ended else None
    return DecodingOnnx(_step(graph, states, trace), chunk_end, tuple(sorted(set(chunks.values()))))


States = Mapping[str, Mapping[str, tuple[int, ...]]]
"""Shapes of the memory of one sequence: node -> name -> shape."""


def _step(graph: Graph, states: States, trace: bool) -> bytes:
    b = Builder(graph)
    clock, source = Clock(b, POSITION), graph.input.name
    tensors, changed = {source: source}, {}
    for node in graph.nodes:
        if node.name == source:
            continue
        operands = [tensors[name] for name in node.inputs]
        if node.op in STEP_LOWERINGS:
            memory = {name: f"{node.name}:{name}" for name in states.get(node.name, ())}
            result, after = STEP_LOWERINGS[node.op](b, node, operands, memory, clock)
            changed |= {memory[name]: value for name, value in after.items()}
        else:
            result = LOWERINGS[node.op](b, node, operands)
        tensors[node.name] = b.call(result, node.name)
    shapes = {name: (1, *tensor.shape[1:]) for name, tensor in graph.types.items()}
    inputs = [_described(b, source, shapes[source]), _positions(), *_described_states(b, states)]
    outputs = _outputs(b, shapes, trace)
    for state, value in changed.items():
        b.nodes.append(helper.make_node("Identity", [value], [f"{NEXT}{state}"]))
    kept = {
        node: {name: s for name, s in m.items() if f"{node}:{name}" in changed} for node, m in states.items()
    }
    return _serialised(b, inputs, [*outputs, *_described_states(b, kept, NEXT)])


def _chunk_end(graph: Graph, nodes: Sequence[Node], chunks: Mapping[str, int], states: States) -> bytes:
    b = Builder(graph)
    clock = Clock(b, POSITION)
    initial = DecodingState.of(graph, 1).initial
    for node in nodes:
        memory = {name: f"{node.name}:{name}" for name in states[node.name]}
        after = {name: b.constant(initial[node.name][name]) for name in memory if name != "H"}
        after["H"] = ssd_chunk_end(b, node, memory)
        for name, state in memory.items():
            rank = len(states[node.name][name])
            ended = b.reshape(clock.ended(chunks[node.name]), 0, *[1] * rank)
            b.nodes.append(helper.make_node("Where", [ended, after[name], state], [f"{NEXT}{state}"]))
    held = {node.name: states[node.name] for node in nodes}
    inputs = [_positions(), *_described_states(b, held)]
    return _serialised(b, inputs, _described_states(b, held, NEXT))


def _described(b: Builder, name: str, shape: Sequence[int] | None) -> onnx.ValueInfoProto:
    sizes = None if shape is None else ["batch", *shape]
    return helper.make_tensor_value_info(name, b.onnx_type, sizes)


def _positions() -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(POSITION, TensorProto.INT64, ["batch"])


def _described_states(b: Builder, states: States, prefix: str = "") -> list[onnx.ValueInfoProto]:
    return [
        _described(b, f"{prefix}{node}:{name}", shape)
        for node, memory in states.items()
        for name, shape in memory.items()
    ]


def _outputs(b: Builder, shapes: Mapping[str, tuple[int, ...]], trace: bool) -> list[onnx.ValueInfoProto]:
    """The logits; with ``trace`` every other named tensor after them."""
    first = b.graph.output
    names = [first, *(name for name in b.names if trace and name != first)]
    return [_described(b, name, shapes.get(name)) for name in names]


def _serialised(
    b: Builder, inputs: Sequence[onnx.ValueInfoProto], outputs: Sequence[onnx.ValueInfoProto]
) -> bytes:
    model = helper.make_model(
        helper.make_graph(b.nodes, "mambaint", inputs, outputs, list(b.initializers.values())),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="mambaint",
    )
    frac = str(b.graph.by_name[b.graph.output].frac)
    helper.set_model_props(model, {"model_id": b.graph.model_id, "logits_frac": frac})
    content: bytes = model.SerializeToString(deterministic=True)
    return content
