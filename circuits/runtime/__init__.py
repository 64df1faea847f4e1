"""The integer graph as ONNX files that ONNX Runtime executes with the same integers."""

from circuits.runtime.export import DecodingOnnx, decoding_onnx, runtime_onnx
from circuits.runtime.runner import OnnxDecoder, OnnxRunner

__all__ = ["DecodingOnnx", "OnnxDecoder", "OnnxRunner", "decoding_onnx", "runtime_onnx"]
