"""The verifier package of a chain: the packages of its circuits, and how they are linked.

Members: ``chain.json`` and ``segment.zip``, and ``head.zip`` where the last segment has a circuit of its own;
stored, sorted, without times. Like a plain package (``zk.package``) it has one possible encoding.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from circuits.circuit import CHAIN, CHAIN_VALUES, GENERATED, STATE_IN, STATE_OUT
from mamba_int.errors import MambaintError
from mamba_int.files import canonical_json, parse_json
from zk.challenge import POINT_BYTES
from zk.field import HALF
from zk.package import MAX_PACKAGE_BYTES, Package, decode_package, encode_stored_zip, read_package_bytes

FORMAT = "mambaint-chain-verifier"
VERSION = 1
State = tuple[int, ...] | str
"""A state: its integers, or the commitment to them, a point as the proof has it (hex)."""
CARD, SEGMENT, HEAD = "chain.json", "segment.zip", "head.zip"
_LIMITS = {CARD: 1 << 26, HEAD: MAX_PACKAGE_BYTES, SEGMENT: MAX_PACKAGE_BYTES}
MAX_CHAIN_PACKAGE_BYTES = sum(_LIMITS.values()) + 4096
_REMEDY = "get it again from whoever you trust for it"


@dataclass(frozen=True)
class ChainPackage:
    """What a verifier of chains trusts.

    Attributes:
        segment: package of the circuit of every segment, or of every one but the last.
        head: package of the circuit of the last segment; None where it is like the others.
        segment_steps: steps of a segment.
        total_steps: steps of every sequence, where the model has a head; 0 for any number.
        first_state: the state before the first segment, flat; where states are hidden, the commitment to it.
    """

    segment: Package
    head: Package | None
    segment_steps: int
    total_steps: int
    first_state: State

    @property
    def hides_states(self) -> bool:
        """Whether segments commit to their states instead of showing them."""
        return isinstance(self.first_state, str)

    @property
    def greedy(self) -> bool:
        """Whether proofs show what was generated instead of logits."""
        return any(tensor.name == GENERATED for tensor in self.segment.public)

    @property
    def model_id(self) -> str:
        """Of both circuits."""
        return self.segment.model_id

    def encode(self) -> bytes:
        """The bytes of ``verifier.zip``."""
        card = {
            "format": FORMAT,
            "version": VERSION,
            "segment_steps": self.segment_steps,
            "total_steps": self.total_steps,
            "first_state": self.first_state if isinstance(self.first_state, str) else list(self.first_state),
        }
        content = {CARD: canonical_json(card), SEGMENT: self.segment.encode()}
        if self.head is not None:
            content[HEAD] = self.head.encode()
        return encode_stored_zip({name: content[name] for name in sorted(content)})


def is_point(value: Any) -> bool:
    """Whether a value is a commitment in hexadecimal."""
    digits = set("0123456789abcdef")
    return isinstance(value, str) and len(value) == 2 * POINT_BYTES and not set(value) - digits


def _refuse(source: str, reason: str) -> MambaintError:
    return MambaintError(f"the verifier package {source} cannot be used: {reason}", _REMEDY)


def decode_chain_package(raw: bytes, source: str) -> ChainPackage:
    """Read a package strictly.

    Raises:
        MambaintError: if any byte differs from what :meth:`ChainPackage.encode` writes.
    """
    if len(raw) > MAX_CHAIN_PACKAGE_BYTES:
        raise _refuse(source, f"it has more than {MAX_CHAIN_PACKAGE_BYTES} bytes")
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            members = archive.infolist()
            names = [member.filename for member in members]
            if names not in ([CARD, SEGMENT], [CARD, HEAD, SEGMENT]):
                raise _refuse(source, "its members are not those of a chain's package")
            if any(
                member.compress_type != zipfile.ZIP_STORED
                or member.flag_bits
                or max(member.file_size, member.compress_size) > _LIMITS[member.filename]
                for member in members
            ):
                raise _refuse(source, "a member is compressed, encrypted or too large")
            content = {member.filename: archive.read(member) for member in members}
    except MambaintError:
        raise
    except Exception as error:
        # zipfile does not say what it raises on hostile input; all of it is a no.
        raise _refuse(source, f"it is not a zip file ({error})") from error
    card = parse_json(content[CARD], CARD)
    fields = {"format", "version", "segment_steps", "total_steps", "first_state"}
    if not isinstance(card, dict) or set(card) != fields:
        raise _refuse(source, f"{CARD} has wrong fields")
    if (card["format"], card["version"]) != (FORMAT, VERSION) or type(card["version"]) is not int:
        raise _refuse(source, f"it is not of version {VERSION} of this format")
    steps, total, first = card["segment_steps"], card["total_steps"], card["first_state"]
    if type(steps) is not int or type(total) is not int or steps < 1 or total < 0:
        raise _refuse(source, "its numbers of steps are wrong")
    if not is_point(first) and (
        not isinstance(first, list) or any(type(v) is not int or abs(v) > HALF for v in first)
    ):
        raise _refuse(source, "its first state is neither a list of integers nor a commitment")
    package = ChainPackage(
        segment=decode_package(content[SEGMENT], f"{source}/{SEGMENT}"),
        head=decode_package(content[HEAD], f"{source}/{HEAD}") if HEAD in content else None,
        segment_steps=steps,
        total_steps=total,
        first_state=first if isinstance(first, str) else tuple(first),
    )
    _check(package, source)
    if package.encode() != raw:
        raise _refuse(source, "it is not in the one canonical form")
    return package


def _check(package: ChainPackage, source: str) -> None:
    """The two circuits belong to one chain."""
    segment, head = package.segment, package.head
    begun = _places(segment, package.hides_states)
    state = begun.get(STATE_IN, 0)
    if begun != {CHAIN: CHAIN_VALUES, STATE_IN: state, STATE_OUT: state} or state < 1:
        raise _refuse(source, "its circuit is not that of a segment")
    if isinstance(package.first_state, tuple) and len(package.first_state) != state:
        raise _refuse(source, "its first state has another size than its circuit's")
    if (head is None) != (package.total_steps == 0):
        raise _refuse(source, "it has a head without a number of steps, or the reverse")
    if head is None:
        return
    if _places(head, package.hides_states) != {CHAIN: CHAIN_VALUES, STATE_IN: state}:
        raise _refuse(source, "its head is not that of a chain")
    # Commitments of circuits with other rows, or another SRS, could not be compared.
    shared = ("model_id", "ezkl_version", *(("logrows", "verifying_srs") if package.hides_states else ()))
    if any(getattr(head, name) != getattr(segment, name) for name in shared):
        raise _refuse(source, "its circuits do not belong together")
    if package.total_steps % package.segment_steps or package.total_steps == package.segment_steps:
        raise _refuse(source, "its segments do not make up the sequence")


def _places(circuit: Package, hidden: bool) -> dict[str, int]:
    """Sizes of what links a circuit: among its public values, or its states among its first commitments."""
    shown = {tensor.name: tensor.size for tensor in circuit.public if tensor.stated}
    sizes = {name: size for name, size in shown.items() if name in (CHAIN, STATE_IN, STATE_OUT)}
    if not hidden:
        return sizes
    committed = [name for name, _ in circuit.committed[:2]]
    expected = [name for name in (STATE_IN, STATE_OUT) if name in dict(circuit.committed)]
    # A state both shown and committed to, or committed to elsewhere, would be none of these two forms.
    if set(sizes) != {CHAIN} or committed[: len(expected)] != expected:
        return {}
    return sizes | {name: size for name, size in circuit.committed if name in expected}


def read_chain_package(path: Path) -> tuple[ChainPackage, str]:
    """Read a package file; returns it and its SHA-256 (hex).

    Raises:
        MambaintError: if it is missing, too large or malformed.
    """
    raw = read_package_bytes(path, MAX_CHAIN_PACKAGE_BYTES)
    return decode_chain_package(raw, str(path)), hashlib.sha256(raw).hexdigest()
