"""Fused kernels compute what the nodes they stand for compute, and pass the same gradients.

Here the kernels run in Triton's interpreter on float32; tests marked ``gpu`` run the compiled ones.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mamba_int.config import MambaIntConfig
from mamba_int.executor import execute_nodes, execute_plan
from mamba_int.fusion import plan
from mamba_int.graph import Node
from mamba_int.model import MambaInt
from mamba_int.native import NativeNodes, build_nodes

SMALL: dict[str, Any] = {
    "task": "language_model",
    "vocab_size": 11,
    "d_model": 10,
    "n_layer": 1,
    "headdim": 5,
    "d_state": 6,
    "chunk_size": 4,
    "seq_len": 9,
}

FORMS: list[dict[str, Any]] = [
    {},
    {"weights": "int8", "activation": "squareplus", "rotation": "shear"},
    {"weights": "int8", "gate": "algebraic", "chunk_size": 1},
    {
        "weights": "int8",
        "gate": "hard_sigmoid",
        "rotation": "none",
        "M_bits": 12,
        "d_conv": 3,
        "conv_bias": False,
    },
    {"gate": "hard_sigmoid", "y_bits": 11, "activate_BC": True, "d_conv": 5},
    {"task": "classification", "n_features": 3, "pooling": "last", "n_layer": 2},
    {"task": "classification", "n_features": 3, "final_norm": False, "seq_len": 4},
]


INSIDE = ["layer0.norm_wide", "layer0.x_in_int8_wide", "layer0.conv_x", "layer0.ssd", "layer0.ramp"]
"""Values that fused runs do not write."""


def made(**forms: Any) -> tuple[MambaInt, Tensor]:
    """A model with frozen scales, and inputs whose length is no multiple of the chunk."""
    config = MambaIntConfig(**(SMALL | forms))
    model = MambaInt(config, 0)
    random = torch.Generator().manual_seed(1)
    if config.task == "language_model":
        inputs = torch.randint(0, config.vocab_size, (2, config.seq_len), generator=random)
    else:
        shape = 2, config.seq_len, config.n_features
        inputs = torch.randint(config.input_low, config.input_high + 1, shape, generator=random)
    model.observe(inputs)
    model.freeze_scales()
    return model, inputs


def run(model: MambaInt, inputs: Tensor, fused: bool) -> tuple[Tensor, dict[str, Tensor]]:
    model.fused = fused
    model.zero_grad()
    logits = model(inputs)
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2)).to(logits.device)
    (logits * weights).sum().backward()
    return logits.detach(), {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }


def difference(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm().clamp_min(1e-6))


@pytest.mark.parametrize("forms", FORMS, ids=lambda forms: " ".join(map(str, forms.values())) or "native")
def test_every_form_fused_computes_the_integers_and_gradients_of_its_nodes(forms: dict[str, Any]) -> None:
    model, inputs = made(**forms)
    logits, gradients = run(model, inputs, fused=False)
    fused_logits, fused_gradients = run(model, inputs, fused=True)
    assert torch.equal(logits, fused_logits)
    assert gradients.keys() == fused_gradients.keys()
    worst = max(difference(fused_gradients[name], gradients[name]) for name in gradients)
    assert worst < 1e-4


def nodes_of(**forms: Any) -> NativeNodes:
    model, _ = made(**forms)
    return build_nodes(model.config, model.scales(), model.constant)


def fused_runs(nodes: list[Node]) -> dict[str, tuple[str, ...]]:
    return {step.nodes[0]: step.nodes for step in plan(nodes) if len(step.nodes) > 1}


def test_a_block_whose_projection_is_requantized_needs_few_kernels() -> None:
    steps = plan(nodes_of(weights="int8").nodes)
    in_block = [step for step in steps if step.nodes[0].startswith("layer0.")]
    # norm, in_proj, two convolutions, two views, three rotations, scan, gate, out_proj
    assert len(in_block) == 12


def test_a_plan_computes_every_node_once() -> None:
    for forms in FORMS:
        nodes = nodes_of(**forms).nodes
        computed = [name for step in plan(nodes) for name in step.nodes]
        assert sorted(computed) == sorted(node.name for node in nodes)


def with_reader(nodes: list[Node], read: str) -> list[Node]:
    """The nodes, and one more that reads ``read``."""
    frac = next(node.frac for node in nodes if node.name == read)
    return [*nodes, Node("spy", "shift", (read,), {"places": 0}, {}, frac)]


@pytest.mark.parametrize("read", INSIDE)
def test_a_value_that_another_node_reads_is_not_fused_away(read: str) -> None:
    model, inputs = made(weights="int8")
    nodes = with_reader(build_nodes(model.config, model.scales(), model.constant).nodes, read)
    with torch.no_grad():
        alone = execute_nodes(nodes, inputs.float())
        fused = execute_plan(plan(nodes), nodes, inputs.float())
    assert torch.equal(alone["spy"], fused["spy"])
    assert torch.equal(alone["logits"], fused["logits"])


def test_a_clamp_too_wide_for_bf16_is_not_carried_in_it() -> None:
    nodes = nodes_of(weights="int8").nodes
    assert "layer0.conv_x" in fused_runs(nodes)
    wide = [
        replace(node, attributes=dict(node.attributes) | {"high": 257}) if node.name == "layer0.x" else node
        for node in nodes
    ]
    assert "layer0.conv_x" not in fused_runs(wide)


def test_slices_that_overlap_are_not_written_by_one_kernel() -> None:
    nodes = nodes_of(weights="int8").nodes
    assert "layer0.in_proj" in fused_runs(nodes)
    moved = [
        replace(node, attributes=dict(node.attributes) | {"start": node.integer("start") - 1})
        if node.name == "layer0.dt"
        else node
        for node in nodes
    ]
    assert "layer0.in_proj" not in fused_runs(moved)


@pytest.mark.gpu
@pytest.mark.parametrize("forms", FORMS, ids=lambda forms: " ".join(map(str, forms.values())) or "native")
@pytest.mark.parametrize("length", [1, 37, 130])
def test_compiled_kernels_compute_the_integers_of_the_nodes(forms: dict[str, Any], length: int) -> None:
    sizes = {"d_model": 48, "headdim": 16, "d_state": 32, "seq_len": length, "chunk_size": 16}
    model, inputs = made(**(forms | sizes))
    model, inputs = model.cuda(), inputs.cuda()
    logits, gradients = run(model, inputs, fused=False)
    fused_logits, fused_gradients = run(model, inputs, fused=True)
    assert torch.equal(logits, fused_logits)
    # Gradients travel in bf16, 8 significant bits.
    assert max(difference(fused_gradients[name], gradients[name]) for name in gradients) < 0.06


@pytest.mark.gpu
def test_compiled_kernels_compute_the_integers_of_a_large_block() -> None:
    sizes = {
        "d_model": 768,
        "n_layer": 2,
        "headdim": 64,
        "d_state": 64,
        "chunk_size": 32,
        "norm_input_bits": 7,
    }
    model, _ = made(**sizes, vocab_size=300)
    model = model.cuda()
    inputs = torch.randint(0, 300, (4, 519), generator=torch.Generator().manual_seed(3)).cuda()
    with torch.no_grad():
        model.fused = False
        alone = model(inputs)
        model.fused = True
        assert torch.equal(alone, model(inputs))
