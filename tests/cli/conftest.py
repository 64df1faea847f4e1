"""Commands run in this process."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest

from cli.main import main

Capture = pytest.CaptureFixture[str]


class Cli:
    """Runs commands and keeps what they print; a fault is a code and a line."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def __call__(self, *arguments: str) -> tuple[int, str, str]:
        self.monkeypatch.setattr(sys, "argv", ["mambaint", *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = self.capsys.readouterr()
        return int(stop.value.code or 0), out, err

    def json(self, *arguments: str) -> dict[str, Any]:
        code, out, err = self(*arguments, "--json")
        assert code in (0, 1), err
        result: dict[str, Any] = json.loads(out)
        return result

    def verify(self, proof: str, *arguments: str) -> dict[str, Any]:
        code, out, err = self("verify", proof, *arguments, "--json")
        assert code in (0, 1), err
        result: dict[str, Any] = json.loads(out)
        assert result["valid"] == (code == 0)
        return result


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> Cli:
    return Cli(monkeypatch, capsys)
