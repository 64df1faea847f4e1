"""Mamba-Integer to integers: the same integers in every backend, and close to the float model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from triton import knobs

from circuits.runtime.runner import OnnxRunner
from mamba_int.errors import MambaintError
from mamba_int.float_models.bit_shift_norm import BitShiftNorm
from mamba_int.float_models.config import MambaConfig
from mamba_int.float_models.models import MambaForCausalLM
from mamba_int.graph import IntArray
from mamba_int.interpreter import evaluate
from quantize.calibration import trace
from quantize.equality import compare, torch_tracer
from quantize.float_mamba import PROVABLE, Conversion, ConversionConfig, convert
from quantize.importers import load_float_model
from tests.mamba_int.test_mamba_integer import TINY
from tests.quantize.importers.test_mamba_integer import tensors_of

VERSIONS = ("mamba_integer_v1", "mamba_integer_v2")


@pytest.fixture(autouse=True, scope="module")
def without_kernels() -> Any:
    """The interpreter would run Triton's kernels on these tensors."""
    with knobs.runtime.scope():
        knobs.runtime.interpret = False
        yield


def model_of(version: str, **changes: Any) -> MambaForCausalLM:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = dataclasses.replace(TINY, mixer=version, d_model=16, d_state=4, headdim=8, **changes)
    model = MambaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("norm.weight", "norm_f.weight", "step_size")):
                parameter.mul_(torch.rand_like(parameter) + 0.5)
            elif name.endswith("base_decay_nums"):
                parameter.copy_(torch.rand_like(parameter) * 33000 - 500)
            elif name.endswith("A_log"):
                parameter.copy_(-1.5 * torch.rand_like(parameter) - 0.1)
    return model


def tokens(length: int = 21) -> Tensor:
    return torch.randint(TINY.vocab_size, (24, length), generator=torch.Generator().manual_seed(1))


def noise(conversion: Conversion, model: MambaForCausalLM, ids: Tensor) -> float:
    """Mean square error of the logits over their variance."""
    with torch.no_grad():
        exact = model(ids).logits.double().numpy()
    frac = conversion.graph.by_name[conversion.graph.output].frac
    found = evaluate(conversion.graph, ids.numpy()) * 2.0**-frac
    return float(np.square(found - exact).mean() / exact.var())


def assert_equal_backends(conversion: Conversion, ids: Tensor) -> None:
    graph = conversion.graph
    runner = OnnxRunner(graph)

    def onnx_trace(batch: IntArray) -> dict[str, IntArray]:
        tensors: dict[str, IntArray] = {}
        runner(batch, tensors)
        return tensors

    equality = compare(graph, ids.numpy(), {"torch": torch_tracer(graph), "onnx": onnx_trace})
    assert equality.equal, equality.first


@pytest.mark.parametrize("version", VERSIONS)
def test_the_traced_forward_is_not_the_models_own(version: str) -> None:
    model, ids = model_of(version).double(), tokens()
    with torch.no_grad():
        torch.testing.assert_close(trace(model, ids, lambda key, value: None), model(ids).logits)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("provable", [False, True])
def test_backends_compute_other_integers_or_the_graph_another_model(version: str, provable: bool) -> None:
    model, ids = model_of(version), tokens(6 if provable else 21)
    conversion = convert(model, ids, config=PROVABLE if provable else None)
    assert_equal_backends(conversion, ids)
    found = noise(conversion, model, ids)
    print(version, provable, found, conversion.graph.max_bits)
    assert found < (0.2 if provable else 0.03)
