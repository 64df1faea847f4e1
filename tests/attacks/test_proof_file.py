"""Attacks on the proof file. All go through ``mambaint verify``: exit code 1 and the reason on one line."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mamba_int.errors import MambaintError
from mamba_int.files import canonical_json
from tests.attacks.command import (
    accepted,
    assert_invalid,
    assert_refused,
    assert_unusable,
    run_verify,
    written,
)
from tests.zk.conftest import Honest, run_honestly, tiny_circuit, tiny_witness
from zk.field import HALF, PRIME
from zk.proof import MAX_FILE_BYTES
from zk.prove import prove

BASE_FIELD = 21888242871839275222246405745257275088696311157297823662689037894645226208583
"""Order of the field of the curve's coordinates."""


def altered(honest: Honest, **changes: Any) -> bytes:
    """The honest file with fields replaced, in canonical form: only the alteration itself is wrong."""
    return canonical_json({**json.loads(honest.result.file), **changes}) + b"\n"


def test_the_unaltered_file_is_accepted(honest: Honest) -> None:
    assert altered(honest) == honest.result.file
    assert accepted(honest.result.file, honest.package_bytes)


@pytest.mark.parametrize(
    ("values", "because"),
    [
        ([2, -21, 21], "does not verify"),
        ([-21, 2, 20], "does not verify"),
        ([-2, 21, -20], "does not verify"),
        ([2, -21], "has 2 numbers and must have 3"),
        ([2, -21, 20, 0], "has 4 numbers and must have 3"),
        ([], "has 0 numbers and must have 3"),
        ([2, -21, True], "not an integer"),
        ([2, -21, 20.0], "not an integer"),
        ([2, -21, "20"], "not an integer"),
        ([2, -21, None], "not an integer"),
        ([2, -21, [20]], "not an integer"),
        ([2, -21, 20 + PRIME], "outside the field"),
        ([2, -21 + PRIME, 20], "outside the field"),
        ([2 - PRIME, -21, 20], "outside the field"),
        ([2, -21, HALF + 1], "outside the field"),
        ([2, -21, 10**5000], "not valid JSON"),
        ("2,-21,20", "is not a list"),
        ({"0": 2}, "is not a list"),
    ],
)
def test_altered_public_values(honest: Honest, values: Any, because: str) -> None:
    if values == [2, -21, 10**5000]:
        # Python itself refuses to write such a number.
        raw = honest.result.file.replace(b"[2,-21,20]", b"[2,-21,1" + b"0" * 5000 + b"]")
    else:
        raw = altered(honest, public={"logits": values})
    assert_refused(honest, raw, because)


def test_true_in_place_of_one_is_not_the_same_statement(honest: Honest) -> None:
    result = prove(honest.circuit, tiny_witness((1, 0, 0)), honest.keys, honest.package_bytes)
    assert b'"logits":[2,0,0]' in result.file
    assert_refused(honest, result.file.replace(b"[2,0,0]", b"[2,0,false]"), "not an integer")


@pytest.mark.parametrize(
    ("public", "because"),
    [
        ({}, "logits is missing"),
        ({"logits": [2, -21, 20], "anchor": [0]}, "unknown public value 'anchor'"),
        ({"logits": [2, -21, 20], "extra": []}, "unknown public value 'extra'"),
        ({"Logits": [2, -21, 20]}, "missing"),
        ([[2, -21, 20]], "not an object"),
    ],
)
def test_missing_and_extra_public_tensors(honest: Honest, public: Any, because: str) -> None:
    assert_refused(honest, altered(honest, public=public), because)


@pytest.mark.parametrize(
    ("field", "value", "because"),
    [
        ("format", "mambaint-verifier", "not a proof file"),
        ("version", 0, "version 0"),
        ("version", -1, "version -1"),
        ("version", 0.5, "version 0.5"),
        ("version", 2, "version 2"),
        ("version", True, "version True"),
        ("version", 1.0, "version 1.0"),
        ("version", "1", "version '1'"),
        ("model_id", "0" * 64, "about model"),
        ("model_id", "0" * 63, "not a SHA-256"),
        ("model_id", None, "not a SHA-256"),
        ("circuit_id", "0" * 64, "another circuit"),
        ("circuit_id", 7, "not a SHA-256"),
        ("verifier_package", "0" * 64, "made for verifier package"),
        ("verifier_package", "G" * 64, "not a SHA-256"),
        ("segments", [], "exactly one segment"),
        ("segments", {}, "exactly one segment"),
        ("segments", ["00"], "wrong fields"),
        ("segments", [{"proof": "00", "more": 1}], "wrong fields"),
        ("segments", [{"proof": "0g"}], "hexadecimal"),
        ("segments", [{"proof": "AB"}], "hexadecimal"),
        ("segments", [{"proof": "abc"}], "hexadecimal"),
        ("segments", [{"proof": ""}], "0 bytes"),
        ("comment", "hello", "unknown field 'comment'"),
        ("\u202e\n", 1, "unknown field '\\u202e\\n'"),
    ],
)
def test_altered_fields(honest: Honest, field: str, value: Any, because: str) -> None:
    assert_refused(honest, altered(honest, **{field: value}), because)


