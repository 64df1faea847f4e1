"""Quaternion Mamba-2 as a float model: sizes, forms, cache, and what the axis decides."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from triton import knobs

from mamba_int.datasets import load_data
from mamba_int.errors import MambaintError
from mamba_int.experiment import resolve
from mamba_int.float_models.config import MambaConfig
from mamba_int.float_models.mixer import build_mixer
from mamba_int.float_models.models import MambaForCausalLM, MambaForSequenceClassification
from mamba_int.float_models.quaternion_mamba2 import QUATERNION_PRESETS, QuaternionMamba2

TINY = MambaConfig(
    mixer="quaternion",
    vocab_size=21,
    d_model=8,
    n_layer=2,
    d_state=4,
    n_groups=2,
    dt_min=0.05,
    dt_max=0.5,
    dropout=0.0,
    tie_embeddings=False,
)
FORMS: list[dict[str, Any]] = [
    {},
    {"selective_axis": True},
    {"mixer": "quaternion_lite"},
    {"mixer": "quaternion_full", "norm": "none", "final_norm": "layer"},
    {"mixer": "quaternion_full_lite"},
]


@pytest.fixture(autouse=True, scope="module")
def without_kernels() -> Any:
    """The interpreter would run Triton's kernels on these tensors; one test here asks for that."""
    with knobs.runtime.scope():
        knobs.runtime.interpret = False
        yield


def language_model(**changes: Any) -> QuaternionMamba2:
    torch.manual_seed(0)
    model = QuaternionMamba2(replace(TINY, **changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("embeddings.weight"):
                parameter.mul_(20)
            elif name.endswith(("conv1d.bias", "norm.weight", "D", "beta", "gamma")):
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(TINY.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def difference(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return (a - b).abs().max().item()


def test_a_preset_is_larger_than_it_is_called() -> None:
    found = {}
    for name in QUATERNION_PRESETS:
        with torch.device("meta"):
            found[name] = sum(p.numel() for p in QuaternionMamba2.from_preset(name).parameters())
    assert found == {"small": 46_513_152, "base": 142_982_400, "large": 333_926_400}


def test_the_preset_of_bytes_is_small_or_has_another_budget_than_that_of_mamba2() -> None:
    experiment = resolve("char-quaternion")
    config = experiment.model_config(load_data(experiment.source))
    assert isinstance(config, MambaConfig) and config.mixer == "quaternion"
    with torch.device("meta"):
        assert 1_500_000 <= sum(p.numel() for p in QuaternionMamba2(config).parameters()) <= 1_700_000
    assert experiment.training == resolve("char-mamba2").training


@pytest.mark.parametrize("form", FORMS)
def test_a_parameter_of_a_form_does_not_learn(form: dict[str, Any]) -> None:
    model = language_model(**form)
    model(tokens(2, 9), labels=tokens(2, 9))["loss"].backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    listed = [p for role in model.parameter_roles().values() for p in role]
    assert sorted(map(id, listed)) == sorted(map(id, model.parameters()))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("way", ["sequential", "associative"])
def test_the_way_of_scanning_changes_a_form(form: dict[str, Any], way: str) -> None:
    ids = tokens(2, 17)
    one, other = language_model(**form)(ids), language_model(scan_type=way, **form)(ids)
    assert difference(one["logits"], other["logits"]) < 1e-5


@pytest.mark.parametrize("form", FORMS)
def test_pieces_of_a_sequence_differ_from_the_whole(form: dict[str, Any]) -> None:
    model, ids = language_model(**form), tokens(2, 11)
    cache = model.new_cache(2)
    with torch.no_grad():
        pieces = [model(ids[:, a:b], cache=cache).logits for a, b in ((0, 4), (4, 5), (5, 11))]
        assert difference(torch.cat(pieces, 1), model(ids).logits) < 1e-5


@pytest.mark.parametrize("form", FORMS)
def test_padding_changes_a_class(form: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = MambaForSequenceClassification(replace(TINY, n_features=3, num_labels=5, **form)).eval()
    alone = [torch.randn(1, length, 3) for length in (3, 6, 9)]
    expected = torch.cat([model(x).logits for x in alone])
    for side in ("left", "right"):
        inputs, mask = torch.randn(3, 9, 3), torch.zeros(3, 9, dtype=torch.int64)
        for row, own in enumerate(alone):
            place = slice(9 - own.shape[1], 9) if side == "left" else slice(0, own.shape[1])
            inputs[row, place], mask[row, place] = own[0], 1
        assert difference(model(inputs, mask)["logits"], expected) < 1e-5, side


@pytest.mark.parametrize("form", [FORMS[0], FORMS[1], FORMS[3]])
def test_kernels_compute_another_model(form: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knobs.runtime, "interpret", True)
    model, exact = language_model(n_layer=1, **form), language_model(n_layer=1, **form).double()
    ids = tokens(1, 19)
    model(ids, labels=ids).loss.backward()
    exact(ids, labels=ids).loss.backward()
    for (name, p), q in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None
        assert difference(p.grad.double(), q.grad) <= 3e-5 * float(q.grad.abs().max()), name


def test_generation_departs_from_whole_sequences() -> None:
    model = language_model(selective_axis=True)
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11]]
    found = model.generate(prompts, 5).tokens
    for prompt, new in zip(prompts, found, strict=True):
        sequence = list(prompt)
        for token in new:
            with torch.no_grad():
                assert int(model(torch.tensor([sequence])).logits[0, -1].argmax()) == token
            sequence.append(token)


def test_states_grow_over_many_steps() -> None:
    """|q| < 1 whatever the input, so the state of 10,000 steps is no larger than that of 1,000."""
    torch.manual_seed(0)
    mixer = build_mixer(replace(TINY, selective_axis=True, d_model=4, d_state=2, n_groups=1)).eval()
    state = mixer.new_state(1, torch.device("cpu"), torch.float32)
    norms = []
    with torch.no_grad():
        x = torch.randn(1, 500, 4) * 3
        for _ in range(20):
            mixer(x, state=state)
            norms.append(float(state["ssm_state"].norm()))
    assert max(norms) < 1.5 * max(norms[:2])


def test_a_fixed_axis_tells_the_order_of_rotations_or_a_selective_one_does_not() -> None:
    """Swapping two steps of a product of q: equal for one axis, another for two."""
    for selective in (False, True):
        torch.manual_seed(0)
        mixer = build_mixer(replace(TINY, selective_axis=selective, d_conv=1))
        with torch.no_grad():
            # only what was there at the start is left to turn
            mixer.get_parameter("B_proj.weight").zero_()
        x, ends = torch.randn(1, 2, 8), []
        for order in ([0, 1], [1, 0]):
            state = mixer.new_state(1, torch.device("cpu"), torch.float32)
            state["ssm_state"].fill_(1.0)
            mixer(x[:, order], state=state)
            ends.append(state["ssm_state"])
        assert (difference(*ends) > 1e-3) == selective


def test_files_of_a_model_are_read_as_another(tmp_path: Path) -> None:
    model = language_model()
    model.save_pretrained(tmp_path)
    for kind in (QuaternionMamba2, MambaForCausalLM):
        assert (
            difference(kind.from_pretrained(tmp_path)(tokens(1, 5)).logits, model(tokens(1, 5)).logits) == 0
        )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: QuaternionMamba2(replace(TINY, mixer="mamba")), "choose quaternion"),
        (lambda: QuaternionMamba2.from_preset("huge"), "choose small, base, large"),
        (lambda: replace(TINY, mixer="mamba", norm="none"), "only quaternion mixers"),
        (lambda: replace(TINY, n_groups=3), "choose n_groups that divides it"),
        (lambda: replace(TINY, mixer="quaternion_lite", selective_axis=True), "set it to false"),
    ],
)
def test_settings_that_do_not_fit_are_taken(call: Any, message: str) -> None:
    with pytest.raises(MambaintError, match=message):
        call()


