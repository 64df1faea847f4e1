"""Integer graph to ONNX: of whole sequences, and of one step after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx
from onnx import TensorProto, helper

from circuits.runtime.builder import Builder
from circuits.runtime.clock import Clock
from circuits.runtime.operations import LOWERINGS, STEP_LOWERINGS
from circuits.runtime.ssd import ssd_chunk_end, state_types
from mamba_int.decoding_state import DecodingState
from mamba_int.graph import Graph, IntArray, Node
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
    the dtype of the logits, int32 (int64 for graphs wider than 29 bits), and any batch size; its length
    is ``graph.seq_len``. The first output is the logits. What is between is in float32 for graphs within 24
    bits, whose integers it holds exactly.

    Args:
        graph: the model.
        trace: make every tensor an output.
    """
    b = Builder(graph, graph.seq_len)
    source = graph.input.name
    tensors = {source: b.input(source)}
    for node in graph.nodes:
        if node.name != source:
            result = LOWERINGS[node.op](b, node, [tensors[name] for name in node.inputs])
            tensors[node.name] = _named(b, node, result)
    shapes = {name: tensor.shape for name, tensor in graph.types.items()}
    return _serialised(b, [_described(b, source, shapes[source])], _outputs(b, shapes, trace))


@dataclass(frozen=True)
class DecodingOnnx:
    """Two ONNX files that decode token by token, with the memory of ``mamba_int.decoding_state``.

    States go in as ``node:name`` [batch, ...] and come out as ``next.node:name`` where they change. They are
    integers in the dtype of the graph; x and H of the scans in the float type that their products take.
    ``position``, int64 [batch], is the number of steps consumed.

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
    sizes = {node.name: OPERATIONS[node.op].chunk(node) for node in graph.nodes}
    chunks = {name: size for name, size in sizes.items() if size is not None}
    chunk_end = _chunk_end(graph, chunks) if chunks else None
    return DecodingOnnx(_step(graph, trace), chunk_end, tuple(sorted(set(chunks.values()))))


def _step(graph: Graph, trace: bool) -> bytes:
    b = Builder(graph, 1)
    initial = DecodingState.of(graph, 1).initial
    clock, source = Clock(b, POSITION), graph.input.name
    tensors = {source: b.input(source)}
    states: list[onnx.ValueInfoProto] = []
    after: list[onnx.ValueInfoProto] = []
    results: dict[str, str] = {}
    for node in graph.nodes:
        if node.name == source:
            continue
        operands = [tensors[name] for name in node.inputs]
        if node.op in STEP_LOWERINGS:
            held = initial.get(node.name, {})
            memory = {name: f"{node.name}:{name}" for name in held}
            result, changed = STEP_LOWERINGS[node.op](b, node, operands, memory, clock)
            states += _described_states(b, node, held)
            after += _described_states(b, node, {name: held[name] for name in changed}, NEXT)
            results |= {f"{NEXT}{memory[name]}": value for name, value in changed.items()}
        else:
            result = LOWERINGS[node.op](b, node, operands)
        tensors[node.name] = _named(b, node, result)
    if trace:
        b.nodes += [helper.make_node("Identity", [value], [name]) for name, value in results.items()]
    else:
        b.outputs(results)
    shapes = {name: (1, *tensor.shape[1:]) for name, tensor in graph.types.items()}
    inputs = [_described(b, source, shapes[source]), _positions(), *states]
    return _serialised(b, inputs, [*_outputs(b, shapes, trace), *after])


def _chunk_end(graph: Graph, chunks: Mapping[str, int]) -> bytes:
    b = Builder(graph, 1)
    initial = DecodingState.of(graph, 1).initial
    clock = Clock(b, POSITION)
    states: list[onnx.ValueInfoProto] = []
    after: list[onnx.ValueInfoProto] = []
    for name, size in chunks.items():
        node, held = graph.by_name[name], initial[name]
        memory = {key: f"{name}:{key}" for key in held}
        kinds = state_types(b, node)
        for key, state in memory.items():
            if key == "H":
                value = ssd_chunk_end(b, node, memory)
            else:
                value = b.cast(b.constant(held[key]), kinds.get(key, b.onnx_type))
            ended = b.reshape(clock.ended(size), 0, *[1] * held[key].ndim)
            b.nodes.append(helper.make_node("Where", [ended, value, state], [f"{NEXT}{state}"]))
        states += _described_states(b, node, held)
        after += _described_states(b, node, held, NEXT)
    return _serialised(b, [_positions(), *states], after)


def _named(b: Builder, node: Node, result: str) -> str:
    """Give the result of a node its name, and return what its readers read: logits leave as integers."""
    if node.name != b.graph.output:
        return b.call(result, node.name)
    b.call(b.op("Cast", result, to=b.whole_type), node.name)
    return result


def _described(b: Builder, name: str, shape: Sequence[int] | None) -> onnx.ValueInfoProto:
    sizes: list[str | int | None] | None = None if shape is None else ["batch", *shape]
    whole = name in (b.graph.input.name, b.graph.output)
    return helper.make_tensor_value_info(name, b.whole_type if whole else b.onnx_type, sizes)


def _positions() -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(POSITION, TensorProto.INT64, ["batch"])


def _described_states(
    b: Builder, node: Node, memory: Mapping[str, IntArray], prefix: str = ""
) -> list[onnx.ValueInfoProto]:
    """Of what a node remembers of one sequence."""
    kinds = state_types(b, node) if node.op == "ssd" else {}
    return [
        helper.make_tensor_value_info(
            f"{prefix}{node.name}:{name}", kinds.get(name, b.onnx_type), ["batch", *value.shape]
        )
        for name, value in memory.items()
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