@pytest.mark.parametrize(
    "field", ["format", "version", "model_id", "circuit_id", "verifier_package", "public", "segments"]
)
def test_missing_fields(honest: Honest, field: str) -> None:
    content = json.loads(honest.result.file)
    del content[field]
    assert_refused(
        honest, canonical_json(content) + b"\n", "not a proof file" if field == "format" else field
    )


def proof_bytes(honest: Honest) -> bytes:
    return bytes.fromhex(json.loads(honest.result.file)["segments"][0]["proof"])


def test_two_segments_where_one_belongs(honest: Honest) -> None:
    segment = {"proof": proof_bytes(honest).hex()}
    assert_refused(honest, altered(honest, segments=[segment, segment]), "exactly one segment")


@pytest.mark.parametrize("removed", [1, 32, 64])
def test_truncated_proof_bytes(honest: Honest, removed: int) -> None:
    proof = proof_bytes(honest)
    expected = f"{len(proof) - removed} bytes and must have {len(proof)}"
    for shorter in (proof[:-removed], proof[removed:]):
        assert_refused(honest, altered(honest, segments=[{"proof": shorter.hex()}]), expected)


@pytest.mark.parametrize("added", [1, 32, 64])
def test_trailing_bytes_that_ezkl_would_ignore(honest: Honest, added: int) -> None:
    proof = proof_bytes(honest)
    raw = altered(honest, segments=[{"proof": proof.hex() + "00" * added}])
    assert_refused(honest, raw, f"{len(proof) + added} bytes and must have {len(proof)}")


def test_every_32_byte_word_of_the_proof_matters(honest: Honest) -> None:
    proof = proof_bytes(honest)
    for position in range(5, len(proof), 32):
        flipped = bytearray(proof)
        flipped[position] ^= 1 << (position % 8)
        assert not accepted(altered(honest, segments=[{"proof": flipped.hex()}]), honest.package_bytes)


@pytest.mark.parametrize("order", [PRIME, BASE_FIELD], ids=["scalar", "coordinate"])
def test_non_canonical_field_element_in_the_proof(honest: Honest, order: int) -> None:
    # The same element once more, plus the order of its field: another spelling of the same proof.
    proof = proof_bytes(honest)
    respelled = 0
    for start in range(0, len(proof), 32):
        value = int.from_bytes(proof[start : start + 32], "little") + order
        if value < 1 << 256:
            words = proof[:start] + value.to_bytes(32, "little") + proof[start + 32 :]
            assert not accepted(altered(honest, segments=[{"proof": words.hex()}]), honest.package_bytes)
            respelled += 1
    assert respelled > len(proof) // 64


def test_words_of_the_proof_reordered(honest: Honest) -> None:
    words = [proof_bytes(honest)[start : start + 64] for start in range(0, len(proof_bytes(honest)), 64)]
    for reordered in (words[::-1], words[1:] + words[:1], [words[1], words[0], *words[2:]]):
        raw = altered(honest, segments=[{"proof": b"".join(reordered).hex()}])
        assert_refused(honest, raw, "does not verify")


def test_constant_proof_bytes(honest: Honest) -> None:
    for filler in (b"\x00", b"\xff"):
        raw = altered(honest, segments=[{"proof": (filler * len(proof_bytes(honest))).hex()}])
        assert_refused(honest, raw, "does not verify")


def test_proof_of_another_model(honest: Honest, other: Honest) -> None:
    assert_refused(honest, other.result.file, "about model")


def test_proof_of_another_model_relabelled(honest: Honest, other: Honest) -> None:
    theirs = json.loads(other.result.file)
    raw = altered(honest, public=theirs["public"], segments=theirs["segments"])
    assert theirs["public"] != {"logits": [2, -21, 20]}
    assert_refused(honest, raw, "does not verify")


