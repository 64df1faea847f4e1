"""What a run of a float model amounts to: its size, its scan, and where it runs."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mamba_int.float_models.mixer import Mixer
from mamba_int.float_models.models import MambaModel
from triton_kernels.dispatch import runs_on_triton


@dataclass(frozen=True)
class RunMetrics:
    """Of one forward pass.

    Attributes:
        batch, sequence_length: of the inputs.
        mixer, d_state: of the model.
        scan: ``sequential``, ``chunked`` or ``associative``. triton: whether as Triton kernels.
        device: where.
        parameters: of the whole model.
        complexity: multiply-adds of all recurrences and all products with weights, for the whole batch. It is
            linear in the length.
    """

    batch: int
    sequence_length: int
    mixer: str
    d_state: int
    scan: str
    triton: bool
    device: str
    parameters: int
    complexity: int


def run_metrics(model: MambaModel, inputs: Tensor) -> RunMetrics:
    """The metrics of ``model(inputs)``, without running it."""
    config = model.config
    batch, length = inputs.shape[:2]
    steps = batch * length
    complexity = 0
    for module in model.modules():
        if isinstance(module, Mixer):
            complexity += batch * module.complexity(length)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        # A table of embeddings is looked up, not multiplied.
        looked_up = name == "backbone.embeddings.weight" and not config.n_features
        if name.endswith("weight") and parameter.ndim >= 2 and not looked_up:
            pooled = name.startswith("classifier.")
            complexity += (batch if pooled else steps) * parameter.numel()
    parameter = next(model.parameters())
    return RunMetrics(
        batch,
        length,
        config.mixer,
        config.d_state,
        config.scan_type,
        config.scan_type != "sequential" and runs_on_triton(parameter),
        str(parameter.device),
        sum(p.numel() for p in model.parameters()),
        complexity,
    )
