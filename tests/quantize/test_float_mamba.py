"""Float Mamba and Mamba-2 to integers: the same integers in every backend, and close to the float model."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import numpy as np
import pytest
import torch

from circuits.lowering import build_circuit
from circuits.runtime.runner import OnnxRunner
from mamba_int.errors import MambaintError
from mamba_int.float_models.config import MambaConfig
from mamba_int.float_models.mixer import build_mixer
from mamba_int.float_models.models import (
    MambaForCausalLM,
    MambaForFeatureExtraction,
    MambaForSequenceClassification,
)
from mamba_int.graph import IntArray
from mamba_int.interpreter import evaluate
from quantize.calibration import Convertible, calibrate, input_features, trace
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
    "quaternion": {"mixer": "quaternion", "n_features": 3, "n_groups": 2, "bias": True, "pooling": "max"},
    "quaternion_selective": {"mixer": "quaternion", "n_features": 3, "selective_axis": True},
    "quaternion_lite": {"mixer": "quaternion_lite", "language": True, "n_groups": 3, "d_state": 3},
    "quaternion_full_lite": {"mixer": "quaternion_full_lite", "n_features": 3, "d_state": 1, "norm": "none"}
    | {"final_norm": "layer", "pooling": "max"},
    "quaternion_source": {"mixer": "quaternion_full", "language": True, "d_state": 2, "norm": "none"}
    | {"final_norm": "layer"},
    "quaternion_features": {"mixer": "quaternion", "n_features": 3, "features": True, "final_norm": "layer"},
    "features": {"n_features": 3, "features": True, "length": 17},
    "mixer_alone": {"mixer_alone": True, "length": 17},
    "mamba_mixer_alone": {"mixer_alone": True, "mixer": "mamba", "length": 9},
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


def random_model(name: str, seed: int = 0) -> tuple[Convertible, torch.Tensor, IntArray]:
    """A model whose norms, skips and biases are not all one or zero; real inputs; the same as integers."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    form = dict(FORMS[name])
    length, language, features, alone = (
        form.pop(key, None) for key in ("length", "language", "features", "mixer_alone")
    )
    length = length or 8
    config = MambaConfig(**(SMALL | form))
    kind = MambaForCausalLM if language else MambaForSequenceClassification
    whole = (MambaForFeatureExtraction if features else kind)(config).eval()
    model = build_mixer(config).eval() if alone else whole
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" in key or key.endswith(".D"):
                # Some negative: a maximum of them is no maximum of what they weigh.
                parameter.mul_((torch.rand_like(parameter) + 0.5) * (torch.rand_like(parameter) - 0.2).sign())
            if key.endswith(("bias", "beta")):
                parameter.add_(0.1 * torch.randn_like(parameter))
    if input_features(model):
        integers = torch.randint(FORMAT.low, FORMAT.high + 1, (24, length, input_features(model)))
        return model, integers * 2.0**-FORMAT.frac, integers.numpy()
    tokens = torch.randint(0, config.vocab_size, (24, length))
    return model, tokens, tokens.numpy()


def converted(
    name: str, config: ConversionConfig | None = None
) -> tuple[Conversion, Convertible, Any, IntArray]:
    model, reals, integers = random_model(name)
    form = FORMAT if input_features(model) else None
    return convert(model, reals, form, config), model, reals, integers


def output(model: Convertible, inputs: torch.Tensor) -> torch.Tensor:
    """What the integer graph of a model gives too."""
    with torch.no_grad():
        found = model(inputs)
    if isinstance(found, torch.Tensor):
        return found
    result: torch.Tensor = found.hidden if isinstance(model, MambaForFeatureExtraction) else found.logits
    return result


def noise(conversion: Conversion, model: Convertible, reals: torch.Tensor, integers: IntArray) -> float:
    """Mean square error of the output over its variance."""
    exact = output(model, reals).double().numpy()
    frac = conversion.graph.by_name[conversion.graph.output].frac
    found = evaluate(conversion.graph, integers) * 2.0**-frac
    return float(np.square(found - exact).mean() / exact.var())


@pytest.mark.parametrize("name", FORMS)
def test_the_traced_forward_is_the_models_own(name: str) -> None:
    model, reals, _ = random_model(name)
    with torch.no_grad():
        found = trace(model, reals, lambda key, value: None)
    torch.testing.assert_close(found, output(model, reals), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        *((name, ConversionConfig()) for name in FORMS),
        *((name, PROVABLE) for name in ("last", "mamba_last", "quaternion_selective")),
    ],
)
def test_backends_compute_the_same_integers_of_a_converted_model(name: str, config: ConversionConfig) -> None:
    conversion, *_, integers = converted(name, config)
    graph = conversion.graph
    equality = compare(graph, integers, {"torch": torch_tracer(graph), "onnx": OnnxRunner(graph)})
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


