"""``mambaint verify`` as a user runs it, and what it must say to an attacker."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

from cli.main import main
from tests.zk.conftest import Honest


@dataclass(frozen=True)
class Outcome:
    """What a run of the command left: exit code and both outputs."""

    code: int
    out: str
    err: str


def run_verify(*arguments: str) -> Outcome:
    """:func:`run_command` with ``verify``."""
    return run_command("verify", *arguments)


def run_command(*arguments: str) -> Outcome:
    """Run the entry point; an exception that would be a traceback passes through."""
    out, err = io.StringIO(), io.StringIO()
    with (
        patch.object(sys, "argv", ["mambaint", *arguments]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as stop:
            code = stop.code
    assert isinstance(code, int)
    return Outcome(code, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def written(proof: bytes, package: bytes) -> Iterator[tuple[str, ...]]:
    """Both files on disk; yields the arguments that name them."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "p.json").write_bytes(proof)
        (folder / "v.zip").write_bytes(package)
        yield (str(folder / "p.json"), "--verifier", str(folder / "v.zip"))


def accepted(proof: bytes, package: bytes) -> bool:
    """Whether the command calls the proof valid; anything but a clean yes or no fails the test."""
    with written(proof, package) as arguments:
        outcome = run_verify(*arguments)
    assert outcome.code in (0, 1) and not outcome.err, outcome
    assert outcome.out.startswith("VALID " if outcome.code == 0 else "INVALID: "), outcome
    return outcome.code == 0


def assert_invalid(proof: bytes, package: bytes, because: str, *options: str) -> None:
    """The command checks the proof and says no: exit code 1, the reason first, no public value."""
    with written(proof, package) as arguments:
        shown = run_verify(*arguments, *options)
        as_json = run_verify(*arguments, *options, "--json")
    assert (shown.code, as_json.code) == (1, 1), shown
    assert (shown.err, as_json.err) == ("", "")
    answer = json.loads(as_json.out)
    assert because in answer["reason"]
    assert answer["reason"].isprintable()
    assert (answer["valid"], answer["outputs"], answer["public"]) == (False, [], {})
    assert answer["commitments"] == {}
    first, *about = shown.out.splitlines()
    assert first == f"INVALID: {answer['reason']}"
    assert [line.split()[0] for line in about] == ["model", "trusted", "note:"]


def assert_unusable(proof: bytes, package: bytes, because: str) -> None:
    """The command cannot check with this package: exit code 2, one line with the reason, nothing else."""
    with written(proof, package) as arguments:
        outcome = run_verify(*arguments)
    assert (outcome.code, outcome.out) == (2, ""), outcome
    assert outcome.err.startswith("mambaint: ") and outcome.err.count("\n") == 1
    assert outcome.err[:-1].isprintable()
    assert because in outcome.err


def assert_refused(honest: Honest, proof: bytes, because: str) -> None:
    """:func:`assert_invalid` against the honest package."""
    assert_invalid(proof, honest.package_bytes, because)
