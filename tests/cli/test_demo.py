"""``mambaint demo``: the commands it runs and what it says, with the training cut short."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from cli.main import main
from mamba_int.training import TrainingConfig


def test_demo_ends_in_a_verified_proof_and_a_rejected_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    full = TrainingConfig.from_dict

    def short(values: dict[str, object]) -> TrainingConfig:
        # Five hundred epochs are for the result; a hundred steps show the path.
        return full({**values, "steps": 100, "epochs": 1})

    monkeypatch.setattr(TrainingConfig, "from_dict", short)
    monkeypatch.setenv("MAMBAINT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "argv", ["mambaint", "demo", "--out", str(tmp_path / "out"), "--json"])
    with pytest.raises(SystemExit) as stop:
        main()
    result = json.loads(capsys.readouterr().out)
    assert stop.value.code == 0
    assert result["valid"] is True and result["tampered_valid"] is False
    assert result["logrows"] <= 14 and result["rows"] <= 1 << 14
    assert result["test_accuracy"] > 0.3
    assert result["proof_bytes"] <= 4096
    for name in ("proof.json", "verifier.zip", "tampered.json", "digit.json", "model/report.html"):
        assert (tmp_path / "out" / name).is_file()
