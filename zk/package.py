"""The verifier package: everything a verifying party trusts, as one zip with one possible encoding.

Members: ``card.json`` (who, what, which shapes and hashes), ``settings.json``, ``vk.key``,
``verifying.srs``; stored, sorted, without times. Its SHA-256 is what a proof names. A reader re-encodes
what it read and compares bytes, so no two files mean the same and nothing can hide in one.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from circuits.circuit import COMMITTED_INPUT, PublicTensor
from mamba_int.errors import MambaintError
from mamba_int.files import canonical_json, parse_json
from zk.challenge import POINT_BYTES
from zk.field import HALF
from zk.identity import is_sha256
from zk.jobs import CHALLENGE, pack_public
from zk.settings import check_settings
from zk.srs_format import KINDS, VERIFYING_BYTES, SrsKind

FORMAT = "mambaint-verifier"
VERSION = 2

_LIMITS = {
    "card.json": 1 << 20,
    "settings.json": 1 << 22,
    "verifying.srs": VERIFYING_BYTES,
    "vk.key": 1 << 24,
}
"""Members in the order of the zip, and the most bytes each may have."""

MAX_PACKAGE_BYTES = sum(_LIMITS.values()) + 4096
MAX_PROOF_BYTES = 1 << 24
MAX_REASON = 500
"""Characters of a reason that are shown: some reasons quote the file."""

_MAX_PUBLIC_VALUES = 1 << 22


@dataclass(frozen=True)
class Package:
    """Content of a verifier package.

    Attributes:
        model_id: SHA-256 (hex) of the integer graph.
        circuit_id: see :func:`zk.identity.circuit_id`.
        mambaint_version: that wrote the package; for people.
        ezkl_version: the only version that may check proofs.
        logrows: of the circuit.
        proof_bytes: exact length of every proof.
        public: the circuit's outputs, in order.
        committed: names and sizes of the inputs a proof commits to, in order of the commitments at its head.
        statement: what a proof says, for people; any JSON object.
        srs_kind: "development" or "ceremony".
        srs_sha256: hash of the full SRS file (hex).
        settings: canonical EZKL settings.
        vk: EZKL's verifying key.
        verifying_srs: the 388 bytes of the SRS that verifying reads.
    """

    model_id: str
    circuit_id: str
    mambaint_version: str
    ezkl_version: str
    logrows: int
    proof_bytes: int
    public: tuple[PublicTensor, ...]
    committed: tuple[tuple[str, int], ...]
    statement: dict[str, Any]
    srs_kind: SrsKind
    srs_sha256: str
    settings: bytes
    vk: bytes
    verifying_srs: bytes

    def encode(self) -> bytes:
        """The bytes of ``verifier.zip``.

        Raises:
            MambaintError: if the statement is not JSON or a part is too large.
        """
        try:
            card = canonical_json(self._card())
        except (TypeError, ValueError, RecursionError) as error:
            raise MambaintError(
                f"the statement of the verifier package is not JSON ({error})", "use plain values only"
            ) from error
        content = {
            "card.json": card,
            "settings.json": self.settings,
            "verifying.srs": self.verifying_srs,
            "vk.key": self.vk,
        }
        for name, limit in _LIMITS.items():
            if len(content[name]) > limit:
                raise MambaintError(
                    f"{name} of the verifier package has {len(content[name])} bytes, more than {limit}",
                    "shorten the statement or choose a smaller circuit",
                )
        return encode_stored_zip({name: content[name] for name in _LIMITS})

    @property
    def commits_to_input(self) -> bool:
        """Whether a proof begins with a commitment to the model input alone."""
        return bool(self.committed) and self.committed[0][0] == COMMITTED_INPUT

    @property
    def proof_file_bytes(self) -> int:
        """More bytes than any proof file for this package has."""
        digits_and_comma = len(f"-{HALF},")
        public = sum(len(canonical_json(t.name)) + 8 + t.size * digits_and_comma for t in self.public)
        return public + 2 * self.proof_bytes + (1 << 16)

    def _card(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "version": VERSION,
            "mambaint": self.mambaint_version,
            "ezkl": self.ezkl_version,
            "model_id": self.model_id,
            "circuit_id": self.circuit_id,
            "logrows": self.logrows,
            "proof_bytes": self.proof_bytes,
            "public": pack_public(self.public),
            "committed": [list(item) for item in self.committed],
            "statement": self.statement,
            "settings_sha256": hashlib.sha256(self.settings).hexdigest(),
            "vk_sha256": hashlib.sha256(self.vk).hexdigest(),
            "srs": {
                "kind": self.srs_kind,
                "sha256": self.srs_sha256,
                "logrows": self.logrows,
                "verifying_sha256": hashlib.sha256(self.verifying_srs).hexdigest(),
            },
        }


def encode_stored_zip(content: dict[str, bytes]) -> bytes:
    """A zip of these members in their order, stored and without times: one possible encoding."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, data in content.items():
            member = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            member.create_system = 3
            member.external_attr = 0o644 << 16
            archive.writestr(member, data)
    return buffer.getvalue()