def test_an_output_has_other_keys_than_names() -> None:
    outputs = language_model()(tokens(1, 4), labels=tokens(1, 4))
    assert outputs["loss"] is outputs.loss and outputs["logits"] is outputs.logits
    with pytest.raises(KeyError, match="there are logits, loss"):
        outputs["past"]


def gradients(model: QuaternionMamba2) -> Tensor:
    """All of them, in float64 on the CPU."""
    return torch.cat([p.grad.flatten().cpu().double() for p in model.parameters() if p.grad is not None])


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
def test_a_training_step_on_a_gpu_differs_or_cannot_be_captured(form: dict[str, Any]) -> None:
    changes = {"vocab_size": 500, "d_model": 64, "d_state": 16} | form
    model, exact = QuaternionMamba2(replace(TINY, **changes)), QuaternionMamba2(replace(TINY, **changes))
    exact.load_state_dict(model.state_dict())
    exact.double()
    ids = torch.randint(500, (2, 150))
    exact_loss = exact(ids, labels=ids)["loss"]
    exact_loss.backward()
    # What bfloat16 itself does: 0.2 of the gradients where the source's norm divides by small deviations.
    rounded = QuaternionMamba2(replace(TINY, **changes))
    rounded.load_state_dict(model.state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        rounded(ids, labels=ids)["loss"].backward()
    model.cuda()
    static = ids.cuda()

    def step() -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            loss: Tensor = model(static, labels=static)["loss"]
        loss.backward()
        return loss.detach()

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    model.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    graph.replay()
    assert float(loss) == pytest.approx(float(exact_loss.detach()), rel=1e-2)
    wanted = gradients(exact)
    unavoidable = (gradients(rounded) - wanted).norm()
    assert float((gradients(model) - wanted).norm()) < 1.5 * float(unavoidable) + 0.02 * float(wanted.norm())
