"""The three ways of each recurrence against the definition in float64, on machines without a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton import knobs

from mamba_int.float_models import scans
from tests.triton_kernels.float_scans import Operands, Random, Scan, assert_close, results, widened
from triton_kernels.associative_scan import associative_scan_reference
from triton_kernels.selective_scan import selective_scan_reference
from triton_kernels.state_space_duality import state_space_duality_reference

WAYS = ("sequential", "chunked", "associative")


@pytest.fixture(autouse=True, scope="module")
def without_kernels() -> Any:
    """The interpreter would run Triton's kernels on these tensors; tests/triton_kernels does that."""
    with knobs.runtime.scope():
        knobs.runtime.interpret = False
        yield


def recurrence(way: str) -> Scan:
    def scan(a: Tensor, b: Tensor, initial_state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return scans.RECURRENCES[way](a, b, initial_state)

    return scan


def selective_operands(length: int, state: bool = True, seed: int = 0) -> Operands:
    """Step sizes and rates as a trained Mamba has them: 0.001 to 0.1, and -1 to -16."""
    random, channels, d_state = Random(seed), 3, 4
    return {
        "u": random(2, length, channels),
        "delta": random(2, length, channels),
        "A": -torch.tensor([1.0, 4.0, 9.0, 16.0]).repeat(channels, 1),
        "B": random(2, length, d_state),
        "C": random(2, length, d_state),
        "D": random(channels),
        "z": random(2, length, channels),
        "delta_bias": random(channels) - 4.0,
        "delta_softplus": True,
        "initial_state": random(2, channels, d_state) if state else None,
    }


def duality_operands(length: int, state: bool = True, seed: int = 0) -> Operands:
    random, heads = Random(seed), 4
    return {
        "x": random(2, length, heads, 3),
        "dt": random(2, length, heads),
        "A": -torch.tensor([1.0, 4.0, 9.0, 16.0]),
        "B": random(2, length, 2, 5),
        "C": random(2, length, 2, 5),
        "D": random(heads),
        "dt_bias": random(heads) - 4.0,
        "dt_softplus": True,
        "initial_state": random(2, heads, 3, 5) if state else None,
    }


def recurrence_operands(length: int, state: bool = True, seed: int = 0) -> Operands:
    random = Random(seed)
    angles = random(2, length, 6)
    radius = torch.exp(-0.1 * torch.exp(random(2, length, 6)))
    return {
        "a": torch.polar(radius, angles),
        "b": random(2, length, 6, dtype=torch.complex64),
        "initial_state": random(2, 6, dtype=torch.complex64) if state else None,
    }


FAMILIES = {
    "selective": (scans.SELECTIVE_SCANS.__getitem__, selective_scan_reference, selective_operands),
    "duality": (scans.STATE_SPACE_DUALITIES.__getitem__, state_space_duality_reference, duality_operands),
    "complex": (recurrence, associative_scan_reference, recurrence_operands),
}


def scan_errors(family: str, way: str, operands: Operands, gradient: bool) -> dict[str, float]:
    """Largest difference over largest value, against the definition in float64."""
    scan, reference, _ = FAMILIES[family]
    wide = {name: widened(value) for name, value in operands.items()}
    if gradient:
        outputs = reference(**wide)
        ones = tuple(torch.randn_like(out, dtype=out.dtype) for out in outputs)
        wanted = results(reference, wide, ones)
        got = results(scan(way), operands, ones)
    else:
        names = ("output", "final_state")
        wanted = dict(zip(names, reference(**wide), strict=True))
        got = dict(zip(names, scan(way)(**operands), strict=True))
    found = {}
    for name, value in got.items():
        assert value.shape == wanted[name].shape, name
        error = float((widened(value) - wanted[name]).abs().max())
        found[name] = error / (float(wanted[name].abs().max()) or 1.0)
    return found


@pytest.mark.parametrize("length", [2048, 16384])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_long_sequence_overflows_or_loses_precision(family: str, length: int) -> None:
    operands = FAMILIES[family][2](length)
    for way in WAYS:
        assert_close(scan_errors(family, way, operands, gradient=False), 1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=6, deadline=None)
@given(
    length=st.sampled_from([1, 2, 3, 15, 16, 17, 64, 65, 131]), state=st.booleans(), way=st.sampled_from(WAYS)
)
def test_an_odd_length_or_a_missing_state_is_scanned_wrongly(
    family: str, length: int, state: bool, way: str
) -> None:
    operands = FAMILIES[family][2](length, state, seed=length)
    assert_close(scan_errors(family, way, operands, gradient=True), 1e-4)


@pytest.mark.parametrize("family", ["selective", "duality"])
@pytest.mark.parametrize("way", WAYS)
def test_steps_so_large_that_decays_vanish_make_nan(family: str, way: str) -> None:
    operands = FAMILIES[family][2](200)
    name = "delta" if family == "selective" else "dt"
    operands[name][:, 4::5] = 100.0
    assert_close(scan_errors(family, way, operands, gradient=True), 1e-4)


def test_chunks_fall_back_to_the_loop_over_all_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("one step after the other")

    monkeypatch.setattr(scans, "selective_scan_reference", refuse)
    monkeypatch.setattr(scans, "state_space_duality_reference", refuse)
    for family in ("selective", "duality"):
        FAMILIES[family][0]("chunked")(**FAMILIES[family][2](100))