@pytest.mark.parametrize(
    ("change", "bits"),
    [
        ({}, {"pieces": 0, "index_bits": 4, "decay_index_bits": 4}),
        ({"n_groups": 2, "d_state": 1, "headdim": 2, "pooling": "max"}, {}),
        ({"mixer": "mamba", "d_state": 1, "BCdt_norm": True}, {}),
        ({"mixer": "quaternion", "pooling": "max"}, {}),
        ({"mixer": "quaternion", "selective_axis": True, "d_state": 1}, {}),
        ({"mixer": "quaternion_full_lite", "d_state": 1, "norm": "none", "final_norm": "layer"}, {}),
    ],
)
def test_the_circuit_accepts_a_converted_models_witness_and_no_other_class(
    change: dict[str, Any], bits: dict[str, Any]
) -> None:
    tiny = {"n_features": 1, "d_model": 4, "headdim": 4, "d_state": 2, "n_layer": 1, "num_labels": 2}
    torch.manual_seed(0)
    model = MambaForSequenceClassification(MambaConfig(**(SMALL | tiny | change)))
    integers = torch.randint(FORMAT.low, FORMAT.high + 1, (8, 3, 1))
    config = dataclasses.replace(PROVABLE, **bits)
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


def test_a_checkpoint_beyond_int32_names_its_layer_and_what_to_lower() -> None:
    model, tokens, _ = random_model("language_odd")
    with torch.no_grad():
        model.backbone.layers[1].mixer.in_proj.bias[0] = 1e7
    with pytest.raises(MambaintError) as raised:
        convert(model, tokens)
    assert raised.value.cause.startswith("'layer1.in_proj' (linear) of layer 1 can reach ")
    assert raised.value.cause.endswith("beyond 29")
    assert raised.value.remedy == "lower weight_bits or activation_bits"


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
        ({"mixer": "complex_mamba"}, "the mixer 'complex_mamba' has no integer form"),
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


@pytest.mark.parametrize(
    ("name", "changes", "cause", "remedy"),
    [
        (
            "last",
            {"max_bits": 16},
            "'layer0.x_conv' .conv. of layer 0 .* beyond 16",
            "internal_bits",
        ),
        ("last", {"max_bits": 20}, "'layer0.ssd' .ssd. of layer 0", "or raise M_bits or max_bits"),
        ("mamba_last", {"max_bits": 24, "A_bits": 23}, "'layer0.state0.ssd'", "A_bits"),
    ],
)
def test_a_budget_too_small_names_the_node_its_layer_and_what_to_lower(
    name: str, changes: dict[str, Any], cause: str, remedy: str
) -> None:
    with pytest.raises(MambaintError) as raised:
        converted(name, ConversionConfig(**changes))
    assert re.search(cause, raised.value.cause) and remedy in raised.value.remedy
    assert "\n" not in str(raised.value)


def test_progress_covers_the_calibration_and_every_layer_and_ends_at_the_whole() -> None:
    model, reals, _ = random_model("language")
    seen: list[tuple[int, int]] = []
    convert(model, reals, progress=lambda done, whole: seen.append((done, whole)))
    done = [step for step, _ in seen]
    assert {whole for _, whole in seen} == {len(reals) + model.config.n_layer + 2}
    assert done[-1] == seen[0][1] and done == sorted(set(done))
    assert set(range(len(reals), done[-1] + 1)) <= set(done)


def test_calibration_runs_few_steps_at_a_time_and_sees_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """The logits of many long texts over a large vocabulary do not fit the memory."""
    model, reals, _ = random_model("language")
    whole = calibrate(model, reals)
    monkeypatch.setattr("quantize.calibration.BATCH_STEPS", 3 * reals.shape[1] + 1)
    seen: list[int] = []
    parts = calibrate(model, reals, lambda done, total: seen.append(done))
    assert seen == [*range(3, len(reals) + 1, 3)]
    assert whole.keys() == parts.keys()
    for name, value in whole.items():
        assert parts[name].low == pytest.approx(value.low, abs=1e-5)
        assert parts[name].high == pytest.approx(value.high, abs=1e-5)
