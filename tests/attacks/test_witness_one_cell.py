"""A prover lies about any private cell of any gadget, in both directions: EZKL's constraints reject it."""

from __future__ import annotations

import zlib

import numpy as np
import pytest

from circuits.cells import FIELD
from circuits.circuit import Witness
from circuits.lowering import LoweredCircuit
from tests.circuits.conftest import Array, extreme_inputs, random_input
from tests.circuits.lying import (
    accepted,
    add_at,
    forge,
    override,
    privates,
    refuse_all,
    reject_all,
    satisfied,
)
from tests.circuits.test_equality import CLAIMED, FORMS, built

SLACK = (".limb", ".over", ".under")
"""Parts of an inequality's slack: several may fit, but they decide nothing else."""

WITHIN_OTHERS = ("ssd_carried_whole_chunks", "ssd_one_chunk")
LIED_TO = [name for name in FORMS if name not in WITHIN_OTHERS and privates(built(name)[1])]
MODELS_LIED_TO = ["algebraic", "carried_state", "int8_weights", "language_model"]
MODELS_LIED_TO += [name + CLAIMED for name in MODELS_LIED_TO]
INPUTS_LIED_TO = ["input", "embedding", "linear_ternary", "norm", "rotate_shear", "ssd_carried"]
OUTPUTS_LIED_TO = ["input", "linear_ternary", "conv_shifted", "reduce_sum"]
OUTPUTS_LIED_TO += ["compare", "compare_constant", "compare_wide", "select", "table"]

Lies = dict[str, Witness]


def decides_nothing(lowered: LoweredCircuit, tensor: str, value: int) -> bool:
    """Whether the circuit may accept this value: a slack, or one below 0 of a one-hot, whose relu counts."""
    slack = any(part in tensor for part in SLACK) or (tensor.endswith(".one_hot") and value < 0)
    return slack and lowered.circuit.lookup_low <= value <= lowered.circuit.lookup_high


def inputs_of(name: str) -> list[Array]:
    graph, _ = built(name)
    return [random_input(graph), extreme_inputs(graph)[2]]


def positions(name: str, size: int, most: int) -> list[int]:
    """Some positions of a tensor: the ends and a few between, the same in every run."""
    random = np.random.default_rng(zlib.crc32(name.encode()))
    chosen = {0, size - 1, *random.integers(0, size, most).tolist()}
    return sorted(chosen)[:most]


