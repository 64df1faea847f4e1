"""Integer graph to ONNX."""

from __future__ import annotations

import onnx
from onnx import helper

from circuits.runtime.builder import Builder
from circuits.runtime.operations import LOWERINGS
from mamba_int.graph import Graph

OPSET = 17
IR_VERSION = 8


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

    def described(name: str) -> onnx.ValueInfoProto:
        shape: list[str | int | None] | None = None
        if name in graph.types:
            shape = ["batch", *graph.types[name].shape]
        return helper.make_tensor_value_info(name, b.onnx_type, shape)

    outputs = [graph.output]
    if trace:
        outputs += [name for name in b.names if name != graph.output]
    model = helper.make_model(
        helper.make_graph(
            b.nodes,
            "mambaint",
            [described(source)],
            [described(name) for name in outputs],
            list(b.initializers.values()),
        ),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="mambaint",
    )
    frac = str(graph.by_name[graph.output].frac)
    helper.set_model_props(model, {"model_id": graph.model_id, "logits_frac": frac})
    content: bytes = model.SerializeToString(deterministic=True)
    return content
