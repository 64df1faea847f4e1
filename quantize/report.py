"""The report on a quantized model: everything measured, as one JSON value."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mamba_int.graph import Graph
from quantize.equality import Equality
from quantize.measurement import Measurement
from quantize.summary import GraphSummary, magnitude_bits

if TYPE_CHECKING:
    from mamba_int.training import Checkpoint

FORMAT = "mambaint-report"
VERSION = 1
TWIN_FOLDER = "float-twin"


def twin_metric(checkpoint: Path, of: Checkpoint) -> float | None:
    """Test metric of the float twin trained beside a checkpoint, or None if there is none.

    Args:
        checkpoint: path of the integer run's checkpoint. of: its content.

    Raises:
        MambaintError: if there is a twin but it cannot be read.
    """
    from mamba_int.training import load_checkpoint
    from mamba_int.training.model_config import arithmetic_of

    path = checkpoint.parent / TWIN_FOLDER / checkpoint.name
    if not path.exists():
        return None
    twin = load_checkpoint(path)
    same = arithmetic_of(twin.model_config) == "float" and twin.data.fingerprint == of.data.fingerprint
    metric = "accuracy" if of.data.tokenizer is None else "bits_per_byte"
    return twin.results.get(f"test_{metric}") if same else None


def make_report(
    graph: Graph,
    summary: GraphSummary,
    measurement: Measurement,
    equality: Equality,
    checkpoint_metric: float | None,
    twin: float | None,
) -> dict[str, Any]:
    """Put together what was measured.

    Args:
        graph: the model. summary: of it.
        measurement: of it, on the test split. equality: of the backends.
        checkpoint_metric: what training measured on the test split, if it did. twin: of the float twin.
    """
    metric = measurement.metric
    tensors = []
    for tensor in summary.tensors:
        seen = measurement.observed[tensor.name]
        tensors.append(
            asdict(tensor)
            | {
                "shape": list(tensor.shape),
                "observed_low": seen.low,
                "observed_high": seen.high,
                "observed_bits": magnitude_bits(seen.low, seen.high),
                "saturation": round(seen.saturated / seen.values, 6) if tensor.op == "clamp" else None,
            }
        )
    return {
        "format": FORMAT,
        "version": VERSION,
        **summary.to_dict(),
        "card": dict(graph.card),
        f"test_{metric}": measurement.value,
        "test_examples": measurement.examples,
        f"float_twin_{metric}": twin,
        f"checkpoint_test_{metric}": checkpoint_metric,
        "equal_numpy_torch_onnx": equality.equal,
        "equality": {
            "backends": list(equality.backends),
            "inputs": equality.inputs,
            "tensors": equality.tensors,
            "values_compared": equality.values,
            "mismatches": equality.mismatches,
        },
        "tensors": tensors,
        "confusion": measurement.confusion,
    }
