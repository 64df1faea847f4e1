"""Every way to alter a proof file, named after the attack; all must be called invalid (exit code 1)."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from cli.verify import command
from mamba_int.errors import MambaintError
from mamba_int.files import canonical_json
from tests.zk.conftest import Honest, tiny_witness
from zk.field import HALF, PRIME
from zk.proof import MAX_FILE_BYTES
from zk.prove import prove
from zk.verify import Verdict, check, verify


def judged(honest: Honest, raw: bytes, expected_model_id: str | None = None) -> Verdict:
    digest = hashlib.sha256(honest.package_bytes).hexdigest()
    return check(raw, honest.package, digest, expected_model_id)


def altered(honest: Honest, **changes: Any) -> bytes:
    """The honest file with fields replaced, in canonical form: only the alteration itself is wrong."""
    return canonical_json({**json.loads(honest.result.file), **changes}) + b"\n"


def refused(honest: Honest, raw: bytes, because: str) -> None:
    verdict = judged(honest, raw)
    assert not verdict.valid
    assert because in verdict.reason
    assert "\n" not in verdict.reason
    assert verdict.public == {}


def test_the_unaltered_file_is_accepted(honest: Honest) -> None:
    assert altered(honest) == honest.result.file
    assert judged(honest, honest.result.file).valid


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
    refused(honest, raw, because)


def test_true_in_place_of_one_is_not_the_same_statement(honest: Honest) -> None:
    result = prove(honest.circuit, tiny_witness((1, 0, 0)), honest.keys, honest.package_bytes)
    assert b'"logits":[2,0,0]' in result.file
    refused(honest, result.file.replace(b"[2,0,0]", b"[2,0,false]"), "not an integer")


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
    refused(honest, altered(honest, public=public), because)


@pytest.mark.parametrize(
    ("field", "value", "because"),
    [
        ("format", "mambaint-verifier", "not a proof file"),
        ("version", 0, "version 0"),
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
    refused(honest, altered(honest, **{field: value}), because)


@pytest.mark.parametrize(
    "field", ["format", "version", "model_id", "circuit_id", "verifier_package", "public", "segments"]
)
def test_missing_fields(honest: Honest, field: str) -> None:
    content = json.loads(honest.result.file)
    del content[field]
    assert not judged(honest, canonical_json(content) + b"\n").valid


def proof_bytes(honest: Honest) -> bytes:
    return bytes.fromhex(json.loads(honest.result.file)["segments"][0]["proof"])


def test_two_segments_where_one_belongs(honest: Honest) -> None:
    segment = {"proof": proof_bytes(honest).hex()}
    refused(honest, altered(honest, segments=[segment, segment]), "exactly one segment")


def test_truncated_proof_bytes(honest: Honest) -> None:
    raw = altered(honest, segments=[{"proof": proof_bytes(honest)[:-64].hex()}])
    refused(honest, raw, "2496 bytes and must have 2560")


def test_trailing_bytes_that_ezkl_would_ignore(honest: Honest) -> None:
    raw = altered(honest, segments=[{"proof": proof_bytes(honest).hex() + "00" * 64}])
    refused(honest, raw, "2624 bytes and must have 2560")


def test_every_32_byte_word_of_the_proof_matters(honest: Honest) -> None:
    proof = proof_bytes(honest)
    for position in range(5, len(proof), 32):
        flipped = bytearray(proof)
        flipped[position] ^= 1 << (position % 8)
        refused(honest, altered(honest, segments=[{"proof": flipped.hex()}]), "does not verify")


def test_constant_proof_bytes(honest: Honest) -> None:
    for filler in (b"\x00", b"\xff"):
        raw = altered(honest, segments=[{"proof": (filler * 2560).hex()}])
        refused(honest, raw, "does not verify")


def test_proof_of_another_model(honest: Honest, other: Honest) -> None:
    refused(honest, other.result.file, "about model")


def test_proof_of_another_model_relabelled(honest: Honest, other: Honest) -> None:
    theirs = json.loads(other.result.file)
    raw = altered(honest, public=theirs["public"], segments=theirs["segments"])
    assert theirs["public"] != {"logits": [2, -21, 20]}
    refused(honest, raw, "does not verify")


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
    verdict = judged(honest, honest.result.file, "1" * 64)
    assert not verdict.valid
    assert "not " + "1" * 64 in verdict.reason


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"\n", b""),
        (b"\n", b"\n\n"),
        (b"\n", b"\r\n"),
        (b":[2,-21,20]", b": [2,-21,20]"),
        (b"[2,-21,20]", b"[2,-21,2e1]"),
        (b"[2,-21,20]", b"[2,-21,1e999]"),
        (b"[2,-21,20]", b"[2,-21,20,]"),
        (b"[2,-21,20]", b"[02,-21,20]"),
        (b'"logits"', b'"\\u006cogits"'),
        (b'"version":1', b'"version":1,"version":1'),
        (b'{"logits":[2,-21,20]}', b'{"logits":[2,-21,20],"logits":[2,-21,20]}'),
        (b'{"logits":[2,-21,20]}', b'{"logits":[2,-21,NaN]}'),
        (b"{", b"\xef\xbb\xbf{"),
        (b"{", b"[" * 100000 + b"{"),
        (b'"logits"', b'"\xff"'),
    ],
)
def test_other_spellings_of_the_same_file(honest: Honest, old: bytes, new: bytes) -> None:
    raw = honest.result.file.replace(old, new, 1)
    assert raw != honest.result.file
    refused(honest, raw, "")


def test_minus_zero_is_not_zero(honest: Honest) -> None:
    result = prove(honest.circuit, tiny_witness((1, 0, 0)), honest.keys, honest.package_bytes)
    refused(honest, result.file.replace(b"[2,0,0]", b"[2,-0,0]"), "canonical")


def test_reordered_fields(honest: Honest) -> None:
    content = json.loads(honest.result.file)
    raw = json.dumps(dict(reversed(content.items())), separators=(",", ":")).encode() + b"\n"
    refused(honest, raw, "canonical")


def test_huge_file(honest: Honest, tmp_path: Path) -> None:
    path = tmp_path / "huge.json"
    with path.open("wb") as stream:
        stream.truncate(MAX_FILE_BYTES + 2)
    verdict = verify(path, honest.package_path)
    assert not verdict.valid
    assert "more than" in verdict.reason


@pytest.mark.parametrize("raw", [b"", b"null", b"[]", b"1", b"{}", b"PK\x03\x04", b'{"format":'])
def test_not_a_proof_at_all(honest: Honest, raw: bytes) -> None:
    refused(honest, raw, "")


def test_command_says_invalid_with_exit_code_1(honest: Honest, tmp_path: Path) -> None:
    bad = tmp_path / "proof.json"
    bad.write_bytes(altered(honest, public={"logits": [2, -21, 21]}))
    arguments = [str(bad), "--verifier", str(honest.package_path)]
    shown = CliRunner().invoke(command, arguments)
    assert shown.exit_code == 1
    assert shown.output.startswith("INVALID: the proof does not verify")
    as_json = CliRunner().invoke(command, [*arguments, "--json"])
    assert as_json.exit_code == 1
    answer = json.loads(as_json.output)
    assert (answer["valid"], answer["outputs"], answer["public"]) == (False, [], {})
    assert "does not verify" in answer["reason"]


def test_missing_files_are_not_a_verdict(honest: Honest, tmp_path: Path) -> None:
    with pytest.raises(MambaintError, match="cannot read the proof"):
        verify(tmp_path / "none.json", honest.package_path)
    with pytest.raises(MambaintError, match="cannot read the proof"):
        verify(tmp_path, honest.package_path)
    with pytest.raises(MambaintError, match="cannot read the verifier package"):
        verify(honest.proof_path, tmp_path / "none.zip")


def test_only_true_itself_is_acceptance(honest: Honest, monkeypatch: pytest.MonkeyPatch) -> None:
    import ezkl

    for answer in (1, "True", None, [True], False):
        monkeypatch.setattr(ezkl, "verify", lambda *_, answer=answer, **__: answer)
        refused(honest, honest.result.file, "does not verify")


def test_a_panic_inside_ezkl_is_a_rejection(honest: Honest, monkeypatch: pytest.MonkeyPatch) -> None:
    import ezkl

    class Panic(BaseException):
        """As pyo3's PanicException: not an Exception."""

    def panic(*_: Any, **__: Any) -> None:
        raise Panic("index out of\nbounds")

    monkeypatch.setattr(ezkl, "verify", panic)
    refused(honest, honest.result.file, "index out of bounds")


def test_an_interrupt_is_not_a_rejection(honest: Honest, monkeypatch: pytest.MonkeyPatch) -> None:
    import ezkl

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ezkl, "verify", interrupt)
    with pytest.raises(KeyboardInterrupt):
        judged(honest, honest.result.file)


def test_other_ezkl_version_refuses_to_judge(honest: Honest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zk.ezkl_calls.version", lambda _: "24.0.0")
    with pytest.raises(MambaintError, match=r"needs EZKL 23\.0\.5 and 24\.0\.0 is installed"):
        judged(honest, honest.result.file)
