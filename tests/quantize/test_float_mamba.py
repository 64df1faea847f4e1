"""Float Mamba and Mamba-2 to integers: the same integers in every backend, and close to the float model."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from circuits.lowering import build_circuit
from circuits.runtime.runner import OnnxRunner
from mamba_int.errors import MambaintError
from mamba_int.float_models.config import MambaConfig
from mamba_int.float_models.models import MambaForCausalLM, MambaForSequenceClassification
from mamba_int.graph import IntArray
from mamba_int.interpreter import evaluate
from quantize.calibration import FloatModel, trace
from quantize.equality import compare, torch_tracer
from quantize.float_mamba import PROVABLE, Conversion, ConversionConfig, InputFormat, convert
from zk.prove import mock

SMALL: dict[str, Any] = {
    "mixer": "mamba2",
    "d_model": 12,
    "n_layer": 2,
    "d_state": 4,
    "headdim": 8,
    "vocab_size": 13,
    "num_labels": 4,
    "dt_max": 0.5,
    "scan_type": "sequential",
}
FORMAT = InputFormat(0, 16, 4)

FORMS: dict[str, dict[str, Any]] = {
    "last": {"n_features": 3},
    "mean_of_chunks": {"n_features": 3, "pooling": "mean", "length": 19},
    "tokens_classified": {},
    "mamba_last": {"mixer": "mamba", "n_features": 3, "d_state": 3},
    "max": {"n_features": 3, "pooling": "max", "d_state": 5},
    "groups": {"n_features": 3, "headdim": 4, "n_groups": 3},
    "groups_language": {
        "language": True,
        "length": 19,
        "headdim": 3,
        "n_groups": 2,
        "d_state": 3,
        "norm_per_group": False,
    },
    "mamba_normed": {"mixer": "mamba", "n_features": 3, "d_state": 2, "BCdt_norm": True, "dt_rank": 3},
    "mamba_language": {"mixer": "mamba", "language": True, "length": 19, "bias": True, "conv_bias": False},
    "language": {"language": True, "length": 21},
    "language_odd": {
        "language": True,
        "length": 17,
        "bias": True,
        "conv_bias": False,
        "D_has_hdim": True,
        "activation": "gelu",
        "gate_activation": "relu",
        "dt_limit_low": 0.01,
        "dt_limit_high": 0.3,
    },
}


def random_model(name: str, seed: int = 0) -> tuple[FloatModel, torch.Tensor, IntArray]:
    """A model whose norms, skips and biases are not all one or zero; real inputs; the same as integers."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    form = dict(FORMS[name])
    length, language = form.pop("length", 8), form.pop("language", False)
    config = MambaConfig(**(SMALL | form))
    model = (MambaForCausalLM if language else MambaForSequenceClassification)(config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" in key or key.endswith(".D"):
                # Some negative: a maximum of them is no maximum of what they weigh.
                parameter.mul_((torch.rand_like(parameter) + 0.5) * (torch.rand_like(parameter) - 0.2).sign())
            elif key.endswith("bias"):
                parameter.add_(0.1 * torch.randn_like(parameter))
    if config.n_features:
        integers = torch.randint(FORMAT.low, FORMAT.high + 1, (24, length, config.n_features))
        return model, integers * 2.0**-FORMAT.frac, integers.numpy()
    tokens = torch.randint(0, config.vocab_size, (24, length))
    return model, tokens, tokens.numpy()


def converted(
    name: str, config: ConversionConfig | None = None
) -> tuple[Conversion, FloatModel, Any, IntArray]:
    model, reals, integers = random_model(name)
    form = FORMAT if model.config.n_features else None
    return convert(model, reals, form, config), model, reals, integers


def noise(conversion: Conversion, model: FloatModel, reals: torch.Tensor, integers: IntArray) -> float:
    """Mean square error of the logits over their variance."""
    with torch.no_grad():
        exact = model(reals).logits.double().numpy()
    frac = conversion.graph.by_name[conversion.graph.output].frac
    found = evaluate(conversion.graph, integers) * 2.0**-frac
    return float(np.square(found - exact).mean() / exact.var())


@pytest.mark.parametrize("name", FORMS)
def test_the_traced_forward_is_the_models_own(name: str) -> None:
    model, reals, _ = random_model(name)
    with torch.no_grad():
        logits = trace(model, reals, lambda key, value: None)
        torch.testing.assert_close(logits, model(reals).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "config"), [*((name, ConversionConfig()) for name in FORMS), ("last", PROVABLE)]
)
def test_backends_compute_the_same_integers_of_a_converted_model(name: str, config: ConversionConfig) -> None:
    conversion, *_, integers = converted(name, config)
    graph = conversion.graph
    runner = OnnxRunner(graph)

    def onnx_trace(batch: IntArray) -> dict[str, IntArray]:
        tensors: dict[str, IntArray] = {}
        runner(batch, tensors)
        return tensors

    equality = compare(graph, integers, {"torch": torch_tracer(graph), "onnx": onnx_trace})
    assert equality.equal, equality.first


