"""Attacks on the verifier package. All go through ``mambaint verify``.

A package that is not exactly what we write cannot be used (exit 2). One that is well-formed but of other
content, which the user was tricked into trusting, must not make a proof of something else valid (exit 1).
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import stat
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import ezkl
import pytest

from mamba_int.errors import MambaintError
from mamba_int.files import canonical_json
from tests.attacks.command import accepted, assert_invalid, assert_unusable, run_verify, written
from tests.attacks.mutating import unzipped, zipped
from tests.zk.conftest import LOGROWS, Honest
from zk.package import MAX_PACKAGE_BYTES, Package
from zk.srs_format import verifying_part


def members(honest: Honest) -> dict[str, bytes]:
    return unzipped(honest.package_bytes)


def with_card(honest: Honest, **changes: Any) -> bytes:
    content = members(honest)
    card = {**json.loads(content["card.json"]), **changes}
    return zipped({**content, "card.json": canonical_json(card)})


def refused(honest: Honest, raw: bytes, because: str) -> None:
    assert raw != honest.package_bytes
    assert_unusable(honest.result.file, raw, because)


def tricked(honest: Honest, package: Package) -> tuple[bytes, bytes]:
    """The honest proof, relabelled for a self-consistent package that the user was tricked into trusting."""
    raw = package.encode()
    digest = hashlib.sha256(raw).hexdigest()
    return canonical_json({**json.loads(honest.result.file), "verifier_package": digest}) + b"\n", raw


def test_the_unaltered_package_is_accepted(honest: Honest) -> None:
    assert zipped(members(honest)) == honest.package_bytes
    assert with_card(honest) == honest.package_bytes
    assert accepted(*tricked(honest, honest.package))


def test_swapped_verifying_key(honest: Honest, other: Honest) -> None:
    assert other.package.vk != honest.package.vk
    refused(honest, zipped({**members(honest), "vk.key": other.package.vk}), "vk.key is not the one")
    swapped = dataclasses.replace(honest.package, vk=other.package.vk)
    assert_invalid(*tricked(honest, swapped), "does not verify")
    assert_invalid(honest.result.file, swapped.encode(), "made for verifier package")


def test_flipped_and_truncated_verifying_key_in_a_consistent_package(honest: Honest) -> None:
    vk = honest.package.vk
    assert accepted(*tricked(honest, honest.package))
    # Behind the commitments lie 14 selector bitmaps, which EZKL reads without binding them: only the hash
    # of the package protects those, and nothing a proof says depends on them.
    commitments = len(vk) - 14 * (1 << LOGROWS) // 8
    for position in range(0, commitments, 37):
        flipped = bytearray(vk)
        flipped[position] ^= 0x10
        assert not accepted(*tricked(honest, dataclasses.replace(honest.package, vk=bytes(flipped))))
    for kept in (0, 4, 100, len(vk) - 1):
        assert not accepted(*tricked(honest, dataclasses.replace(honest.package, vk=vk[:kept])))


def test_other_srs(honest: Honest, tmp_path: Path) -> None:
    ezkl.gen_srs(str(tmp_path / "other.srs"), LOGROWS)
    other_srs = verifying_part(tmp_path / "other.srs", LOGROWS)
    refused(honest, zipped({**members(honest), "verifying.srs": other_srs}), "verifying.srs is not the one")
    swapped = dataclasses.replace(honest.package, verifying_srs=other_srs)
    assert_invalid(*tricked(honest, swapped), "does not verify")


def test_package_of_another_model_of_the_same_shape(honest: Honest, other: Honest) -> None:
    assert_invalid(honest.result.file, other.package_bytes, "about model")
    theirs = dataclasses.replace(
        other.package, model_id=honest.package.model_id, circuit_id=honest.package.circuit_id
    )
    assert_invalid(*tricked(honest, theirs), "does not verify")


def test_other_settings_of_the_same_shape(honest: Honest) -> None:
    # EZKL would accept the honest proof under these: they are pinned by the package's hash alone.
    rows = json.loads(honest.package.settings)["num_rows"]
    settings = honest.package.settings.replace(b'"num_rows":%d' % rows, b'"num_rows":%d' % (rows + 1))
    assert settings != honest.package.settings
    refused(honest, zipped({**members(honest), "settings.json": settings}), "settings.json is not the one")
    swapped = dataclasses.replace(honest.package, settings=settings)
    assert_invalid(honest.result.file, swapped.encode(), "made for verifier package")


def test_same_checksum_but_other_bytes(honest: Honest) -> None:
    # The pattern of CRC-32's own polynomial changes no CRC-32, so the zip stays intact.
    bits = f"{0x104C11DB7:033b}".ljust(40, "0")
    pattern = bytes(int(bits[start : start + 8][::-1], 2) for start in range(0, 40, 8))
    for name in ("vk.key", "settings.json", "verifying.srs"):
        content = bytearray(members(honest)[name])
        for i, byte in enumerate(pattern):
            content[100 + i] ^= byte
        assert zlib.crc32(content) == zlib.crc32(members(honest)[name])
        refused(honest, zipped({**members(honest), name: bytes(content)}), f"{name} is not the one")


def test_proof_for_another_package_of_the_same_keys(honest: Honest) -> None:
    raw = honest.keys.package({"task": "something else"}).encode()
    assert_invalid(honest.result.file, raw, "made for verifier package")


def test_package_of_an_older_ezkl(honest: Honest) -> None:
    current = honest.package.ezkl_version
    settings = honest.package.settings.replace(f'"{current}"'.encode(), b'"22.0.0"')
    downgraded = dataclasses.replace(honest.package, ezkl_version="22.0.0", settings=settings)
    proof, raw = tricked(honest, downgraded)
    assert_unusable(proof, raw, f"needs EZKL 22.0.0 and {current} is installed")


@pytest.mark.parametrize(
    ("old", "new", "because"),
    [
        (b'"disable_freivalds":true', b'"disable_freivalds":false', "disable_freivalds"),
        (b'"param_visibility":"Fixed"', b'"param_visibility":"Private"', "param_visibility"),
        (b'"model_instance_shapes":[[3],[1]]', b'"model_instance_shapes":[[1],[3]]', "model_instance_shapes"),
        (b'"logrows":8', b'"logrows":9', "logrows"),
        (b'"version":"', b'"version":"0', "version"),
        (b'"timestamp":0', b'"timestamp": 0', "canonical"),
        (b'"timestamp":0', b'"timestamp":0,"timestamp":0', "duplicate key"),
    ],
)
def test_unsound_settings_in_a_consistent_package(
    honest: Honest, old: bytes, new: bytes, because: str
) -> None:
    settings = honest.package.settings.replace(old, new)
    assert settings != honest.package.settings
    refused(honest, dataclasses.replace(honest.package, settings=settings).encode(), because)


NO_CHALLENGE = {"name": "x", "shape": [1], "forced": None, "challenge": False}


@pytest.mark.parametrize(
    ("field", "value", "because"),
    [
        ("format", "mambaint-proof", "not a verifier package"),
        ("version", 0, "format version 0"),
        ("version", 1, "format version 1"),
        ("version", True, "format version True"),
        ("mambaint", "", "mambaint is not a version"),
        ("ezkl", 23, "ezkl is not a version"),
        ("ezkl", "\x1b[2J", "ezkl is not a version"),
        ("model_id", "A" * 64, "model_id is not a SHA-256"),
        ("circuit_id", None, "circuit_id is not a SHA-256"),
        ("logrows", True, "logrows is not a size"),
        ("logrows", 9, "another number of rows"),
        ("proof_bytes", 0, "proof_bytes is not a size"),
        ("proof_bytes", 2560.0, "proof_bytes is not a size"),
        ("proof_bytes", 1 << 40, "proof_bytes is not a size"),
        ("statement", [], "statement is not an object"),
        ("settings_sha256", "0" * 64, "settings.json is not the one"),
        ("vk_sha256", "0" * 64, "vk.key is not the one"),
        ("srs", {}, "srs has wrong fields"),
        ("public", [], "public is not a list"),
        ("public", [{"name": "x", "shape": [3]}], "wrong fields"),
        ("public", [{"name": "", "shape": [3], "forced": None, "challenge": False}], "no proper name"),
        (
            "public",
            [{**NO_CHALLENGE, "shape": [True]}],
            "not a list of sizes",
        ),
        (
            "public",
            [{**NO_CHALLENGE, "shape": [1 << 21, 1 << 21]}],
            "too many",
        ),
        ("public", [{"name": "x", "shape": [3], "forced": False, "challenge": False}], "forced value"),
        ("public", [{"name": "x", "shape": [3], "forced": 1 << 254, "challenge": False}], "forced value"),
        ("public", [{"name": "x", "shape": [2], "forced": None, "challenge": False}] * 2, "share a name"),
        (
            "public",
            [{**NO_CHALLENGE, "name": "logits", "shape": [4]}],
            "model_instance_shapes",
        ),
        ("public", [{**NO_CHALLENGE, "challenge": 1}], "wrongly marked as the challenge"),
        ("public", [{**NO_CHALLENGE, "shape": [2], "challenge": True}], "wrongly marked as the challenge"),
        ("public", [{**NO_CHALLENGE, "forced": 0, "challenge": True}], "wrongly marked as the challenge"),
        ("public", [{**NO_CHALLENGE, "challenge": True}], "not derived from commitments"),
        ("committed", [["witness", 0]], "not a name and a size"),
        ("committed", [["witness", 3], ["witness", 3]], "share a name"),
        ("committed", [["challenge", 2]], "not derived from commitments"),
        ("committed", [[f"witness{i}", 3] for i in range(50)], "cannot hold its commitments"),
        ("committed", [["witness", 3]], "input_visibility"),
        ("note", "hello", "missing or unknown fields"),
    ],
)
def test_altered_card(honest: Honest, field: str, value: Any, because: str) -> None:
    refused(honest, with_card(honest, **{field: value}), because)


@pytest.mark.parametrize(
    ("old", "new", "because"),
    [
        (b'"version":2', b'"version": 2', "canonical"),
        (b'"version":2', b'"version":2e0', "format version 2.0"),
        (b'"version":2', b'"version":2,"version":2', "duplicate key"),
        (b'"version":2', b'"version":0,"\\u0076ersion":1', "duplicate key"),
        (b'"task":"toy"', b'"task":"\\u0074oy"', "canonical"),
        (b'"task":"toy"', b'"task":-0', "canonical"),
        (b'"task":"toy"', b'"task":NaN', "not a JSON number"),
        (b'"task":"toy"', b'"task":1.50', "canonical"),
        (b'"task":"toy"', b'"task":' + b"9" * 5000, "not valid JSON"),
        (b'"task":"toy"', b'"task":"\xff"', "not valid JSON"),
        (b'"forced":null', b'"forced":-0', "canonical"),
        (b"{", b"\xef\xbb\xbf{", "not valid JSON"),
        (b"{", b"\n{", "canonical"),
    ],
)
def test_other_spellings_of_the_card(honest: Honest, old: bytes, new: bytes, because: str) -> None:
    content = members(honest)
    card = content["card.json"].replace(old, new, 1)
    assert card != content["card.json"]
    refused(honest, zipped({**content, "card.json": card}), because)


@pytest.mark.parametrize("member", ["card.json", "settings.json"])
def test_number_that_overflows_to_infinity(honest: Honest, member: str) -> None:
    if member == "card.json":
        content = members(honest)
        card = content[member].replace(b'"task":"toy"', b'"task":1e999')
        assert card != content[member]
        refused(honest, zipped({**content, member: card}), "beyond any float")
    else:
        settings = honest.package.settings.replace(b'"epsilon":2.220446049250313e-16', b'"epsilon":1e999')
        assert settings != honest.package.settings
        package = dataclasses.replace(honest.package, settings=settings)
        refused(honest, package.encode(), "beyond any float")


@pytest.mark.parametrize(
    ("field", "value", "because"),
    [
        ("kind", "trusted", "kind of the SRS"),
        ("kind", ["ceremony"], "kind of the SRS"),
        ("sha256", "x", "SHA-256 of the SRS"),
        ("logrows", 8.0, "another number of rows"),
        ("verifying_sha256", "0" * 64, "verifying.srs is not the one"),
    ],
)
def test_altered_srs_identity(honest: Honest, field: str, value: Any, because: str) -> None:
    srs = json.loads(members(honest)["card.json"])["srs"]
    refused(honest, with_card(honest, srs={**srs, field: value}), because)


def test_public_tensors_reordered_or_unforced(honest: Honest) -> None:
    """A card that lies about the circuit's outputs makes honest proofs fail, never others pass."""
    logits, anchor = honest.package.public
    unforced = dataclasses.replace(honest.package, public=(logits, dataclasses.replace(anchor, forced=None)))
    assert_invalid(*tricked(honest, unforced), "anchor is missing")
    forced = dataclasses.replace(honest.package, public=(logits, dataclasses.replace(anchor, forced=1)))
    assert_invalid(*tricked(honest, forced), "does not verify")
    reordered = dataclasses.replace(honest.package, public=(anchor, logits))
    refused(honest, reordered.encode(), "model_instance_shapes")