class _Malformed(Exception):
    """The package breaks a rule; the text says which."""


def decode_package(raw: bytes, source: str) -> Package:
    """Read a verifier package strictly.

    Args:
        raw: the bytes of the zip.
        source: its name, for messages.

    Raises:
        MambaintError: if any byte differs from what :meth:`Package.encode` writes, or the package is of
            another format or version.
    """
    try:
        content = _decode_zip(raw)
        card = parse_json(content["card.json"], "card.json")
        package = _decode_card(card, content)
    except _Malformed as error:
        raise _refusal(source, str(error)) from error
    except MambaintError as error:
        raise _refusal(source, error.cause) from error
    except RecursionError as error:
        # What the parser still takes can be too deep for the encoder.
        raise _refusal(source, "it is nested too deeply") from error
    return package


def _refusal(source: str, reason: str) -> MambaintError:
    return MambaintError(
        f"the verifier package {source} cannot be used: {reason[:MAX_REASON]}",
        "get it again from whoever you trust for it",
    )


def read_package_bytes(path: Path, most: int) -> bytes:
    """A verifier package file as far as it is read: one byte more than it may have.

    Raises:
        MambaintError: if it cannot be read.
    """
    try:
        with path.open("rb") as stream:
            return stream.read(most + 1)
    except OSError as error:
        raise MambaintError(
            f"cannot read the verifier package {path}: {error.strerror or error}",
            "give its path with --verifier",
        ) from error


def read_package(path: Path) -> tuple[Package, str]:
    """Read a verifier package file; returns it and its SHA-256 (hex).

    Raises:
        MambaintError: if it is missing, too large or malformed.
    """
    raw = read_package_bytes(path, MAX_PACKAGE_BYTES)
    return decode_package(raw, str(path)), hashlib.sha256(raw).hexdigest()


def _decode_zip(raw: bytes) -> dict[str, bytes]:
    if len(raw) > MAX_PACKAGE_BYTES:
        raise _Malformed(f"it has more than {MAX_PACKAGE_BYTES} bytes")
    content: dict[str, bytes] = {}
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            members = archive.infolist()
            if [member.filename for member in members] != list(_LIMITS):
                raise _Malformed(f"its members are not exactly {', '.join(_LIMITS)}")
            for member in members:
                # Checked before reading: a compressed or overlong member could expand without end.
                if member.compress_type != zipfile.ZIP_STORED or member.flag_bits:
                    raise _Malformed(f"{member.filename} is compressed or encrypted")
                if max(member.file_size, member.compress_size) > _LIMITS[member.filename]:
                    raise _Malformed(f"{member.filename} has more than {_LIMITS[member.filename]} bytes")
                content[member.filename] = archive.read(member)
    except _Malformed:
        raise
    except Exception as error:
        # zipfile does not say what it raises on hostile input (an OverflowError, for one); all of it is a no.
        raise _Malformed(f"it is not a zip file ({error})") from error
    if encode_stored_zip(content) != raw:
        raise _Malformed("it is not in the one canonical form")
    return content


def _expect(condition: bool, reason: str) -> None:
    if not condition:
        raise _Malformed(reason)


def _is_count(value: Any, low: int, high: int) -> bool:
    return type(value) is int and low <= value <= high


def _decode_public(value: Any) -> tuple[PublicTensor, ...]:
    _expect(isinstance(value, list) and 0 < len(value) <= 1024, "card.json: public is not a list of tensors")
    tensors = []
    for item in value:
        _expect(
            isinstance(item, dict) and set(item) == {"name", "shape", "forced", "challenge"},
            "card.json: a public tensor has wrong fields",
        )
        name, shape, forced = item["name"], item["shape"], item["forced"]
        _expect(
            isinstance(name, str) and 0 < len(name) <= 256 and name.isprintable(),
            "card.json: a public tensor has no proper name",
        )
        _expect(
            isinstance(shape, list)
            and len(shape) <= 8
            and all(_is_count(extent, 1, _MAX_PUBLIC_VALUES) for extent in shape),
            f"card.json: the shape of {name} is not a list of sizes",
        )
        _expect(
            forced is None or _is_count(forced, -HALF, HALF),
            f"card.json: the forced value of {name} is wrong",
        )
        challenge = item["challenge"]
        _expect(
            type(challenge) is bool and not (challenge and (forced is not None or shape != [1])),
            f"card.json: {name} is wrongly marked as the challenge",
        )
        tensors.append(PublicTensor(name, tuple(shape), forced, challenge))
    _expect(len({t.name for t in tensors}) == len(tensors), "card.json: two public tensors share a name")
    _expect(sum(t.size for t in tensors) <= _MAX_PUBLIC_VALUES, "card.json: too many public values")
    return tuple(tensors)


