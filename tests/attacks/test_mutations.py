"""12,000 random mutations of both files through ``mambaint verify``: none accepted, no traceback, no hang.

EZKL is replaced by an ideal one that accepts the honest proof and nothing else, so what could be accepted
here is another spelling of it. A fixed sample of what reaches EZKL is then given to the real one.
"""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from types import FrameType
from typing import NoReturn

import pytest

from tests.attacks.command import Outcome, accepted, run_verify, written
from tests.attacks.mutating import (
    Mutation,
    consistent,
    edited_bytes,
    edited_proof,
    respelled,
    respelled_inside,
    rezipped,
)
from tests.zk.conftest import Honest

OF_PROOF: dict[str, tuple[Mutation, int]] = {
    "bytes": (edited_bytes, 2000),
    "content": (edited_proof, 3000),
    "spelling": (respelled, 1000),
}
OF_PACKAGE: dict[str, tuple[Mutation, int]] = {
    "bytes": (edited_bytes, 2000),
    "zip": (rezipped, 1500),
    "content": (consistent, 1500),
    "spelling": (respelled_inside, 1000),
}
SECONDS_EACH = 5
REAL_SAMPLE = 40


class IdealEzkl:
    """Accepts exactly the four files that it was shown first."""

    def __init__(self) -> None:
        self.honest: tuple[bytes, ...] | None = None
        self.calls = 0

    def __call__(self, *files: Path) -> bool:
        content = tuple(file.read_bytes() for file in files)
        self.honest = self.honest or content
        self.calls += 1
        return content == self.honest


@pytest.fixture
def ideal(honest: Honest, monkeypatch: pytest.MonkeyPatch) -> IdealEzkl:
    stand_in = IdealEzkl()
    monkeypatch.setattr("zk.ezkl_calls.verify", stand_in)
    assert accepted(honest.result.file, honest.package_bytes)
    return stand_in


def distinct(mutate: Mutation, raw: bytes, count: int) -> Iterator[tuple[int, bytes]]:
    """That many different files, none of them ``raw``, with their seeds."""
    seen, seed = {raw}, 0
    while len(seen) <= count:
        changed = mutate(Random(seed), raw)
        if changed not in seen:
            seen.add(changed)
            yield seed, changed
        seed += 1
        assert seed < 20 * count, "the mutations repeat themselves"


@contextmanager
def no_hang(what: str) -> Iterator[None]:
    def stop(signum: int, frame: FrameType | None) -> NoReturn:
        raise AssertionError(f"{what} hangs")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS_EACH)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def judged(what: str, proof: bytes, package: bytes) -> Outcome:
    """A clean no: exit code 1 or 2 and one line of reason."""
    try:
        with no_hang(what), written(proof, package) as arguments:
            outcome = run_verify(*arguments)
    except Exception as error:
        raise AssertionError(f"{what} ends in a traceback") from error
    reason = outcome.out.splitlines()[0] if outcome.code == 1 else outcome.err[:-1]
    assert outcome.code in (1, 2), what
    assert reason.startswith("INVALID: " if outcome.code == 1 else "mambaint: "), what
    assert reason.isprintable() and len(reason) < 1000, what
    return outcome


@pytest.mark.parametrize("kind", OF_PROOF)
def test_mutated_proof_file_is_never_accepted(kind: str, honest: Honest, ideal: IdealEzkl) -> None:
    mutate, count = OF_PROOF[kind]
    for seed, proof in distinct(mutate, honest.result.file, count):
        assert judged(f"proof, {kind}, seed {seed}", proof, honest.package_bytes).code == 1


@pytest.mark.parametrize("kind", OF_PACKAGE)
def test_mutated_verifier_package_is_never_accepted(kind: str, honest: Honest, ideal: IdealEzkl) -> None:
    mutate, count = OF_PACKAGE[kind]
    codes: Counter[int] = Counter()
    for seed, package in distinct(mutate, honest.package_bytes, count):
        codes[judged(f"package, {kind}, seed {seed}", honest.result.file, package).code] += 1
    # Some edits of the content leave a well-formed package: another one than the proof names.
    assert (codes[1] > count // 20) == (kind == "content"), codes
    assert ideal.calls == 1, "no other package is given to EZKL with a proof that does not name it"


def test_sample_of_mutated_proofs_that_reach_ezkl_is_rejected_by_ezkl_itself(
    honest: Honest, ideal: IdealEzkl, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample: list[bytes] = []
    for seed, proof in distinct(edited_proof, honest.result.file, 2000):
        before = ideal.calls
        judged(f"seed {seed}", proof, honest.package_bytes)
        if ideal.calls > before:
            sample.append(proof)
        if len(sample) == REAL_SAMPLE:
            break
    assert len(sample) == REAL_SAMPLE
    monkeypatch.undo()
    for proof in sample:
        outcome = judged("EZKL", proof, honest.package_bytes)
        assert outcome.code == 1 and "does not verify" in outcome.out
    assert accepted(honest.result.file, honest.package_bytes)
