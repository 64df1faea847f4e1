"""Random small float models: the same integers in every backend, near the float logits, at any length."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from circuits.runtime.runner import OnnxRunner
from mamba_int.float_models.config import MambaConfig
from mamba_int.float_models.models import MambaForCausalLM, MambaForSequenceClassification
from mamba_int.interpreter import evaluate
from quantize.equality import compare, torch_tracer
from quantize.float_mamba import ConversionConfig, InputFormat, convert

FORMAT = InputFormat(-8, 8, 3)
ACTIVATIONS = st.sampled_from(["silu", "gelu", "relu", "identity"])


@st.composite
def shapes(draw: st.DrawFn) -> dict[str, Any]:
    """Settings of a small model of either mixer."""
    mixer = draw(st.sampled_from(["mamba", "mamba2"]))
    settings_: dict[str, Any] = {
        "mixer": mixer,
        "n_layer": draw(st.integers(1, 2)),
        "d_conv": draw(st.integers(1, 4)),
        "d_state": draw(st.integers(1, 4)),
        "n_features": draw(st.sampled_from([0, 1, 3])),
        "vocab_size": 7,
        "pad_vocab_size_multiple": 4,
        "num_labels": 3,
        "bias": draw(st.booleans()),
        "conv_bias": draw(st.booleans()),
        "activation": draw(ACTIVATIONS),
        "gate_activation": draw(ACTIVATIONS),
        "pooling": draw(st.sampled_from(["last", "mean", "max"])),
        "dt_max": 0.5,
        "scan_type": "sequential",
    }
    if mixer == "mamba":
        rank = draw(st.integers(2, 3))
        return settings_ | {
            "d_model": draw(st.integers(3, 7)),
            "dt_rank": rank,
            "BCdt_norm": draw(st.booleans()),
        }
    headdim, groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    return settings_ | {
        # expand = 2 makes an even number of heads.
        "d_model": headdim * groups * draw(st.integers(1, 2)),
        "headdim": headdim,
        "n_groups": groups,
        "norm_per_group": draw(st.booleans()),
        "D_has_hdim": draw(st.booleans()),
    }


@settings(max_examples=14, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(shapes(), st.sampled_from([1, 2, 7, 17]), st.booleans(), st.sampled_from(["runtime", "circuit"]))
def test_backends_agree_on_every_integer_and_with_the_float_model(
    shape: dict[str, Any], length: int, language: bool, target: Any
) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = MambaConfig(**(shape | ({"n_features": 0} if language else {})))
    model = (MambaForCausalLM if language else MambaForSequenceClassification)(config).eval()
    if config.n_features:
        integers = torch.randint(FORMAT.low, FORMAT.high + 1, (12, length, config.n_features))
        reals, form = integers * 2.0**-FORMAT.frac, FORMAT
    else:
        integers = reals = torch.randint(0, config.vocab_size, (12, length))
        form = None
    graph = convert(model, reals, form, ConversionConfig(target=target, chunk_size=8)).graph
    equality = compare(graph, integers.numpy(), {"torch": torch_tracer(graph), "onnx": OnnxRunner(graph)})
    assert equality.equal, equality.first
    with torch.no_grad():
        exact = model(reals).logits.double().numpy()
    found = evaluate(graph, integers.numpy()) * 2.0 ** -graph.by_name[graph.output].frac
    # Of single steps logits may hardly differ; then they are near if they are near zero differences.
    assert np.square(found - exact).mean() < 0.03 * exact.var() + (0.02 * np.abs(exact).max()) ** 2
