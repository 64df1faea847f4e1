"""Running the exported graph in ONNX Runtime, on the CPU."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np

from circuits.runtime.export import runtime_onnx
from mamba_int.errors import MambaintError
from mamba_int.graph import Graph, IntArray


class OnnxRunner:
    """A graph in ONNX Runtime, on one thread.

    Args:
        model: the graph, or the bytes :func:`runtime_onnx` made of it.
    """

    def __init__(self, model: Graph | bytes) -> None:
        self._model = model

    @cached_property
    def _plain(self) -> Any:
        return _session(self._model if isinstance(self._model, bytes) else runtime_onnx(self._model))

    @cached_property
    def _traced(self) -> Any:
        return self._plain if isinstance(self._model, bytes) else _session(runtime_onnx(self._model, True))

    def __call__(self, inputs: IntArray, trace: dict[str, IntArray] | None = None) -> IntArray:
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
        session = self._plain if trace is None else self._traced
        (source,) = session.get_inputs()
        dtype = np.int32 if source.type == "tensor(int32)" else np.int64
        names = [output.name for output in session.get_outputs()]
        wanted = names if trace is not None else names[:1]
        try:
            results = session.run(wanted, {source.name: inputs.astype(dtype)})
        except Exception as error:  # the exceptions of ONNX Runtime share no base class
            raise MambaintError(
                f"ONNX Runtime cannot run the model: {_first_line(error)}",
                f"give an input of shape {source.shape}",
            ) from error
        values: list[IntArray] = [result.astype(np.int64) for result in results]
        if trace is not None:
            trace[source.name] = inputs
            trace.update(zip(names, values, strict=True))
        return values[0]


def _session(content: bytes) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the exceptions of ONNX Runtime share no base class
        raise MambaintError(
            f"ONNX Runtime cannot load the model: {_first_line(error)}", "quantize the checkpoint again"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
