"""The NumPy int64 interpreter: the specification every other backend is tested equal to."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

from mamba_int.decoding_state import DecodingState
from mamba_int.errors import MambaintError
from mamba_int.graph import Graph, IntArray, Node
from mamba_int.operations import OPERATIONS
from mamba_int.operations.base import Record, Trace, recorder


def check_input(graph: Graph, values: ArrayLike) -> IntArray:
    """Check a batch of inputs against the graph's input node and return it as int64.

    Args:
        graph: the model.
        values: [batch, T, features] or, for tokens, [batch, T]; integers, or floats that are integers.

    Raises:
        MambaintError: naming the shape, or the position and value, at fault.
    """
    low, high = graph.input.integer("low"), graph.input.integer("high")
    features = graph.input.integer("features")
    try:
        array = np.asarray(values)
        numbers = array.astype(np.float64)
    except (TypeError, ValueError) as error:
        raise MambaintError(
            "the input is ragged or not numeric", "give a rectangular array of integers"
        ) from error
    wanted = 3 if features else 2
    fixed = any(node.op == "reduce" for node in graph.nodes)
    shape = array.shape
    steps_fit = len(shape) == wanted and (shape[1] == graph.seq_len if fixed else shape[1] >= 1)
    if not steps_fit or (features and shape[2] != features):
        steps = str(graph.seq_len) if fixed else "T"
        want = f"[batch, {steps}, {features}]" if features else f"[batch, {steps}]"
        raise MambaintError(f"the input has shape {list(shape)}, the model takes {want}", "reshape the input")
    wrong = ~np.isfinite(numbers) | (numbers != np.rint(numbers)) | (numbers < low) | (numbers > high)
    if wrong.any():
        where = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise MambaintError(
            f"input value {array[where]} at {list(where)} is not an integer in {low}..{high}",
            "give integers in that range",
        )
    return array.astype(np.int64)


def evaluate(graph: Graph, inputs: IntArray, trace: Trace | None = None) -> IntArray:
    """Run a batch through the graph in int64.

    Args:
        graph: the model.
        inputs: int64 as :func:`check_input` returns them.
        trace: if given, receives every tensor by node name and every intermediate inside an operation
            as ``node.intermediate``.

    Returns:
        The logits, int64 [batch, ...]; real values are ``logits * 2**-frac`` of the output node.
    """

    def run(node: Node, operands: list[IntArray], record: Record) -> IntArray:
        return OPERATIONS[node.op].evaluate(node, operands, record)

    return _walk(graph, inputs, trace, run)


def evaluate_step(
    graph: Graph, inputs: IntArray, state: DecodingState, trace: Trace | None = None
) -> IntArray:
    """Run the next step of a batch of sequences: equal to :func:`evaluate` of all their steps, at the last.

    Args:
        graph: a causal model.
        inputs: int64 [batch, ...], one step of what :func:`check_input` returns.
        state: what the steps before have left, on the host; it is brought over this one.
        trace: if given, receives every tensor [batch, 1, ...] and every intermediate of the step; those of
            the end of a chunk mean something only in rows where one ended.

    Returns:
        The logits of the step, int64 [batch, ...].

    Raises:
        MambaintError: for a step beyond what the model can carry.
    """
    state.require_room(int(state.position.max(initial=-1)) + 1)

    def run(node: Node, operands: list[IntArray], record: Record) -> IntArray:
        memory = state.memories.get(node.name, {})
        return OPERATIONS[node.op].evaluate_step(node, operands, memory, state.position, record)

    logits = _walk(graph, inputs[:, None], trace, run)[:, 0]
    state.position += 1
    for node in graph.nodes:
        chunk = OPERATIONS[node.op].chunk(node)
        if chunk is not None:
            ended = state.position % chunk == 0
            if ended.any():
                record = recorder(node, trace)
                OPERATIONS[node.op].evaluate_chunk_end(node, state.memories[node.name], ended, record)
    return logits


def _walk(
    graph: Graph,
    inputs: IntArray,
    trace: Trace | None,
    run: Callable[[Node, list[IntArray], Record], IntArray],
) -> IntArray:
    """Every node in its order; the value of the output."""
    values: dict[str, IntArray] = {}
    for node in graph.nodes:
        operands = [inputs] if node.op == "input" else [values[name] for name in node.inputs]
        values[node.name] = run(node, operands, recorder(node, trace))
        if trace is not None:
            trace[node.name] = values[node.name]
        for name in set(node.inputs):
            if graph.last_reader[name] == node.name:
                del values[name]
    return values[graph.output]
