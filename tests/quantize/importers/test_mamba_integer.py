"""Checkpoints of Mamba-Integer in all their forms, and the same damaged."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from triton import knobs

from mamba_int.errors import MambaintError
from mamba_int.float_models.models import MambaForCausalLM
from quantize.importers import load_float_model
from tests.mamba_int.test_mamba_integer import TINY

VERSIONS = ("mamba_integer_v1", "mamba_integer_v2")
NORM_SHIFTS = {"mamba_integer_v1": (-3, 8), "mamba_integer_v2": (-2, 6)}


@pytest.fixture(autouse=True, scope="module")
def without_kernels() -> Any:
    """The interpreter would run Triton's kernels on these tensors."""
    with knobs.runtime.scope():
        knobs.runtime.interpret = False
        yield


def model_of(version: str) -> MambaForCausalLM:
    torch.manual_seed(0)
    least, most = NORM_SHIFTS[version]
    config = dataclasses.replace(TINY, mixer=version, norm_min_shift=least, norm_max_shift=most)
    model = MambaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("norm.weight", "norm_f.weight", "step_size")):
                parameter.mul_(torch.rand_like(parameter) + 0.5)
    return model


def tensors_of(model: MambaForCausalLM) -> dict[str, Tensor]:
    """As the program names them."""
    c = model.config
    names = {
        "backbone.embeddings.weight": "embedding.weight",
        "lm_head.weight": "lm_head.weight",
        "backbone.norm_f.weight": "norm_f.gamma",
        "backbone.norm_f.step_size": "norm_f.step_size",
    }
    for i in range(c.n_layer):
        names[f"backbone.layers.{i}.norm.weight"] = f"layers.{i}.norm.gamma"
        names[f"backbone.layers.{i}.norm.step_size"] = f"layers.{i}.norm.step_size"
        for part in ("in_proj.weight", "conv1d.weight", "conv1d.bias", "x_proj.weight", "dt_proj.weight"):
            names[f"backbone.layers.{i}.mixer.{part}"] = f"layers.{i}.{part}"
        for part in ("out_proj.weight", "base_decay_nums", "A_log", "res_gate"):
            names[f"backbone.layers.{i}.mixer.{part}"] = f"layers.{i}.{part}"
    tensors = {names[name]: p.detach().clone() for name, p in model.named_parameters()}
    if c.mixer == "mamba_integer_v1":
        for i in range(c.n_layer):
            tensors[f"layers.{i}.decay_shifts"] = torch.full((c.d_inner, c.d_state), 15.0)
    return tensors