def sample(lies: Lies, most: int) -> Lies:
    """A few lies, over all tensors."""
    chosen = list(lies.items())
    return dict(chosen[:: max(1, -(-len(chosen) // most))])


def assert_rejected(lowered: LoweredCircuit, x: Array, lies: Lies, harmless: Lies, most: int) -> None:
    """All lies break a constraint, EZKL rejects a sample of them, and harmless ones show the true outputs."""
    refuse_all(lowered, x, lies)
    truth = lowered.witness(x).public
    for what, lie in harmless.items():
        assert satisfied(lowered, lie) == satisfied(lowered, Witness(lie.private, truth)), what
    few = sample(lies, most) | sample(harmless, 2)
    verdicts = accepted(lowered, x, list(few.values()))
    assert verdicts == [satisfied(lowered, lie) for lie in few.values()]


def one_off(lowered: LoweredCircuit, x: Array, most: int) -> tuple[Lies, Lies]:
    """Lies of +-1 about every private tensor, carried on, and those among them that may pass."""
    honest = lowered.witness(x)
    lies: Lies = {}
    harmless: Lies = {}
    for tensor, size in privates(lowered).items():
        for i in positions(tensor, size, most):
            for delta in (1, -1):
                may_pass = decides_nothing(lowered, tensor, honest.private[tensor][i] + delta)
                kind = harmless if may_pass else lies
                kind[f"{tensor}[{i}]{delta:+}"] = forge(lowered, x, {tensor: add_at((i, delta))})
    return lies, harmless


@pytest.mark.parametrize("name", LIED_TO)
def test_any_private_cell_one_off_with_everything_after_it_recomputed_from_the_lie(name: str) -> None:
    _, lowered = built(name)
    x, extreme = inputs_of(name)
    assert_rejected(lowered, x, *one_off(lowered, x, 4), most=6)
    refuse_all(lowered, extreme, one_off(lowered, extreme, 3)[0])


@pytest.mark.parametrize("name", LIED_TO)
def test_any_private_cell_a_field_fraction_wrapped_or_of_the_other_sign(name: str) -> None:
    graph, lowered = built(name)
    k, x = lowered.circuit.logrows, random_input(graph)
    honest = lowered.witness(x)
    # Fractions move rho by one, or a digit by a fraction of the next: only the cell itself is no integer.
    deltas = {
        "1/2^k": pow(1 << k, -1, FIELD),
        "-1/2^k": -pow(1 << k, -1, FIELD),
        "1/2^2k": pow(1 << 2 * k, -1, FIELD),
        "1/16": pow(16, -1, FIELD),
        "1/3": pow(3, -1, FIELD),
        "2^k": 1 << k,
        "-2^k": -(1 << k),
        "2^2k": 1 << 2 * k,
        "half the field": FIELD // 2,
        "1 alone": 1,
        "-1 alone": -1,
    }
    lies: Lies = {}
    harmless: Lies = {}
    for tensor, size in privates(lowered).items():
        for i in positions(tensor, size, 2):
            value = honest.private[tensor][i]
            signs = {"the other sign": -2 * value} if value else {}
            for what, delta in (deltas | signs).items():
                kind = harmless if decides_nothing(lowered, tensor, value + delta) else lies
                kind[f"{tensor}[{i}] {what}"] = override(honest, tensor, [(i, delta)])
    assert_rejected(lowered, x, lies, harmless, most=6)


@pytest.mark.parametrize(
    "name", ["linear_ternary", "linear_two_packs", "conv_shifted", "shift_of_sum", "norm"]
)
def test_quotient_or_digit_solved_for_modulo_the_field(name: str) -> None:
    # Any remainder has its quotient, and any lowest digit its next one, once fractions are allowed.
    _, lowered = built(name)
    x, fraction = random_input(built(name)[0]), pow(1 << lowered.circuit.logrows, -1, FIELD)
    honest, lies = lowered.witness(x), {}
    for tensor, size in privates(lowered).items():
        if tensor.endswith((".one_hot", ".rho")) or any(part in tensor for part in SLACK):
            continue
        for i in positions(name, size, 2):
            for target in (1, -1, 16, -16, 1 << 20):
                lies[f"{tensor}[{i}] for {target:+}"] = override(honest, tensor, [(i, target * fraction)])
    assert_rejected(lowered, x, lies, {}, most=4)


@pytest.mark.parametrize("name", LIED_TO)
def test_private_cell_beyond_any_bound(name: str) -> None:
    graph, lowered = built(name)
    x = random_input(graph)
    honest = lowered.witness(x)
    lies = {
        f"{tensor}[{i}] {sign:+}2^{bits}": override(honest, tensor, [(i, sign << bits)])
        for tensor, size in privates(lowered).items()
        for i in positions(tensor, size, 1)
        for bits in (20, 64, 200, 253)
        for sign in (1, -1)
        if not decides_nothing(lowered, tensor, honest.private[tensor][i] + (sign << bits))
    }
    assert_rejected(lowered, x, lies, {}, most=2)


@pytest.mark.parametrize("name", INPUTS_LIED_TO)
def test_model_input_out_of_range_or_no_integer(name: str) -> None:
    graph, lowered = built(name)
    x, tensor = random_input(graph), graph.types[graph.input.name]
    honest, lies = lowered.witness(x), {}
    for i in positions(name, x.size, 2):
        for what, value in (
            ("low-1", tensor.low - 1),
            ("high+1", tensor.high + 1),
            ("far", tensor.high + 2**40),
        ):
            change = (i, int(value - x.ravel()[i]))
            lies[f"{what} alone [{i}]"] = override(honest, "model_input", [change])
            if what != "far":
                lies[f"{what} carried on [{i}]"] = forge(lowered, x, {"model_input": add_at(change)})
        for divisor in (2, 3, 1 << lowered.circuit.logrows):
            fraction = pow(divisor, -1, FIELD)
            lies[f"+1/{divisor} [{i}]"] = override(honest, "model_input", [(i, fraction)])
    assert_rejected(lowered, x, lies, {}, most=4)


@pytest.mark.parametrize("name", OUTPUTS_LIED_TO)
def test_wrong_public_output(name: str) -> None:
    graph, lowered = built(name)
    x = random_input(graph)
    honest = lowered.witness(x)
    lies = {}
    for i in positions(name, len(honest.public["logits"]), 1):
        for delta in (1, -1):
            logits = list(honest.public["logits"])
            logits[i] += delta
            lies[f"logits[{i}]{delta:+}"] = Witness(honest.private, {**honest.public, "logits": logits})
    reject_all(lowered, x, lies)


@pytest.mark.parametrize("name", MODELS_LIED_TO)
def test_any_private_tensor_of_a_whole_model_one_off(name: str) -> None:
    _, lowered = built(name)
    assert_rejected(lowered, inputs_of(name)[0], *one_off(lowered, inputs_of(name)[0], 1), most=2)
