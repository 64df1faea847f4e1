"""What training runs is the integer graph: eval forward, frozen integers and graph agree bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mamba_int.graph import Graph, IntArray
from mamba_int.interpreter import evaluate
from mamba_int.model import MambaInt
from mamba_int.native import build_nodes
from tests.circuits_runtime.models import SMALL, MambaIntConfig, random_inputs
from tests.mamba_int.graphs import FORMS, traced


def make(seed: int = 0, **forms: Any) -> tuple[MambaInt, Tensor]:
    """A model with observed scales in training mode, and inputs."""
    config = MambaIntConfig(**(SMALL | forms))
    model = MambaInt(config, seed)
    inputs = torch.from_numpy(random_inputs(config, 6, seed + 1))
    model.observe(inputs)
    return model, inputs


def graph_of_integers(model: MambaInt) -> Graph:
    """The graph that ``quantize`` makes of what a checkpoint holds."""
    integers = {name: value.numpy() for name, value in model.frozen_integers().items()}
    built = build_nodes(model.config, model.scales(), lambda name, frac: integers[name])
    return Graph(tuple(built.nodes), built.output, model.config.seq_len).verify(24)


def targets(model: MambaInt, inputs: Tensor) -> Tensor:
    shape = inputs.shape if model.config.task == "language_model" else inputs.shape[:1]
    return torch.arange(int(np.prod(shape))).reshape(shape) % model.config.n_outputs


def loss_of(model: MambaInt, inputs: Tensor) -> Tensor:
    logits = model(inputs)
    return torch.nn.functional.cross_entropy(logits.flatten(0, -2), targets(model, inputs).flatten())


def train(model: MambaInt, inputs: Tensor, steps: int) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2, betas=(0.9, 0.98), weight_decay=0.0)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model, inputs)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def assert_is_its_graph(model: MambaInt, inputs: Tensor) -> None:
    """Every tensor of the float32 forward is the int64 one, fractions and infinities excluded."""
    graph = graph_of_integers(model)
    trace: dict[str, Tensor] = {}
    with torch.no_grad():
        logits = model.eval()(inputs, trace)
    expected = traced(graph, inputs.numpy())
    assert set(trace) == set(expected)
    for name, value in expected.items():
        assert trace[name].dtype is torch.float32
        np.testing.assert_array_equal(trace[name].numpy(), value, err_msg=name)
    whole = expected[graph.output] * 2.0 ** -graph.by_name[graph.output].frac
    np.testing.assert_array_equal(logits.numpy(), whole)


# -- equality -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_forward_is_the_integer_model_before_and_after_training(form: str) -> None:
    model, inputs = make(**FORMS[form])
    assert_is_its_graph(model, inputs)
    model.train()
    train(model, inputs, 3)
    model.freeze_scales()
    train(model, inputs, 2)
    assert_is_its_graph(model, inputs)


@pytest.mark.parametrize("seed", range(4))
def test_forward_is_the_integer_model_with_parameters_blown_up(seed: int) -> None:
    """Saturated weights, taps, biases and decays are part of the model too."""
    model, inputs = make(seed, seq_len=19, chunk_size=4, activation="squareplus", gate="algebraic")
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith("decay_bias"):
                parameter.mul_(torch.exp2(torch.randint(0, 12, parameter.shape, generator=random).float()))
    model.freeze_scales()
    assert_is_its_graph(model, inputs)


def test_training_forward_with_scales_frozen_is_the_eval_forward() -> None:
    model, inputs = make(seq_len=9)
    model.freeze_scales()
    assert torch.equal(model.train()(inputs), model.eval()(inputs))


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 40))
def test_language_model_runs_at_any_length_and_never_looks_ahead(steps: int) -> None:
    model, _ = LANGUAGE_MODEL
    tokens = torch.arange(40)[None] * 7 % 11
    with torch.no_grad():
        whole, start = model(tokens), model(tokens[:, :steps])
    assert torch.equal(whole[:, :steps], start)
    graph = graph_of_integers(model)
    expected = evaluate(graph, tokens[:, :steps].numpy())
    assert (expected * 2.0 ** -graph.by_name[graph.output].frac == start.numpy()).all()


LANGUAGE_MODEL = make(task="language_model", vocab_size=11, seq_len=13, chunk_size=8)
LANGUAGE_MODEL[0].freeze_scales()
LANGUAGE_MODEL[0].eval()


def test_batch_does_not_matter() -> None:
    model, inputs = make(seq_len=9)
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(inputs), torch.cat([model(row[None]) for row in inputs]))


def test_one_frozen_weight_changed_by_one_is_noticed() -> None:
    """Negative control: the comparison is not of a thing with itself."""
    model, inputs = make()
    integers: dict[str, IntArray] = {name: value.numpy() for name, value in model.frozen_integers().items()}
    integers["layer0.in_proj.weight"][0, 0] ^= 1
    built = build_nodes(model.config, model.scales(), lambda name, frac: integers[name])
    graph = Graph(tuple(built.nodes), built.output, model.config.seq_len)
    trace: dict[str, Tensor] = {}
    model.eval()(inputs, trace)
    assert (traced(graph, inputs.numpy())["layer0.in_proj"] != trace["layer0.in_proj"].detach().numpy()).any()


# -- scales ---------------------------------------------------------------------------------------------


def test_scales_move_while_training_and_never_once_frozen() -> None:
    model, inputs = make()
    state = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.train()
    train(model, inputs, 1)
    assert not torch.equal(model.statistics, state["statistics"])
    model.freeze_scales()
    assert model.scales_frozen
    fracs, statistics, scales = model.fracs.clone(), model.statistics.clone(), model.scales()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8)
    train(model, inputs, 3)
    assert torch.equal(model.fracs, fracs) and torch.equal(model.statistics, statistics)
    assert model.scales() == scales


def test_scales_do_not_move_in_eval_mode() -> None:
    model, inputs = make()
    before = model.statistics.clone()
    model.eval()(inputs * 0)
    assert torch.equal(model.statistics, before)


def test_static_scale_of_a_larger_activation_has_fewer_places() -> None:
    model, inputs = make(conv_frac=5)
    places = []
    for _ in range(2):
        model.statistics[len(model.weight_scales) :] = -1.0
        model.observe(inputs)
        places.append(model.scales()["layer0.x"])
        with torch.no_grad():
            model.parameter("layer0.conv_x.taps").mul_(2)
    assert places[1] == places[0] - 1


def test_inputs_of_zeros_give_finite_scales() -> None:
    model = MambaInt(MambaIntConfig(**SMALL))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    inputs = torch.zeros(2, 8, 3)
    model.observe(inputs)
    losses = train(model, inputs, 2)
    assert np.isfinite(losses).all()
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert_is_its_graph(model, inputs.long())


# -- state ----------------------------------------------------------------------------------------------


def test_seed_decides_the_weights_and_nothing_else_does() -> None:
    config = MambaIntConfig(**SMALL)
    torch.manual_seed(1)
    first = MambaInt(config, 3).state_dict()
    torch.manual_seed(2)
    same, other = MambaInt(config, 3).state_dict(), MambaInt(config, 4).state_dict()
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("form", FORMS)
def test_state_dict_brings_the_same_integers_and_scales_back(form: str) -> None:
    model, inputs = make(**FORMS[form])
    train(model, inputs, 2)
    model.freeze_scales()
    copy = MambaInt(model.config, seed=99)
    copy.load_state_dict(model.state_dict())
    assert copy.scales() == model.scales() and copy.scales_frozen
    mine, theirs = model.frozen_integers(), copy.frozen_integers()
    assert set(mine) == set(theirs)
    assert all(torch.equal(mine[name], theirs[name]) and mine[name].dtype is torch.int64 for name in mine)
    assert graph_of_integers(copy).model_id == graph_of_integers(model).model_id


def test_state_of_another_shape_is_refused() -> None:
    state = make()[0].state_dict()
    with pytest.raises(RuntimeError, match="size mismatch"):
        MambaInt(MambaIntConfig(**(SMALL | {"d_model": 12}))).load_state_dict(state)


@pytest.mark.parametrize("form", FORMS)
def test_every_parameter_learns(form: str) -> None:
    """A parameter without a gradient would be a detached quantizer."""
    model, inputs = make(**FORMS[form])
    model.train()
    loss_of(model, inputs).backward()
    steps, chunk = model.config.seq_len, model.config.chunk_size
    for name, parameter in model.named_parameters():
        if name.endswith("tau") and (chunk == 1 and steps == 1):
            continue  # one step is never rotated
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_training_lowers_the_loss() -> None:
    model, inputs = make(seq_len=9)
    losses = train(model.train(), inputs, 30)
    assert losses[-1] < 0.5 * losses[0]


# -- float twin -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_float_twin_rounds_nothing(form: str) -> None:
    model, inputs = make(**FORMS[form], arithmetic="float")
    assert not model.exact
    model, inputs = model.double().eval(), inputs[1:]  # not the sample of zeros
    with torch.no_grad():
        before = model(inputs)
        # A change far below any rounding step shows in the logits: nothing on the way is a step.
        for name, parameter in model.named_parameters():
            if name.endswith(("weight", "D", "taps", "table")):
                parameter.mul_(1 + 1e-7)
        after = model(inputs)
    assert (before != after).all()
    torch.testing.assert_close(before, after, rtol=1e-4, atol=1e-4)


def test_float_twin_does_not_depend_on_the_static_scales() -> None:
    """They only choose units; a rounding or saturation left in would follow them."""
    model, inputs = make(seq_len=19, chunk_size=4, arithmetic="float")
    model = model.double().eval()
    with torch.no_grad():
        before = model(inputs)
        names = [*model.weight_scales, *model.activation_scales]
        for i, name in enumerate(names):
            if not name.endswith(".BC"):
                model.fracs[i] += 1 + i % 2
        torch.testing.assert_close(model(inputs), before, rtol=1e-9, atol=1e-9)
