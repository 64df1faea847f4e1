"""Every way to alter a verifier package; a strict reader must refuse it (exit code 2) or reject the proof."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import stat
import zipfile
from pathlib import Path
from typing import Any

import ezkl
import pytest
from click.testing import CliRunner

from cli.verify import command
from mamba_int.errors import MambaintError
from mamba_int.files import canonical_json
from tests.zk.conftest import LOGROWS, Honest
from zk.package import MAX_PACKAGE_BYTES, Package, decode_package, read_package
from zk.srs_format import verifying_part
from zk.verify import Verdict, check


def members(honest: Honest) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(honest.package_bytes)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def zipped(content: dict[str, bytes], **options: Any) -> bytes:
    """A zip with our metadata unless ``options`` say otherwise."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in content.items():
            info = zipfile.ZipInfo(name, options.get("date", (1980, 1, 1, 0, 0, 0)))
            info.create_system = 3
            info.external_attr = options.get("mode", 0o644) << 16
            info.compress_type = options.get("compression", zipfile.ZIP_STORED)
            info.comment = options.get("comment", b"")
            archive.writestr(info, data)
    return buffer.getvalue()


def with_card(honest: Honest, **changes: Any) -> bytes:
    content = members(honest)
    card = {**json.loads(content["card.json"]), **changes}
    return zipped({**content, "card.json": canonical_json(card)})


def refused(raw: bytes, because: str) -> None:
    with pytest.raises(MambaintError, match="cannot be used") as caught:
        decode_package(raw, "test")
    assert because in caught.value.cause


def judged_with(honest: Honest, package: Package) -> Verdict:
    """The honest proof, relabelled for a self-consistent package that the user was tricked into trusting."""
    raw = package.encode()
    digest = hashlib.sha256(raw).hexdigest()
    proof = {**json.loads(honest.result.file), "verifier_package": digest}
    return check(canonical_json(proof) + b"\n", decode_package(raw, "test"), digest)


def test_the_unaltered_package_is_accepted(honest: Honest) -> None:
    assert zipped(members(honest)) == honest.package_bytes
    assert with_card(honest) == honest.package_bytes
    assert judged_with(honest, honest.package).valid


def test_swapped_verifying_key(honest: Honest, other: Honest) -> None:
    assert other.package.vk != honest.package.vk
    refused(zipped({**members(honest), "vk.key": other.package.vk}), "vk.key is not the one")
    verdict = judged_with(honest, dataclasses.replace(honest.package, vk=other.package.vk))
    assert not verdict.valid


def test_flipped_and_truncated_verifying_key_in_a_consistent_package(honest: Honest) -> None:
    vk = honest.package.vk
    # Behind the commitments lie 14 selector bitmaps, which EZKL reads without binding them: only the hash
    # of the package protects those, and nothing a proof says depends on them.
    commitments = len(vk) - 14 * (1 << LOGROWS) // 8
    for position in range(0, commitments, 37):
        flipped = bytearray(vk)
        flipped[position] ^= 0x10
        assert not judged_with(honest, dataclasses.replace(honest.package, vk=bytes(flipped))).valid
    for kept in (0, 4, 100, len(vk) - 1):
        assert not judged_with(honest, dataclasses.replace(honest.package, vk=vk[:kept])).valid


def test_other_srs(honest: Honest, tmp_path: Path) -> None:
    ezkl.gen_srs(str(tmp_path / "other.srs"), LOGROWS)
    other_srs = verifying_part(tmp_path / "other.srs", LOGROWS)
    refused(zipped({**members(honest), "verifying.srs": other_srs}), "verifying.srs is not the one")
    verdict = judged_with(honest, dataclasses.replace(honest.package, verifying_srs=other_srs))
    assert not verdict.valid


def test_proof_for_another_package_of_the_same_keys(honest: Honest) -> None:
    raw = honest.keys.package({"task": "something else"}).encode()
    digest = hashlib.sha256(raw).hexdigest()
    verdict = check(honest.result.file, decode_package(raw, "test"), digest)
    assert not verdict.valid
    assert "made for verifier package" in verdict.reason


@pytest.mark.parametrize(
    ("old", "new", "because"),
    [
        (b'"disable_freivalds":true', b'"disable_freivalds":false', "disable_freivalds"),
        (b'"param_visibility":"Fixed"', b'"param_visibility":"Private"', "param_visibility"),
        (b'"model_instance_shapes":[[3],[1]]', b'"model_instance_shapes":[[1],[3]]', "model_instance_shapes"),
        (b'"logrows":8', b'"logrows":9', "logrows"),
        (b'"version":"23.0.5"', b'"version":"23.0.4"', "version"),
        (b'"timestamp":0', b'"timestamp": 0', "canonical"),
        (b'"timestamp":0', b'"timestamp":0,"timestamp":0', "duplicate key"),
    ],
)
def test_unsound_settings_in_a_consistent_package(
    honest: Honest, old: bytes, new: bytes, because: str
) -> None:
    settings = honest.package.settings.replace(old, new)
    assert settings != honest.package.settings
    refused(dataclasses.replace(honest.package, settings=settings).encode(), because)