def _decode_committed(
    value: Any, public: tuple[PublicTensor, ...], proof_bytes: int
) -> tuple[tuple[str, int], ...]:
    _expect(isinstance(value, list) and len(value) <= 64, "card.json: committed is not a list")
    for item in value:
        _expect(
            isinstance(item, list)
            and len(item) == 2
            and isinstance(item[0], str)
            and 0 < len(item[0]) <= 256
            and item[0].isprintable()
            and _is_count(item[1], 1, _MAX_PUBLIC_VALUES),
            "card.json: a committed input is not a name and a size",
        )
    names = [name for name, _ in value]
    _expect(len(set(names)) == len(names), "card.json: two committed inputs share a name")
    challenges = sum(tensor.challenge for tensor in public)
    # A challenge that is not derived from commitments to everything else would be the prover's choice.
    _expect(
        challenges == names.count(CHALLENGE) <= 1
        and (not challenges or (len(names) > 1 and names[-1] == CHALLENGE)),
        "card.json: the challenge is not derived from commitments",
    )
    _expect(len(names) * POINT_BYTES <= proof_bytes, "card.json: the proof cannot hold its commitments")
    return tuple((name, size) for name, size in value)


_CARD = {
    "format",
    "version",
    "mambaint",
    "ezkl",
    "model_id",
    "circuit_id",
    "logrows",
    "proof_bytes",
    "public",
    "committed",
    "statement",
    "settings_sha256",
    "vk_sha256",
    "srs",
}


def _decode_card(card: Any, content: dict[str, bytes]) -> Package:
    _expect(
        isinstance(card, dict) and card.get("format") == FORMAT, "it is not a verifier package of mambaint"
    )
    found = card.get("version")
    _expect(
        type(found) is int and found == VERSION,
        f"it has format version {found!r} and this mambaint reads version {VERSION}",
    )
    _expect(set(card) == _CARD, "card.json: missing or unknown fields")
    _expect(canonical_json(card) == content["card.json"], "card.json is not in the one canonical form")
    for name in ("model_id", "circuit_id", "settings_sha256", "vk_sha256"):
        _expect(is_sha256(card[name]), f"card.json: {name} is not a SHA-256")
    for name in ("mambaint", "ezkl"):
        _expect(
            isinstance(card[name], str) and 0 < len(card[name]) <= 64 and card[name].isprintable(),
            f"card.json: {name} is not a version",
        )
    _expect(_is_count(card["logrows"], 1, 64), "card.json: logrows is not a size")
    _expect(_is_count(card["proof_bytes"], 1, MAX_PROOF_BYTES), "card.json: proof_bytes is not a size")
    _expect(isinstance(card["statement"], dict), "card.json: statement is not an object")
    srs = card["srs"]
    _expect(
        isinstance(srs, dict) and set(srs) == {"kind", "sha256", "logrows", "verifying_sha256"},
        "card.json: srs has wrong fields",
    )
    _expect(srs["kind"] in KINDS, "card.json: the kind of the SRS is unknown")
    _expect(is_sha256(srs["sha256"]), "card.json: the SHA-256 of the SRS is not one")
    _expect(
        type(srs["logrows"]) is int and srs["logrows"] == card["logrows"],
        "card.json: the SRS is for another number of rows",
    )
    public = _decode_public(card["public"])
    committed = _decode_committed(card["committed"], public, card["proof_bytes"])
    hashed = {
        "settings.json": card["settings_sha256"],
        "vk.key": card["vk_sha256"],
        "verifying.srs": srs["verifying_sha256"],
    }
    for name, expected in hashed.items():
        _expect(
            hashlib.sha256(content[name]).hexdigest() == expected,
            f"{name} is not the one that card.json names",
        )
    _expect(
        len(content["verifying.srs"]) == VERIFYING_BYTES and content["verifying.srs"][:4] == bytes(4),
        "verifying.srs is not a verifying SRS",
    )
    settings = parse_json(content["settings.json"], "settings.json")
    # The proof does not authenticate the settings: refuse any under which it would mean something else.
    check_settings(
        settings,
        logrows=card["logrows"],
        public=public,
        committed=[size for _, size in committed],
        ezkl_version=card["ezkl"],
    )
    _expect(
        canonical_json(settings) == content["settings.json"], "settings.json is not in the one canonical form"
    )
    return Package(
        model_id=card["model_id"],
        circuit_id=card["circuit_id"],
        mambaint_version=card["mambaint"],
        ezkl_version=card["ezkl"],
        logrows=card["logrows"],
        proof_bytes=card["proof_bytes"],
        public=public,
        committed=committed,
        statement=card["statement"],
        srs_kind=srs["kind"],
        srs_sha256=srs["sha256"],
        settings=content["settings.json"],
        vk=content["vk.key"],
        verifying_srs=content["verifying.srs"],
    )