def test_halves_of_two_true_proofs_joined(honest: Honest, other: Honest) -> None:
    mine, theirs = proof_bytes(honest), proof_bytes(other)
    assert len(mine) == len(theirs)
    for cut in (64, len(mine) // 2, len(mine) - 64):
        raw = altered(honest, segments=[{"proof": (mine[:cut] + theirs[cut:]).hex()}])
        assert_refused(honest, raw, "does not verify")


def test_true_proof_of_another_input_claimed_for_this_answer(honest: Honest) -> None:
    result = prove(honest.circuit, tiny_witness((5, 6, 7)), honest.keys, honest.package_bytes)
    assert accepted(result.file, honest.package_bytes)
    raw = altered(honest, segments=json.loads(result.file)["segments"])
    assert_refused(honest, raw, "does not verify")


def test_proof_made_with_another_srs(honest: Honest, tmp_path: Path) -> None:
    foreign = run_honestly(tiny_circuit(), tiny_witness(), tmp_path / "cache", tmp_path / "run")
    shutil.rmtree(foreign.keys.folder)
    assert foreign.srs.sha256 != honest.srs.sha256
    assert accepted(foreign.result.file, foreign.package_bytes)
    assert_refused(honest, foreign.result.file, "another circuit")
    theirs = json.loads(foreign.result.file)
    raw = altered(honest, public=theirs["public"], segments=theirs["segments"])
    assert_refused(honest, raw, "does not verify")


def test_sibling_circuit_proved_under_the_honest_key(honest: Honest, other: Honest, tmp_path: Path) -> None:
    forged = tmp_path / "forged"
    shutil.copytree(honest.keys.folder, forged)
    shutil.copy(other.keys.folder / "model.ezkl", forged / "model.ezkl")
    keys = dataclasses.replace(honest.keys, folder=forged)
    try:
        with pytest.raises(MambaintError, match="is not valid and was discarded"):
            prove(honest.circuit, other.witness, keys, honest.package_bytes, timeout=60)
    finally:
        shutil.rmtree(forged)


def test_proof_for_another_model_than_the_user_wants(honest: Honest) -> None:
    raw, package = honest.result.file, honest.package_bytes
    for wanted in ("1" * 64, honest.circuit.model_id[:63], ""):
        assert_invalid(raw, package, f"not {wanted}", "--model-id", wanted)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"\n", b""),
        (b"\n", b"\n\n"),
        (b"\n", b"\r\n"),
        (b":[2,-21,20]", b": [2,-21,20]"),
        (b"[2,-21,20]", b"[2,-21,2e1]"),
        (b"[2,-21,20]", b"[2,-21,1e999]"),
        (b"[2,-21,20]", b"[2,-21,20e0]"),
        (b"[2,-21,20]", b"[2,-21,20E+0]"),
        (b"[2,-21,20]", b"[2,-21,200e-1]"),
        (b"[2,-21,20]", b"[2,-21,20.0]"),
        (b"[2,-21,20]", b"[2,-21,+20]"),
        (b"[2,-21,20]", b"[2,-21,0x14]"),
        (b"[2,-21,20]", b"[2,-21,2_0]"),
        (b"[2,-21,20]", "[2,-21,２０]".encode()),
        (b"[2,-21,20]", b"[2,-21,20,]"),
        (b"[2,-21,20]", b"[02,-21,20]"),
        (b'"logits"', b'"\\u006cogits"'),
        (b'"version":1', b'"version":1,"version":1'),
        (b'{"logits":[2,-21,20]}', b'{"logits":[2,-21,20],"logits":[2,-21,20]}'),
        (b'{"logits":[2,-21,20]}', b'{"logits":[2,-21,21],"logits":[2,-21,20]}'),
        (b'{"logits":[2,-21,20]}', b'{"logits":[2,-21,20],"\\u006cogits":[2,-21,21]}'),
        (b'{"logits":[2,-21,20]}', b'{"logits":[2,-21,NaN]}'),
        (b'{"logits":[2,-21,20]}', b'{"logits":[2,-21,Infinity]}'),
        (b'{"logits":[2,-21,20]}', b'{"logits":[2,-21,-Infinity]}'),
        (b"{", b"\xef\xbb\xbf{"),
        (b"{", b"[" * 100000 + b"{"),
        (b'"logits"', b'"\xff"'),
    ],
)
def test_other_spellings_of_the_same_file(honest: Honest, old: bytes, new: bytes) -> None:
    raw = honest.result.file.replace(old, new, 1)
    assert raw != honest.result.file
    assert_refused(honest, raw, "")


def test_minus_zero_is_not_zero(honest: Honest) -> None:
    result = prove(honest.circuit, tiny_witness((1, 0, 0)), honest.keys, honest.package_bytes)
    assert_refused(honest, result.file.replace(b"[2,0,0]", b"[2,-0,0]"), "canonical")