def test_wrong_proof_length_in_the_card(honest: Honest) -> None:
    length = honest.package.proof_bytes
    longer = dataclasses.replace(honest.package, proof_bytes=length + 32)
    assert_invalid(*tricked(honest, longer), f"has {length} bytes and must have {length + 32}")


def test_member_missing(honest: Honest) -> None:
    for name in members(honest):
        refused(
            honest, zipped({n: d for n, d in members(honest).items() if n != name}), "members are not exactly"
        )


TRAVERSALS = [
    "../../etc/passwd",
    "/etc/passwd",
    "..\\x",
    "C:\\x",
    "settings.json/../card.json",
    "./card.json",
]


@pytest.mark.parametrize("name", TRAVERSALS)
def test_member_renamed_to_a_path_elsewhere(honest: Honest, name: str) -> None:
    for replaced in members(honest):
        renamed = {name if n == replaced else n: data for n, data in members(honest).items()}
        refused(honest, zipped(renamed), "members are not exactly")


@pytest.mark.parametrize("name", [*TRAVERSALS, "extra.txt", "card.json/", "", "CARD.JSON"])
def test_extra_member_or_path_traversal(honest: Honest, name: str) -> None:
    refused(honest, zipped({**members(honest), name: b"x"}), "members are not exactly")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_duplicate_member(honest: Honest) -> None:
    buffer = io.BytesIO(honest.package_bytes)
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.writestr("card.json", b"{}")
    refused(honest, buffer.getvalue(), "members are not exactly")


