"""A pass may remove nodes; no number that remains may change."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mamba_int.errors import MambaintError
from mamba_int.graph import Graph, Node
from mamba_int.native import build_nodes
from mamba_int.passes import PASSES, eliminate_dead, eliminate_identities, optimize
from tests.circuits.conftest import GRAPHS
from tests.circuits_runtime.models import SMALL, MambaIntConfig, frozen_model
from tests.mamba_int.graphs import FORMS, chain, node, random_batch, traced

Pass = Callable[[Graph], Graph]


def assert_same_numbers(before: Graph, after: Graph, seed: int = 0) -> None:
    """The golden input once more: every tensor that is left, and the output with its scale."""
    inputs = random_batch(before, seed)
    old, new = traced(before, inputs), traced(after, inputs)
    assert set(new) <= set(old)
    assert all((old[name] == value).all() for name, value in new.items())
    assert (old[before.output] == new[after.output]).all()
    assert before.by_name[before.output].frac == after.by_name[after.output].frac
    assert {entry.name for entry in after.nodes} <= {entry.name for entry in before.nodes}


def clamp(name: str, source: str, low: int, high: int, frac: int = 0) -> Node:
    return node(name, "clamp", source, low=low, high=high, frac=frac, saturation=True)


def names(graph: Graph) -> list[str]:
    return [entry.name for entry in graph.nodes]


# -- what goes ------------------------------------------------------------------------------------------


def test_what_changes_nothing_goes_and_what_changes_something_stays() -> None:
    graph = chain(
        clamp("inside", "input", -5, 5),
        clamp("cuts_below", "inside", -4, 5),
        clamp("cuts_above", "cuts_below", -4, 4),
        node("nothing", "shift", "cuts_above", places=0),
        node("halved", "shift", "nothing", places=1),
        node("doubled", "shift", "halved", places=-1),
        node("can_be_negative", "relu", "doubled"),
        node("cannot", "relu", "can_be_negative"),
        node("y", "add", "cannot", "inside"),
        width=2,
        low=-5,
        high=5,
    )
    after = eliminate_identities(graph).verify()
    left = ["input", "cuts_below", "cuts_above", "halved", "doubled", "can_be_negative", "y"]
    assert names(after) == left
    assert after.by_name["y"].inputs == ("can_be_negative", "input")
    assert_same_numbers(graph, after)


def test_what_changes_one_value_only_stays() -> None:
    """Off by one in a proof of 'changes nothing'."""
    relu = node("y", "relu", "input")
    for entry, low, high in (
        (relu, -1, 5),
        (clamp("y", "input", -4, 5), -5, 5),
        (clamp("y", "input", -5, 4), -5, 5),
    ):
        assert len(eliminate_identities(chain(entry, width=1, low=low, high=high)).nodes) == 2
    assert len(eliminate_identities(chain(relu, width=1, low=0, high=5)).nodes) == 1


def test_chain_of_identities_leads_back_to_its_source() -> None:
    graph = chain(
        clamp("a", "input", -9, 9),
        clamp("b", "a", -8, 8),
        node("c", "shift", "b", places=0),
        node("y", "mul", "c", "a"),
        width=2,
        low=-5,
        high=5,
    )
    after = eliminate_identities(graph)
    assert after.by_name["y"].inputs == ("input", "input")
    assert_same_numbers(graph, after)


def test_a_product_that_becomes_a_square_frees_the_relu_after_it() -> None:
    """One round is not enough: x * clamp(x) is only known to be >= 0 once the clamp is gone."""
    graph = chain(
        clamp("c", "input", -9, 9),
        node("square", "mul", "input", "c"),
        node("y", "relu", "square"),
        width=2,
        low=-5,
        high=5,
    )
    after = optimize(graph)
    assert names(after) == ["input", "square"]
    assert after.output == "square"
    assert_same_numbers(graph, after)


@pytest.mark.parametrize("middle_frac", [0, 3])
def test_output_keeps_its_scale(middle_frac: int) -> None:
    """Logits are read as integer * 2^-frac: an identity that renames the scale must not vanish."""
    graph = chain(
        clamp("middle", "input", -9, 9, frac=middle_frac),
        clamp("y", "middle", -9, 9, frac=3),
        width=2,
        low=-5,
        high=5,
    )
    after = optimize(graph)
    assert names(after) == ["input", "y"]
    assert_same_numbers(graph, after)
    same = chain(clamp("y", "input", -9, 9), width=2, low=-5, high=5)
    assert names(optimize(same)) == ["input"]


def test_dead_nodes_go_with_everything_that_only_they_read() -> None:
    graph = Graph(
        (
            node("input", "input", low=-5, high=5, features=2),
            node("only_for_dead", "relu", "input"),
            node("shared", "mul", "input", "input"),
            node("dead", "add", "only_for_dead", "shared"),
            node("y", "shift", "shared", places=1),
            node("after_the_output", "relu", "y"),
        ),
        "y",
        1,
    ).verify()
    after = eliminate_dead(graph)
    assert names(after) == ["input", "shared", "y"]
    assert_same_numbers(graph, after)


def test_input_stays_though_the_output_ignores_it() -> None:
    graph = Graph(
        (node("input", "input", low=0, high=5, features=2), node("dead", "relu", "input")), "input", 1
    )
    assert names(eliminate_dead(graph)) == ["input"]


def test_wrong_pass_would_be_noticed() -> None:
    """Negative control: a clamp removed one unit too eagerly."""
    graph = chain(clamp("c", "input", -4, 5), node("y", "relu", "c"), width=2, low=-5, high=5)
    wrong = Graph((graph.nodes[0], node("y", "shift", "input", places=0)), "y", 1)
    with pytest.raises(AssertionError):
        assert_same_numbers(graph, wrong)


def test_graph_beyond_its_bits_is_refused_before_any_pass() -> None:
    graph = chain(node("y", "mul", "input", "input"), width=1, low=0, high=(1 << 12) + 1)
    with pytest.raises(MambaintError, match="beyond 24 bits"):
        optimize(graph, max_bits=24)


# -- on whole graphs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", [*PASSES, optimize])
@pytest.mark.parametrize("name", GRAPHS)
def test_pass_changes_no_number_of_any_operation(name: str, run: Pass) -> None:
    graph = GRAPHS[name]()
    after = run(graph).verify()
    assert_same_numbers(graph, after)
    assert run(after).nodes == after.nodes


@pytest.mark.parametrize("form", FORMS)
def test_pass_changes_no_number_of_a_model(form: str) -> None:
    config = MambaIntConfig(**(SMALL | FORMS[form]))
    model = frozen_model(config)
    integers = model.frozen_integers()
    built = build_nodes(config, model.scales(), lambda name, frac: integers[name].numpy())
    graph = Graph(tuple(built.nodes), built.output, config.seq_len).verify(24)
    for run in (*PASSES, optimize):
        after = run(graph).verify(24)
        assert_same_numbers(graph, after)
        assert run(after).model_id == after.model_id
    assert len(optimize(graph).nodes) < len(graph.nodes)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.sampled_from("cmrsa"), st.integers(0, 9), st.integers(-9, 9)), max_size=9),
    st.data(),
)
def test_random_graphs_keep_their_numbers_and_come_to_rest(
    steps: list[tuple[str, int, int]], data: st.DataObject
) -> None:
    nodes = [node("input", "input", low=-5, high=7, features=3)]
    for i, (op, pick, number) in enumerate(steps):
        source, other = nodes[pick % len(nodes)].name, nodes[(pick * 7 + number) % len(nodes)].name
        name = f"n{i}"
        nodes.append(
            {
                "c": clamp(name, source, min(number, 0) * 3, abs(number) * 5, frac=pick % 2),
                "m": node(name, "mul", source, constants={"value": number}),
                "r": node(name, "relu", source),
                "s": node(name, "shift", source, places=number % 3),
                "a": node(name, "mul" if number > 7 else "add", source, other),
            }[op]
        )
    output = data.draw(st.sampled_from([entry.name for entry in nodes]))
    graph = Graph(tuple(nodes), output, 2).verify(200)
    for run in (*PASSES, lambda g: optimize(g, 200)):
        after = run(graph).verify(200)
        if graph.max_bits <= 53:
            assert_same_numbers(graph, after)
        assert run(after).nodes == after.nodes
        assert np.prod(after.types[after.output].shape) == np.prod(graph.types[output].shape)
