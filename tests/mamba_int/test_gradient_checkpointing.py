"""Gradient checkpointing changes what is kept for the backward pass, and not one bit of what is computed."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from mamba_int.executor import execute_nodes, execute_plan
from mamba_int.fusion import plan
from mamba_int.graph import Node
from mamba_int.model import MambaInt
from mamba_int.native import build_nodes
from tests.circuits_runtime.models import SMALL, MambaIntConfig, random_inputs
from tests.mamba_int.graphs import FORMS
from tests.mamba_int.stand_in import RECIPE, assert_same_tensors, fit

SEQUENCES = 7
"""No other dimension has this size: what begins with it is an activation."""


SHORT: dict[str, Any] = {"task": "language_model", "vocab_size": 11, "seq_len": 3, "chunk_size": 2}
"""A model for Triton's interpreter."""


def made(seed: int = 0, **forms: Any) -> tuple[MambaInt, Tensor]:
    """A model of three layers in training mode, and inputs."""
    config = MambaIntConfig(**(SMALL | {"n_layer": 3} | forms))
    inputs = torch.from_numpy(random_inputs(config, SEQUENCES - 2, seed + 1))
    model = MambaInt(config, seed)
    with torch.no_grad():
        model.observe(inputs)
    return model.train(), inputs


def trained(fused: bool, gradient_checkpointing: bool, steps: int = 3, **forms: Any) -> list[Tensor]:
    """Logits, gradients and buffers of steps while scales are learned, and of a third after."""
    model, inputs = made(**forms)
    model.fused, model.gradient_checkpointing = fused, gradient_checkpointing
    found: list[Tensor] = []
    for step in range(steps):
        if step == 2:
            model.freeze_scales()
        model.zero_grad()
        logits = model(inputs)
        weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(step))
        (logits * weights).sum().backward()
        gradients = [torch.zeros(()) if p.grad is None else p.grad.clone() for p in model.parameters()]
        found += [logits.detach(), *gradients, *(buffer.clone() for buffer in model.buffers())]
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter -= 1e-3 * gradient
    return found


def assert_equal(kept: list[Tensor], anew: list[Tensor]) -> None:
    assert len(kept) == len(anew)
    for one, other in zip(kept, anew, strict=True):
        assert one.dtype is other.dtype and torch.equal(one, other)


@pytest.mark.parametrize("form", FORMS)
def test_layers_computed_anew_give_the_same_bits(form: str) -> None:
    kept, anew = (trained(False, choice, **FORMS[form]) for choice in (False, True))
    assert_equal(kept, anew)
    assert any(bool(tensor.any()) for tensor in anew)


def test_the_float_twin_computed_anew_has_the_same_bits() -> None:
    kept, anew = (trained(False, choice, arithmetic="float") for choice in (False, True))
    assert_equal(kept, anew)


def test_fused_layers_computed_anew_give_the_same_bits() -> None:
    forms = {"weights": "int8", "activation": "squareplus", "n_layer": 2, "steps": 1}
    kept, anew = (trained(True, choice, **SHORT, **forms) for choice in (False, True))
    assert_equal(kept, anew)


# -- what is kept ---------------------------------------------------------------------------------------


def saved_activations(fused: bool, gradient_checkpointing: bool, n_layer: int) -> int:
    """Bytes of activations that a forward pass keeps for the backward pass, each once."""
    model, inputs = made(n_layer=n_layer, **SHORT)
    model.fused, model.gradient_checkpointing = fused, gradient_checkpointing
    model.freeze_scales()
    seen: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point() and tensor.numel() and tensor.numel() % SEQUENCES == 0:
            seen[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        model(inputs)
    return sum(tensor.nbytes for tensor in seen.values())


@pytest.mark.parametrize("fused", [False, True], ids=["node by node", "fused"])
def test_a_layer_more_keeps_its_residual_and_nothing_else(fused: bool) -> None:
    residual = SEQUENCES * SHORT["seq_len"] * SMALL["d_model"] * 4
    growth = {}
    for choice in (True, False):
        one, two = (saved_activations(fused, choice, n_layer) for n_layer in (1, 2))
        growth[choice] = two - one
    assert growth[True] == residual
    assert growth[False] > 8 * residual


@pytest.mark.parametrize("fused", [False, True], ids=["node by node", "fused"])
@pytest.mark.parametrize("name", ["spy", "layer1.spy"])
def test_a_value_of_an_earlier_layer_reaches_whoever_reads_it(fused: bool, name: str) -> None:
    """Also a layer's own node that comes when the layer is over."""
    model, tokens = made()
    nodes, inputs = build_nodes(model.config, model.scales(), model.constant).nodes, tokens.float()
    for reader, read in ((name, "layer1.y"), ("last", name)):
        frac = next(node.frac for node in nodes if node.name == read)
        nodes.append(Node(reader, "shift", (read,), {"places": 0}, {}, frac))
    kept = execute_nodes(nodes, inputs)
    if fused:
        anew = execute_plan(plan(nodes), nodes, inputs, gradient_checkpointing=True)
    else:
        anew = execute_nodes(nodes, inputs, gradient_checkpointing=True)
    for read in ("layer1.y", name, "last", "logits"):
        assert torch.equal(anew[read].float(), kept[read])
    inside = {value for value in anew if "." in value}
    assert inside - {name} == {f"layer{i}.residual" for i in range(3)} | {"layer1.y"}


def test_a_trace_shows_every_tensor_all_the_same() -> None:
    model, inputs = made()
    traces: list[dict[str, Tensor]] = [{}, {}]
    for trace, choice in zip(traces, (False, True), strict=True):
        model.gradient_checkpointing = choice
        model.eval()(inputs, trace)
    assert traces[0].keys() == traces[1].keys() and "layer2.ssd" in traces[1]


def test_a_recipe_with_checkpointing_trains_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = dataclasses.replace(RECIPE, steps=4, micro_batches=2)
    used: list[bool] = []
    forward = MambaInt.forward

    def noted(model: MambaInt, *arguments: Any) -> Tensor:
        used.append(model.gradient_checkpointing)
        return forward(model, *arguments)

    monkeypatch.setattr(MambaInt, "forward", noted)
    for choice in (False, True):
        chosen = dataclasses.replace(recipe, gradient_checkpointing=choice)
        fit(tmp_path / str(choice), chosen, build_model=MambaInt)
        assert set(used) == {choice}
        used.clear()
    assert_same_tensors(
        tmp_path / "False" / "checkpoint.safetensors", tmp_path / "True" / "checkpoint.safetensors"
    )
