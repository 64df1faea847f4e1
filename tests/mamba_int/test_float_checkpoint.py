"""Folders and configurations of float models: round trips, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mamba_int.errors import MambaintError
from mamba_int.float_models.config import MambaConfig
from mamba_int.float_models.models import MambaForCausalLM, MambaForSequenceClassification

TINY = MambaConfig(vocab_size=21, d_model=8, n_layer=2, d_state=4, headdim=4, mixer="mamba2")
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
A_LOG = "backbone.layers.1.mixer.A_log"


def saved(folder: Path, **changes: Any) -> MambaForCausalLM:
    torch.manual_seed(0)
    model = MambaForCausalLM(replace(TINY, **changes))
    model.save_pretrained(folder)
    return model


def same(a: MambaForCausalLM, b: MambaForCausalLM) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def shard(folder: Path) -> None:
    """Cut the weights in two files and an index."""
    tensors = load_file(folder / WEIGHTS)
    names = sorted(tensors)
    weight_map = {}
    for i, part in enumerate((names[::2], names[1::2])):
        file = f"model-{i + 1:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / WEIGHTS).unlink()
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("tie", [True, False])
def test_what_is_read_is_not_what_was_saved(tmp_path: Path, tie: bool) -> None:
    model = saved(tmp_path, tie_embeddings=tie)
    assert ("lm_head.weight" in load_file(tmp_path / WEIGHTS)) is not tie
    read = MambaForCausalLM.from_pretrained(tmp_path)
    assert same(model, read)
    assert read.config == model.config
    assert (read.lm_head.weight is read.backbone.embeddings.weight) is tie
    assert not read.training
    shard(tmp_path)
    assert same(model, MambaForCausalLM.from_pretrained(tmp_path))


def test_half_precision_weights_are_refused(tmp_path: Path) -> None:
    model = saved(tmp_path)
    rewrite(tmp_path, lambda tensors: {name: value.bfloat16() for name, value in tensors.items()})
    read = MambaForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(read.state_dict()[A_LOG], model.state_dict()[A_LOG].bfloat16().float())


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {n: v for n, v in t.items() if n != A_LOG}, f"lacks {A_LOG}"),
        (lambda t: t | {"foreign": torch.zeros(1)}, "has unknown foreign"),
        (
            lambda t: t | {A_LOG: torch.zeros(5), "backbone.norm_f.weight": torch.ones(9)},
            r"wrong shapes: .*norm_f.weight \(9,\) instead of \(8,\).*A_log \(5,\) instead of \(4,\)"
            r"|wrong shapes: .*A_log \(5,\) instead of \(4,\).*norm_f.weight \(9,\) instead of \(8,\)",
        ),
        (lambda t: t | {A_LOG: torch.full((4,), float("nan"))}, f"{A_LOG} has values that are not finite"),
        (lambda t: t | {A_LOG: torch.zeros(4, dtype=torch.int32)}, f"{A_LOG} has dtype torch.int32"),
        (
            lambda t: t | {"lm_head.weight": torch.zeros(24, 8)},
            "lm_head.weight is tied and has another",
        ),
    ],
)
def test_weights_that_do_not_fit_are_read(tmp_path: Path, change: Any, message: str) -> None:
    saved(tmp_path)
    rewrite(tmp_path, change)
    with pytest.raises(MambaintError, match=message):
        MambaForCausalLM.from_pretrained(tmp_path)


def test_a_damaged_or_missing_file_is_a_traceback(tmp_path: Path) -> None:
    saved(tmp_path)
    whole = (tmp_path / WEIGHTS).read_bytes()
    for content in (b"", whole[:100], whole[:-1], b"\xff" * 64, whole + b"\0"):
        (tmp_path / WEIGHTS).write_bytes(content)
        with pytest.raises(MambaintError, match="not a whole safetensors file"):
            MambaForCausalLM.from_pretrained(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(MambaintError, match=r"there is no .*model\.safetensors"):
        MambaForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(MambaintError, match="cannot read"):
        MambaForCausalLM.from_pretrained(tmp_path / "nowhere")


def test_an_index_leads_out_of_its_folder_or_to_nothing(tmp_path: Path) -> None:
    saved(tmp_path)
    shard(tmp_path)
    document = json.loads((tmp_path / INDEX).read_text())
    name = next(iter(document["weight_map"]))
    other = next(f for f in document["weight_map"].values() if f != document["weight_map"][name])
    for file, message in (
        ("../secret.safetensors", "name files beside the index"),
        ("/etc/passwd", "name files beside the index"),
        ("..", "name files beside the index"),
        (7, "name files beside the index"),
        ("gone.safetensors", "there is no"),
        (other, "which has no such tensor"),
    ):
        changed = document | {"weight_map": document["weight_map"] | {name: file}}
        (tmp_path / INDEX).write_text(json.dumps(changed))
        with pytest.raises(MambaintError, match=message):
            MambaForCausalLM.from_pretrained(tmp_path)
    (tmp_path / INDEX).write_text("{}")
    with pytest.raises(MambaintError, match="has no weight_map"):
        MambaForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "is not the configuration of a mambaint-float model"),
        ({"version": 2}, "version 2"),
        ({"architecture": 3}, "no architecture"),
        ({"extra": 1}, "unknown keys extra"),
        ({"model": {"d_modle": 8}}, "did you mean 'd_model'"),
    ],
)
def test_a_foreign_configuration_is_read(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    saved(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(MambaintError, match=message):
        MambaForCausalLM.from_pretrained(tmp_path)


def test_a_language_model_is_read_as_a_classifier(tmp_path: Path) -> None:
    saved(tmp_path)
    with pytest.raises(MambaintError, match="is a MambaForCausalLM"):
        MambaForSequenceClassification.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "config.toml"])
def test_a_configuration_changes_on_the_way_through_a_file(tmp_path: Path, name: str) -> None:
    config = replace(TINY, BCdt_norm=True, norm_epsilon=1e-12, activation="gelu", dt_max=0.25, expand=1.5)
    config.save(tmp_path / name)
    assert MambaConfig.load(tmp_path / name) == config
    for text in ('{"d_model": "8"}', '[model]\nd_model = "8"\n'):
        (tmp_path / name).write_text(text)
        if text.startswith("{") == name.endswith("json"):
            with pytest.raises(MambaintError, match="give a value of type int"):
                MambaConfig.load(tmp_path / name)
        else:
            with pytest.raises(MambaintError, match="is not valid"):
                MambaConfig.load(tmp_path / name)
    (tmp_path / name).write_text("[]" if name.endswith("json") else "model = 3")
    with pytest.raises(MambaintError, match="is no table of settings"):
        MambaConfig.load(tmp_path / name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_model": 0}, "d_model = 0; choose 1 to"),
        ({"d_conv": 5}, "d_conv = 5"),
        ({"headdim": 3}, "is not a multiple of headdim"),
        ({"n_groups": 3}, "4 heads cannot share 3 groups"),
        ({"expand": 0.01}, r"expand\*d_model = 0"),
        ({"dt_min": 0.2}, "dt_min/dt_max"),
        ({"dt_limit_low": 1.0, "dt_limit_high": 0.5}, "dt_limit"),
        ({"dropout": 1.0}, "dropout"),
    ],
)
def test_an_impossible_shape_is_accepted(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(MambaintError, match=message):
        replace(TINY, **changes)
    with pytest.raises(MambaintError, match="choose one of silu, gelu"):
        MambaConfig.from_dict({"activation": "tanh"})