@pytest.mark.parametrize(
    ("field", "value", "because"),
    [
        ("format", "mambaint-proof", "not a verifier package"),
        ("version", 0, "format version 0"),
        ("version", 2, "format version 2"),
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
        ("public", [{"name": "", "shape": [3], "forced": None}], "no proper name"),
        ("public", [{"name": "x", "shape": [True], "forced": None}], "not a list of sizes"),
        ("public", [{"name": "x", "shape": [1 << 21, 1 << 21], "forced": None}], "too many"),
        ("public", [{"name": "x", "shape": [3], "forced": False}], "forced value"),
        ("public", [{"name": "x", "shape": [3], "forced": 1 << 254}], "forced value"),
        ("public", [{"name": "x", "shape": [2], "forced": None}] * 2, "share a name"),
        ("public", [{"name": "logits", "shape": [4], "forced": None}], "model_instance_shapes"),
        ("note", "hello", "missing or unknown fields"),
    ],
)
def test_altered_card(honest: Honest, field: str, value: Any, because: str) -> None:
    refused(with_card(honest, **{field: value}), because)


@pytest.mark.parametrize("member", ["card.json", "settings.json"])
def test_number_that_overflows_to_infinity(honest: Honest, member: str) -> None:
    if member == "card.json":
        content = members(honest)
        card = content[member].replace(b'"task":"toy"', b'"task":1e999')
        assert card != content[member]
        refused(zipped({**content, member: card}), "beyond any float")
    else:
        settings = honest.package.settings.replace(b'"epsilon":2.220446049250313e-16', b'"epsilon":1e999')
        assert settings != honest.package.settings
        package = dataclasses.replace(honest.package, settings=settings)
        refused(package.encode(), "beyond any float")


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
    refused(with_card(honest, srs={**srs, field: value}), because)


def test_public_tensors_reordered_or_unforced(honest: Honest) -> None:
    """A card that lies about the circuit's outputs makes honest proofs fail, never others pass."""
    logits, anchor = honest.package.public
    unforced = dataclasses.replace(honest.package, public=(logits, dataclasses.replace(anchor, forced=None)))
    assert "anchor is missing" in judged_with(honest, unforced).reason
    forced = dataclasses.replace(honest.package, public=(logits, dataclasses.replace(anchor, forced=1)))
    assert "does not verify" in judged_with(honest, forced).reason


def test_wrong_proof_length_in_the_card(honest: Honest) -> None:
    longer = dataclasses.replace(honest.package, proof_bytes=honest.package.proof_bytes + 32)
    assert "must have 2592" in judged_with(honest, longer).reason


def test_member_missing(honest: Honest) -> None:
    for name in members(honest):
        refused(zipped({n: d for n, d in members(honest).items() if n != name}), "members are not exactly")


@pytest.mark.parametrize("name", ["extra.txt", "../../etc/passwd", "/etc/passwd", "card.json/", "..\\x"])
def test_extra_member_or_path_traversal(honest: Honest, name: str) -> None:
    refused(zipped({**members(honest), name: b"x"}), "members are not exactly")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_duplicate_member(honest: Honest) -> None:
    buffer = io.BytesIO(honest.package_bytes)
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.writestr("card.json", b"{}")
    refused(buffer.getvalue(), "members are not exactly")


def test_zip_bomb_is_refused_before_it_is_expanded(honest: Honest) -> None:
    content = {**members(honest), "vk.key": bytes(64 << 20)}
    raw = zipped(content, compression=zipfile.ZIP_DEFLATED)
    assert len(raw) < MAX_PACKAGE_BYTES
    refused(raw, "compressed")


def test_member_larger_than_its_limit(honest: Honest) -> None:
    content = {**members(honest), "verifying.srs": bytes(400)}
    refused(zipped(content), "verifying.srs has more than 388 bytes")


def test_package_larger_than_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "verifier.zip"
    with path.open("wb") as stream:
        stream.truncate(MAX_PACKAGE_BYTES + 100)
    with pytest.raises(MambaintError, match="more than"):
        read_package(path)


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
    refused(zipped(members(honest), **options), "")


def test_reordered_members(honest: Honest) -> None:
    refused(zipped(dict(reversed(members(honest).items()))), "members are not exactly")


@pytest.mark.parametrize("position", ["before", "after", "truncated"])
def test_bytes_around_the_zip(honest: Honest, position: str) -> None:
    raw = honest.package_bytes
    refused({"before": b"#!/bin/sh\n" + raw, "after": raw + b"\0", "truncated": raw[:-1]}[position], "")


def test_encrypted_member(honest: Honest) -> None:
    raw = bytearray(honest.package_bytes)
    raw[raw.index(b"PK\x01\x02") + 8] |= 1
    refused(bytes(raw), "encrypted")


def test_statement_that_is_not_json(honest: Honest) -> None:
    for statement in ({"x": float("nan")}, {"x": {1, 2}}, {"x": b"bytes"}):
        with pytest.raises(MambaintError, match="is not JSON"):
            honest.keys.package(statement).encode()


def test_oversized_statement_is_refused_when_written(honest: Honest) -> None:
    with pytest.raises(MambaintError, match=r"card\.json of the verifier package has"):
        honest.keys.package({"x": "y" * (1 << 20)}).encode()


def test_command_cannot_check_with_a_damaged_package(honest: Honest, tmp_path: Path) -> None:
    (tmp_path / "verifier.zip").write_bytes(honest.package_bytes[:-1])
    (tmp_path / "proof.json").write_bytes(honest.result.file)
    result = CliRunner().invoke(command, [str(tmp_path / "proof.json")])
    # cli.main turns this fault into exit code 2.
    assert isinstance(result.exception, MambaintError)