def test_reordered_fields(honest: Honest) -> None:
    content = json.loads(honest.result.file)
    raw = json.dumps(dict(reversed(content.items())), separators=(",", ":")).encode() + b"\n"
    assert_refused(honest, raw, "canonical")


def test_huge_file(honest: Honest, tmp_path: Path) -> None:
    path = tmp_path / "huge.json"
    with path.open("wb") as stream:
        stream.truncate(MAX_FILE_BYTES + 2)
    outcome = run_verify(str(path), "--verifier", str(honest.package_path))
    assert outcome.code == 1 and outcome.out.startswith("INVALID: the file has more than")


@pytest.mark.parametrize("inside", ["numbers", "proof", "names"])
def test_file_longer_than_any_proof_of_this_circuit_is_not_parsed(honest: Honest, inside: str) -> None:
    changes: dict[str, dict[str, Any]] = {
        "numbers": {"public": {"logits": [1] * 100_000}},
        "proof": {"segments": [{"proof": "00" * 100_000}]},
        "names": {"x" * 100_000: 1},
    }
    assert_refused(honest, altered(honest, **changes[inside]), "the file has more than")


def test_long_values_are_not_quoted_whole(honest: Honest) -> None:
    for changes in ({"version": "v" * 60_000}, {"f" * 60_000: 1}, {"public": {"n" * 60_000: 1}}):
        with written(altered(honest, **changes), honest.package_bytes) as arguments:
            outcome = run_verify(*arguments)
        assert outcome.code == 1
        assert len(outcome.out.splitlines()[0]) < 600


@pytest.mark.parametrize("raw", [b"", b"null", b"[]", b"1", b"{}", b"PK\x03\x04", b'{"format":'])
def test_not_a_proof_at_all(honest: Honest, raw: bytes) -> None:
    assert_refused(honest, raw, "")


def test_missing_files_are_not_a_verdict(honest: Honest, tmp_path: Path) -> None:
    package, none = str(honest.package_path), tmp_path / "none"
    for arguments, because in (
        ((str(none), "--verifier", package), "cannot read the proof"),
        ((str(tmp_path), "--verifier", package), "cannot read the proof"),
        ((str(honest.proof_path), "--verifier", str(none)), "cannot read the verifier package"),
        ((str(honest.proof_path), "--verifier", str(tmp_path)), "cannot read the verifier package"),
    ):
        outcome = run_verify(*arguments)
        assert (outcome.code, outcome.out) == (2, "")
        assert because in outcome.err and outcome.err.count("\n") == 1


def test_verdict_is_the_exit_code_of_the_process(honest: Honest) -> None:
    forged = altered(honest, public={"logits": [2, -21, 21]})
    runs = (
        (honest.result.file, honest.package_bytes, 0),
        (forged, honest.package_bytes, 1),
        (honest.result.file, honest.package_bytes[:-1], 2),
    )
    for proof, package, code in runs:
        with written(proof, package) as arguments:
            command = [sys.executable, "-m", "cli.main", "verify", *arguments]
            done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == code
        assert "Traceback" not in done.stdout + done.stderr
        assert done.stderr.count("\n") == (code == 2)


def test_only_true_itself_is_acceptance(honest: Honest, monkeypatch: pytest.MonkeyPatch) -> None:
    import ezkl

    for answer in (1, "True", None, [True], False):
        monkeypatch.setattr(ezkl, "verify", lambda *_, answer=answer, **__: answer)
        assert_refused(honest, honest.result.file, "does not verify")


def test_a_panic_inside_ezkl_is_a_rejection(honest: Honest, monkeypatch: pytest.MonkeyPatch) -> None:
    import ezkl

    class Panic(BaseException):
        """As pyo3's PanicException: not an Exception."""

    def panic(*_: Any, **__: Any) -> None:
        raise Panic("index out of\nbounds")

    monkeypatch.setattr(ezkl, "verify", panic)
    assert_refused(honest, honest.result.file, "index out of bounds")


def test_an_interrupt_is_not_a_rejection(honest: Honest, monkeypatch: pytest.MonkeyPatch) -> None:
    import ezkl

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ezkl, "verify", interrupt)
    outcome = run_verify(str(honest.proof_path))
    assert (outcome.code, outcome.out) == (2, "")
    assert "interrupted" in outcome.err


def test_other_ezkl_version_refuses_to_judge(honest: Honest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zk.ezkl_calls.version", lambda _: "24.0.0")
    needed = f"needs EZKL {honest.package.ezkl_version} and 24.0.0 is installed"
    assert_unusable(honest.result.file, honest.package_bytes, needed)
