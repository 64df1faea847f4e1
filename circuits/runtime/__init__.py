"""The integer graph as an ONNX file that ONNX Runtime executes with the same integers."""

from circuits.runtime.export import runtime_onnx
from circuits.runtime.runner import OnnxRunner

__all__ = ["OnnxRunner", "runtime_onnx"]