@pytest.mark.parametrize("name", FORMS)
def test_a_converted_model_is_near_the_float_one(name: str) -> None:
    conversion, model, reals, integers = converted(name)
    assert conversion.graph.max_bits <= 29
    # Means over random steps hardly differ, so there is little to be near to.
    assert noise(conversion, model, reals, integers) < (0.03 if name == "mean_of_chunks" else 0.01)


@pytest.mark.parametrize("scales", ["minmax", "percentile", "mse"])
def test_every_way_to_find_scales_serves(scales: Any) -> None:
    conversion = converted("last", ConversionConfig(scales=scales))
    assert noise(*conversion) < 0.01


def test_the_provable_bits_hold_24_and_still_follow_the_model() -> None:
    conversion = converted("last", PROVABLE)
    assert conversion[0].graph.max_bits <= 24
    assert noise(*conversion) < 0.1


def test_the_circuit_accepts_a_converted_models_witness_and_no_other_class() -> None:
    tiny = {"n_features": 1, "d_model": 4, "headdim": 4, "d_state": 2, "n_layer": 1, "num_labels": 2}
    torch.manual_seed(0)
    model = MambaForSequenceClassification(MambaConfig(**(SMALL | tiny)))
    integers = torch.randint(FORMAT.low, FORMAT.high + 1, (8, 3, 1))
    config = dataclasses.replace(PROVABLE, pieces=4, decay_index_bits=4)
    graph = convert(model, integers * 2.0**-FORMAT.frac, FORMAT, config).graph
    lowered = build_circuit(graph)
    truth: dict[str, IntArray] = {}
    evaluate(graph, integers[:1].numpy(), truth)
    tensors: dict[str, Any] = {}
    honest = lowered.witness(integers[0].numpy(), trace=tensors)
    for key, value in tensors.items():
        np.testing.assert_array_equal(value, truth[key][0], err_msg=key)
    lie = lowered.witness(integers[0].numpy())
    lie.public["logits"] = lie.public["logits"][::-1]
    assert lie.public["logits"] != honest.public["logits"]
    assert mock(lowered.circuit, [honest, lie]) == [True, False]


def test_more_bits_are_nearer() -> None:
    coarse = noise(*converted("last", ConversionConfig(activation_bits=5, weight_bits=5)))
    fine = noise(*converted("last", ConversionConfig(activation_bits=10, weight_bits=10)))
    assert fine < coarse / 20


def test_extreme_inputs_stay_within_the_proven_intervals() -> None:
    conversion, *_ = converted("mean_of_chunks")
    graph = conversion.graph
    shape = graph.types["input"].shape
    extremes = np.stack([np.full(shape, FORMAT.low), np.full(shape, FORMAT.high)])
    trace_: dict[str, IntArray] = {}
    evaluate(graph, extremes.astype(np.int64), trace_)
    for name, tensor in graph.types.items():
        assert tensor.low <= trace_[name].min() and trace_[name].max() <= tensor.high, name


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"mixer": "complex_mamba"}, "mixer 'complex_mamba'"),
    ],
)
def test_a_form_without_integers_is_named(change: dict[str, Any], cause: str) -> None:
    model = MambaForSequenceClassification(MambaConfig(**(SMALL | {"n_features": 3} | change)))
    with pytest.raises(MambaintError, match=cause):
        convert(model, torch.rand(2, 8, 3), FORMAT)


def test_calibration_data_that_does_not_fit_is_named() -> None:
    model, _, _ = random_model("last")
    for inputs, cause in (
        (torch.rand(2, 8, 4), "shape"),
        (torch.rand(0, 8, 3), "no calibration data"),
        (torch.full((2, 8, 3), torch.nan), "not finite"),
    ):
        with pytest.raises(MambaintError, match=cause):
            convert(model, inputs, FORMAT)
    language, _, _ = random_model("language")
    for tokens, cause in (
        (torch.full((2, 8), 13), "outside the vocabulary"),
        (torch.rand(2, 8), "token ids"),
    ):
        with pytest.raises(MambaintError, match=cause):
            convert(language, tokens)
    with pytest.raises(MambaintError, match="input_format"):
        convert(language, torch.zeros(2, 8, dtype=torch.long), FORMAT)


def test_weights_that_are_not_finite_are_named() -> None:
    model, reals, _ = random_model("last")
    with torch.no_grad():
        model.backbone.layers[1].mixer.D[0] = torch.inf
    with pytest.raises(MambaintError, match=r"layers\.1\.mixer\.D"):
        convert(model, reals, FORMAT)


def test_a_budget_too_small_names_the_node() -> None:
    with pytest.raises(MambaintError, match="bits"):
        converted("last", ConversionConfig(max_bits=16))
