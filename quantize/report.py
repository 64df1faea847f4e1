"""The report on a quantized model: everything measured, as one JSON value."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mamba_int.errors import MambaintError
from mamba_int.graph import Graph
from quantize.equality import Equality
from quantize.measurement import Measurement
from quantize.summary import GraphSummary, magnitude_bits

if TYPE_CHECKING:
    from mamba_int.training import Checkpoint
    from mamba_int.training.evaluation import Score
    from quantize.comparison import Comparison

FORMAT = "mambaint-report"
VERSION = 2
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
    comparison: Comparison | None = None,
    float_score: Score | None = None,
    file_bytes: int | None = None,
) -> dict[str, Any]:
    """Put together what was measured.

    Args:
        graph: the model. summary: of it.
        measurement: of it, on the test split. equality: of the backends.
        checkpoint_metric: what training measured on the test split, if it did. twin: of the float twin.
        comparison: of a converted model with the float model that it comes from.
        float_score: of that float model, on the same test split
            (``mamba_int.training.evaluate`` of ``quantize.measurement.text_tokens``).
        file_bytes: size of the graph's file, if it is written.

    Raises:
        MambaintError: if the comparison is of another model.
    """
    metric = measurement.metric
    if comparison is not None and comparison.model_id != graph.model_id:
        raise MambaintError(
            f"the comparison is of model {comparison.model_id[:16]}, the report of {graph.model_id[:16]}",
            "compare the model that is reported",
        )
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
        "file_bytes": file_bytes,
        "card": dict(graph.card),
        f"test_{metric}": measurement.value,
        "test_perplexity": _perplexity(metric, measurement.loss),
        "test_examples": measurement.examples,
        f"float_{metric}": float_score.metric if float_score else None,
        "float_perplexity": _perplexity(metric, float_score.loss) if float_score else None,
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
        "comparison": comparison.to_dict() if comparison else None,
    }


def _perplexity(metric: str, loss: float) -> float | None:
    """Of a language model: e to the mean cross entropy of a token."""
    # A loss of more nats than e^x takes is that of a broken model.
    return None if metric == "accuracy" else math.exp(min(loss, 700.0))