def as_training(model: MambaForCausalLM, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """A file of a step, after one step of the program's optimizer and schedule."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, 10, anneal_strategy="cos")
    return {
        "step": 500,
        "model_state_dict": tensors,
        "optimizer_state_dict": optimizer.state_dict(),
        "scheduler_state_dict": schedule.state_dict(),
        "loss": 3.1,
    }


def logits(model: Any) -> Tensor:
    ids = torch.arange(18).reshape(2, 9)
    with torch.no_grad():
        found: Tensor = model(ids).logits
    return found


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("form", ["bare", "training", "compiled", "safetensors", "half"])
def test_a_form_of_file_is_read_as_another_model(version: str, form: str, tmp_path: Path) -> None:
    model = model_of(version)
    tensors = tensors_of(model)
    path = tmp_path / "step_500.pt"
    if form == "safetensors":
        path = tmp_path / "step_500.safetensors"
        save_file(tensors, path)
    elif form == "training":
        torch.save(as_training(model, tensors), path)
    elif form == "compiled":
        wrapped = {f"_orig_mod.{name}": value for name, value in tensors.items()}
        torch.save(as_training(model, wrapped), path)
    elif form == "half":
        model = model.to(torch.bfloat16).float()
        halves = {name: value.to(torch.bfloat16) for name, value in tensors.items()}
        if version == "mamba_integer_v1":
            halves |= {name: tensors[name].to(torch.int32) for name in tensors if "shifts" in name}
        torch.save(halves, path)
    else:
        torch.save(tensors, path)
    found, description = load_float_model(path)
    assert isinstance(found, MambaForCausalLM)
    assert description.format == "mamba-integer"
    # What the version does not have, its files do not tell.
    foreign = {"headdim": TINY.headdim} if version == "mamba_integer_v1" else {"dt_rank": TINY.dt_rank}
    assert dataclasses.replace(found.config, **foreign) == model.config
    assert torch.equal(logits(found), logits(model))
    assert "diverge" in " ".join(description.notes)
    assert "older" not in " ".join(description.notes)


def test_an_older_file_is_refused_or_taken_for_a_newer_one(tmp_path: Path) -> None:
    model = model_of("mamba_integer_v1")
    tensors = {name: value for name, value in tensors_of(model).items() if "step_size" not in name}
    tensors |= {f"layers.{i}.norm.last_k": torch.tensor(float("inf")) for i in range(2)}
    tensors |= {"norm_f.last_k": torch.tensor(1)} | {
        f"layers.{i}.last_act_max": torch.ones(1) for i in range(2)
    }
    torch.save(tensors, tmp_path / "a.pt")
    found, description = load_float_model(tmp_path / "a.pt")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("step_size"):
                parameter.fill_(1)
    assert torch.equal(logits(found), logits(model))
    assert "an older file" in " ".join(description.notes) and "no step_size: 1" in description.notes


@pytest.mark.parametrize("version", VERSIONS)
def test_no_key_can_be_missing(version: str, tmp_path: Path) -> None:
    tensors = tensors_of(model_of(version))
    for name in tensors:
        if name == "layers.0.base_decay_nums":
            # Without it, it is no V1 at all.
            continue
        kept = {key: value for key, value in tensors.items() if key != name}
        torch.save(kept, tmp_path / "a.pt")
        with pytest.raises(MambaintError, match=name.replace(".", r"\.")):
            load_float_model(tmp_path / "a.pt", "mamba-integer")


@pytest.mark.parametrize(
    ("version", "change", "part"),
    [
        ("mamba_integer_v1", {"layers.1.decay_shifts": torch.full((24, 3), 14.0)}, "shifts other than 15"),
        ("mamba_integer_v1", {"layers.1.decay_shifts": torch.full((24, 4), 15.0)}, "decay_shifts"),
        ("mamba_integer_v1", {"layers.1.base_decay_nums": torch.ones(24, 4)}, "layers.1.base_decay_nums"),
        ("mamba_integer_v1", {"layers.0.A_log": torch.ones(3)}, "unknown layers.0.A_log"),
        ("mamba_integer_v1", {"layers.0.in_proj.weight": torch.ones(24, 12)}, "layers.0.in_proj.weight"),
        ("mamba_integer_v1", {"layers.0.res_gate": torch.full((1,), torch.nan)}, "layers.0.res_gate"),
        ("mamba_integer_v2", {"layers.0.x_proj.weight": torch.ones(20, 24)}, "20 rows"),
        ("mamba_integer_v2", {"layers.0.A_log": torch.ones(7)}, "7 heads"),
        ("mamba_integer_v2", {"layers.1.A_log": torch.ones(4)}, "layers.1.A_log"),
        ("mamba_integer_v2", {"layers.0.decay_shifts": torch.ones(24, 3)}, "unknown layers.0.decay_shifts"),
        ("mamba_integer_v2", {"layers.0.in_proj.bias": torch.ones(48)}, "unknown layers.0.in_proj.bias"),
    ],
)
def test_tensors_that_do_not_fit_are_taken(
    version: str, change: dict[str, Tensor], part: str, tmp_path: Path
) -> None:
    torch.save(tensors_of(model_of(version)) | change, tmp_path / "a.pt")
    with pytest.raises(MambaintError) as caught:
        load_float_model(tmp_path / "a.pt")
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_matrices_are_ternarised_twice(tmp_path: Path) -> None:
    """The mean of |s W_q| is not s: what is kept must be the latent matrix."""
    model = model_of("mamba_integer_v1")
    tensors = tensors_of(model)
    torch.save(tensors, tmp_path / "a.pt")
    found, _ = load_float_model(tmp_path / "a.pt")
    assert isinstance(found, MambaForCausalLM)
    assert torch.equal(found.lm_head.weight, tensors["lm_head.weight"])
    found.save_pretrained(tmp_path / "b")
    again, _ = load_float_model(tmp_path / "b")
    assert torch.equal(logits(again), logits(found))