def test_zip_bomb_is_refused_before_it_is_expanded(honest: Honest) -> None:
    content = {**members(honest), "vk.key": bytes(64 << 20)}
    raw = zipped(content, compression=zipfile.ZIP_DEFLATED)
    assert len(raw) < MAX_PACKAGE_BYTES
    refused(honest, raw, "compressed")


def test_member_larger_than_its_limit(honest: Honest) -> None:
    content = {**members(honest), "verifying.srs": bytes(400)}
    refused(honest, zipped(content), "verifying.srs has more than 388 bytes")


def test_package_larger_than_the_limit(honest: Honest, tmp_path: Path) -> None:
    path = tmp_path / "verifier.zip"
    with path.open("wb") as stream:
        stream.truncate(MAX_PACKAGE_BYTES + 100)
    outcome = run_verify(str(honest.proof_path), "--verifier", str(path))
    assert outcome.code == 2 and "more than" in outcome.err and outcome.err.count("\n") == 1


@pytest.mark.parametrize("offset", [1 << 31, (1 << 63) - 1, 1 << 63, (1 << 64) - 1])
def test_member_that_starts_beyond_the_file(honest: Honest, offset: int) -> None:
    raw, name = bytearray(honest.package_bytes), b"card.json"
    entry, end = raw.index(b"PK\x01\x02"), raw.rindex(b"PK\x05\x06")
    extra = struct.pack("<HHQ", 1, 8, offset)
    raw[entry + 30 : entry + 32] = struct.pack("<H", len(extra))
    raw[entry + 42 : entry + 46] = b"\xff" * 4
    size = struct.unpack_from("<L", raw, end + 12)[0]
    raw[end + 12 : end + 16] = struct.pack("<L", size + len(extra))
    raw[entry + 46 + len(name) : entry + 46 + len(name)] = extra
    refused(honest, bytes(raw), "not a zip file")


