"""The cost model: what it is fitted to, where it is kept, what it refuses."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from circuits.breakdown import breakdown
from circuits.lowering import build_circuit
from mamba_int.errors import MambaintError
from mamba_int.files import write_json
from tests.circuits.conftest import GRAPHS, native_graph
from zk import calibration, estimate
from zk.calibration import FORMAT, VERSION, calibrate, calibration_circuit, measure, stored_calibration
from zk.estimate import Calibration, Measurement, Size, fit, non_negative_fit, require_memory


def measurement(logrows: int, rows: int = 100, public: int = 5, nodes: int = 30) -> Measurement:
    """An invented machine that is exactly linear."""
    columns = 1 << logrows
    return Measurement(
        size=Size(logrows, rows, public, nodes),
        keygen_seconds=0.2 + 1e-4 * columns + 5e-4 * nodes,
        prove_seconds=0.05 + 1e-4 * columns + 1e-5 * rows,
        verify_seconds=0.005 + 4e-6 * public,
        setup_peak_bytes=60_000_000 + 8300 * columns,
        prove_peak_bytes=30_000_000 + 8200 * columns + 1000 * public,
        proof_bytes=2560,
        proving_key_bytes=3840 * columns,
    )


def linear_machine() -> Calibration:
    sizes = [(10, 200, 18, 20), (10, 900, 18, 20), (12, 3600, 460, 20), (12, 1200, 6, 600)]
    sizes += [(14, 4600, 18, 20), (14, 15500, 1900, 20), (14, 14700, 18, 600)]
    return fit(calibration.machine(), [measurement(*size) for size in sizes])


def test_fit_recovers_a_linear_machine_at_sizes_it_has_not_seen() -> None:
    fitted = linear_machine()
    for size in ((16, 60000, 12, 900), (11, 700, 76, 400)):
        wanted, got = asdict(measurement(*size)), asdict(fitted.predict(Size(*size)))
        for name, value in got.items():
            assert value == pytest.approx(wanted[name], rel=1e-6), name


def test_noise_makes_no_cost_negative() -> None:
    random = np.random.default_rng(0)
    for _ in range(20):
        terms = random.uniform(0, 1, (7, 5))
        solution = np.array(non_negative_fit(terms, random.uniform(0.1, 1, 7)))
        assert (solution >= 0).all() and solution.any()


def test_committed_columns_lengthen_the_proof_as_ezkl_does() -> None:
    fitted = linear_machine()
    # Measured with EZKL 23.0.5: 0 to 8 committed columns beside the columns of our circuits.
    measured = [2560, 2688, 2976, 3104, 3232, 3520, 3648, 3776, 4064]
    sizes = [Size(11, 100, 5, 30, columns) for columns in range(9)]
    assert [fitted.predict(size).proof_bytes for size in sizes] == measured
    key = [fitted.predict(size).proving_key_bytes for size in sizes]
    # Measured likewise at 2^11 rows.
    assert key[8] / key[0] == pytest.approx(11015963 / 7869531, rel=1e-3)


@pytest.mark.parametrize("shape", calibration.CIRCUITS)
def test_calibration_circuit_fills_the_rows_it_should(shape: tuple[int, int, float, float]) -> None:
    logrows, _, filled, _ = shape
    _, lowered = calibration_circuit(*shape)
    assert lowered.circuit.logrows == logrows
    assert 0.5 * filled * (1 << logrows) < lowered.circuit.rows <= (1 << logrows) - 12


def test_calibration_is_made_stored_and_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "CIRCUITS", ((8, 2, 0.9, 1.0), (9, 3, 0.9, 4)))
    monkeypatch.setattr(calibration, "REPEATS", 1)
    assert stored_calibration(tmp_path) is None
    said: list[str] = []
    made = calibrate(said.append, tmp_path)
    assert stored_calibration(tmp_path) == made and len(said) == 2
    assert made.proof_bytes == 2560
    assert not (tmp_path / "keys").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"version": VERSION + 1},
        {"machine": {"cpu": "another"}},
        {"coefficients": {}},
        {"proof_bytes": "2560"},
        {"key_bytes_per_row": -1.0},
        {"more": 1},
    ],
)
def test_foreign_or_changed_calibration_is_none(tmp_path: Path, change: dict[str, object]) -> None:
    whole = {"format": FORMAT, "version": VERSION, **asdict(linear_machine())}
    write_json(calibration.calibration_path(tmp_path), whole)
    assert stored_calibration(tmp_path) is not None
    write_json(calibration.calibration_path(tmp_path), {**whole, **change})
    assert stored_calibration(tmp_path) is None


def test_half_written_calibration_is_none(tmp_path: Path) -> None:
    path = calibration.calibration_path(tmp_path)
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"format": FORMAT})[:-3])
    assert stored_calibration(tmp_path) is None


def test_too_little_memory_is_refused_and_an_unknown_amount_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "available_memory", lambda: 100_000_000)
    require_memory(99_000_000)
    with pytest.raises(MambaintError, match=r"needs about 101 MB and 100 MB of memory are free"):
        require_memory(101_000_000)
    monkeypatch.setattr(estimate, "available_memory", lambda: None)
    require_memory(1 << 60)


def test_measured_rows_are_ezkls(tmp_path: Path) -> None:
    # make_keys refuses any circuit whose row count EZKL does not share.
    graph = GRAPHS["linear_ternary"]()
    lowered = build_circuit(graph)
    measured = measure(graph, lowered, 1, tmp_path)
    assert measured.size == Size.of(lowered.circuit) and measured.proof_bytes == 2560


@pytest.mark.parametrize("name", sorted(GRAPHS))
def test_shares_of_every_operation_add_up_to_the_rows(name: str) -> None:
    graph = GRAPHS[name]()
    lowered = build_circuit(graph)
    rows = sum(share.rows for share in breakdown(graph, lowered))
    # EZKL's count drops half a row where the public values are odd in number.
    assert int(rows) == lowered.circuit.rows


@pytest.mark.parametrize("public_input", [False, True])
def test_shares_of_a_model_add_up_and_belong_to_its_layers(public_input: bool) -> None:
    graph = native_graph(n_layer=2, seq_len=4, chunk_size=2, pooling="last")
    lowered = build_circuit(graph, public_input)
    shares = breakdown(graph, lowered)
    assert int(sum(share.rows for share in shares)) == lowered.circuit.rows
    assert {share.layer for share in shares} == {"outside", "layer0", "layer1"}
    by_part = {share.part: share.operation for share in shares}
    assert by_part["layer0.ssd.chunk0.G"] == "ssd" and by_part["layer0.x_wide"] == "conv+shift"
    assert by_part["layer1.out"] == "linear+shift" and by_part["layer1.x"] == "clamp"
