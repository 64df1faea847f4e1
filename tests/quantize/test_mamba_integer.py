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

from circuits.lowering import build_circuit
from circuits.runtime.runner import OnnxRunner
from mamba_int.errors import MambaintError
from mamba_int.float_models.bit_shift_norm import BitShiftNorm
from mamba_int.float_models.models import MambaForCausalLM
from mamba_int.graph import IntArray
from mamba_int.interpreter import evaluate
from quantize.bit_shift_norm import bit_shift_norm, record_bit_shift_norm
from quantize.calibration import trace
from quantize.equality import compare, torch_tracer
from quantize.finetuning import finetune
from quantize.float_mamba import PROVABLE, Conversion, ConversionConfig, convert
from quantize.importers import load_float_model
from quantize.observations import Observed
from quantize.pieces import Pieces
from quantize.scales import rounded
from tests.mamba_int.test_mamba_integer import TINY
from tests.quantize.importers.test_mamba_integer import tensors_of
from zk.prove import mock

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
    config = dataclasses.replace(TINY, mixer=version, d_model=16, headdim=8, **changes)
    model = MambaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("norm.weight", "norm_f.weight", "step_size")):
                parameter.mul_(torch.rand_like(parameter) + 0.5)
            elif name.endswith("base_decay_nums"):
                parameter.copy_(torch.rand_like(parameter) * 33000 - 500)
            elif name.endswith("A_log"):
                parameter.copy_(-1.5 * torch.rand_like(parameter) - 0.1)
        # Every block adds as much as the stream has: else the embedding alone would be the model.
        for i, layer in enumerate(model.backbone.layers):
            found: dict[str, Tensor] = {}
            trace(model, tokens(), found.setdefault)
            layer.mixer.res_gate.mul_(found["residual"].std() / found[f"layer{i}.out"].std())
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
    equality = compare(graph, ids.numpy(), {"torch": torch_tracer(graph), "onnx": OnnxRunner(graph)})
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
    assert found < 0.03
    assert conversion.graph.max_bits <= (24 if provable else 29)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_file_is_converted_to_another_model_than_it_holds(version: str, tmp_path: Path) -> None:
    model, ids = model_of(version, n_layer=1), tokens(17)
    torch.save({"step": 1, "model_state_dict": tensors_of(model), "loss": 1.0}, tmp_path / "step_1.pt")
    imported, _ = load_float_model(tmp_path / "step_1.pt")
    assert isinstance(imported, MambaForCausalLM)
    conversion = convert(imported, ids)
    assert noise(conversion, imported, ids) < 0.03
    # Every ternary matrix is there as it is, and nothing else is multiplied with it.
    signs = [node.constants["weight"] for node in conversion.graph.nodes if node.name.endswith("_signs")]
    assert len(signs) == (5 if version == "mamba_integer_v1" else 4)
    for weight in signs:
        assert set(np.unique(weight)) == {-1, 0, 1}


def test_a_wide_budget_does_not_keep_the_decays_of_fifteen_bits() -> None:
    model, ids = model_of("mamba_integer_v1", n_layer=1), tokens(5)
    conversion = convert(model, ids, config=ConversionConfig(decay_bits=15, A_bits=15, max_bits=31))
    numbers: dict[str, IntArray] = {}
    evaluate(conversion.graph, ids.numpy(), numbers)
    found: dict[str, Tensor] = {}
    with torch.no_grad():
        trace(model, ids, found.setdefault)
        decay = model.backbone.layers[0].mixer.decay(found["layer0.step_index"]).numpy() * 2**15
    assert decay.min() == 0 and decay.max() == 32000
    for n in range(model.config.d_state):
        # A clamp that no decay reaches is optimized away; m itself has an error of its eight-bit operands.
        state = f"layer0.state{n}.decay"
        number = numbers[state] if state in numbers else numbers[f"{state}_rounded"]
        assert np.abs(number - decay[..., n]).max() <= 2


@pytest.mark.parametrize("scale", [1e-3, 0.02, 0.3, 7.0, 3000.0])
def test_a_norm_takes_another_power_of_two_or_none_beyond_its_range(scale: float) -> None:
    torch.manual_seed(0)
    norm = BitShiftNorm(24, -3, 8, True)
    x = scale * (torch.randn(64, 24) * torch.logspace(-1, 1, 64)[:, None] + 0.3)
    seen: dict[str, Tensor] = {"residual": x}
    with torch.no_grad():
        expected = record_bit_shift_norm(seen.setdefault, "norm", x, norm)
    observations = {
        name: Observed(float(v.min()), float(v.max()), v.abs().amax(0).double().numpy(), [v.double().numpy()])
        for name, v in seen.items()
    }
    config = ConversionConfig(seq_len=64, residual_bits=16, scales="minmax")
    p = Pieces(observations, config, True)
    limit = config.residual_limit
    source = p.graph.add("input", "input", frac=p.residual_frac + 1, low=-limit, high=limit, features=24)
    out = bit_shift_norm(p, "norm", source, norm)
    integers = rounded(x.double().numpy(), p.residual_frac + 1)
    values: dict[str, IntArray] = {}
    evaluate(p.graph.finish(out, {}), integers[None], values)
    error = np.abs(values[out][0] * 2.0 ** -p.graph.frac[out] - expected.double().numpy()).max(1)
    # Rows whose variance is at a power of four may fall on either side.
    unit = 2.0 ** -p.graph.frac[out]
    assert np.median(error) < unit and (error > 2 * unit).sum() <= 2


@pytest.mark.parametrize("change", [{"norm": "rms"}, {"mixer": "mamba"}])
def test_a_norm_that_the_block_does_not_have_is_converted(change: dict[str, Any]) -> None:
    config = dataclasses.replace(TINY, **change)
    with pytest.raises(MambaintError, match="norm = "):
        convert(MambaForCausalLM(config), tokens(5))


def test_a_scale_without_bits_is_rounded_away() -> None:
    model, ids = model_of("mamba_integer_v2", n_layer=1), tokens(5)
    with pytest.raises(MambaintError, match="bits left for its scale"):
        convert(model, ids, config=dataclasses.replace(PROVABLE, max_bits=16))


@pytest.mark.parametrize("version", VERSIONS)
def test_the_circuit_refuses_the_truth_or_accepts_another_token(version: str) -> None:
    torch.manual_seed(0)
    tiny = {"d_model": 4, "d_state": 2, "n_layer": 1, "dt_rank": 2, "headdim": 4, "vocab_size": 5}
    model = MambaForCausalLM(dataclasses.replace(TINY, mixer=version, **tiny))
    ids = torch.randint(5, (8, 2))
    config = dataclasses.replace(PROVABLE, pieces=4, decay_index_bits=4)
    graph = convert(model, ids, config=config).graph
    lowered = build_circuit(graph)
    truth: dict[str, IntArray] = {}
    evaluate(graph, ids[:1].numpy(), truth)
    tensors: dict[str, Any] = {}
    honest = lowered.witness(ids[0].numpy(), trace=tensors)
    for key, value in tensors.items():
        np.testing.assert_array_equal(value, truth[key][0], err_msg=key)
    lie = lowered.witness(ids[0].numpy())
    lie.public["logits"] = lie.public["logits"][::-1]
    assert lie.public["logits"] != honest.public["logits"]
    assert mock(lowered.circuit, [honest, lie]) == [True, False]


def test_ternary_matrices_are_not_made_ternary_again() -> None:
    with pytest.raises(MambaintError, match="are ternary already"):
        finetune(model_of(VERSIONS[0]), lambda step: (tokens(), tokens()))