def test_two_members_in_the_same_place(honest: Honest) -> None:
    raw = bytearray(honest.package_bytes)
    first = raw.index(b"PK\x01\x02")
    second = raw.index(b"PK\x01\x02", first + 4)
    raw[second + 42 : second + 46] = raw[first + 42 : first + 46]
    refused(honest, bytes(raw), "not a zip file")


@pytest.mark.parametrize("member", ["card.json", "settings.json"])
def test_nesting_at_every_depth_around_the_recursion_limit(honest: Honest, member: str) -> None:
    content = members(honest)
    place = {"card.json": b'"task":"toy"', "settings.json": b'"timestamp":0'}[member]
    key = place.split(b":")[0]
    for depth in (100, *range(900, 1000), 50_000):
        nested = content[member].replace(place, key + b":" + b"[" * depth + b"]" * depth)
        assert nested != content[member]
        if member == "card.json":
            raw = zipped({**content, member: nested})
        else:
            raw = dataclasses.replace(honest.package, settings=nested).encode()
        with written(honest.result.file, raw) as arguments:
            outcome = run_verify(*arguments)
        # Not too deep is another package, which the proof does not name.
        assert outcome.code in (1, 2) and len(outcome.out + outcome.err) < 1000


@pytest.mark.parametrize(
    "options",
    [
        {"compression": zipfile.ZIP_DEFLATED},
        {"mode": stat.S_IFLNK | 0o777},
        {"mode": 0o600},
        {"date": (1999, 12, 31, 0, 0, 0)},
        {"comment": b"hello"},
    ],
)
def test_other_zip_metadata(honest: Honest, options: dict[str, Any]) -> None:
    refused(honest, zipped(members(honest), **options), "")


def test_reordered_members(honest: Honest) -> None:
    refused(honest, zipped(dict(reversed(members(honest).items()))), "members are not exactly")


@pytest.mark.parametrize("position", ["before", "after", "truncated"])
def test_bytes_around_the_zip(honest: Honest, position: str) -> None:
    raw = honest.package_bytes
    refused(
        honest, {"before": b"#!/bin/sh\n" + raw, "after": raw + b"\0", "truncated": raw[:-1]}[position], ""
    )


def test_encrypted_member(honest: Honest) -> None:
    raw = bytearray(honest.package_bytes)
    raw[raw.index(b"PK\x01\x02") + 8] |= 1
    refused(honest, bytes(raw), "encrypted")


def test_statement_that_is_not_json(honest: Honest) -> None:
    for statement in ({"x": float("nan")}, {"x": {1, 2}}, {"x": b"bytes"}):
        with pytest.raises(MambaintError, match="is not JSON"):
            honest.keys.package(statement).encode()


def test_oversized_statement_is_refused_when_written(honest: Honest) -> None:
    with pytest.raises(MambaintError, match=r"card\.json of the verifier package has"):
        honest.keys.package({"x": "y" * (1 << 20)}).encode()
