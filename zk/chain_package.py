"""The verifier package of a chain: the packages of its circuits, and how they are linked.

Members: ``chain.json``; ``stage000.zip`` and so on, the circuits of a segment; and ``head.zip`` where the end
of the last segment has a circuit of its own. Stored, sorted, without times: like a plain package
(``zk.package``) it has one possible encoding.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from circuits.circuit import (
    ACTIVATIONS_IN,
    ACTIVATIONS_OUT,
    CHAIN,
    CHAIN_VALUES,
    GENERATED,
    STATE_IN,
    STATE_OUT,
)
from mamba_int.errors import MambaintError
from mamba_int.files import canonical_json, parse_json
from zk.challenge import POINT_BYTES
from zk.field import HALF
from zk.package import MAX_PACKAGE_BYTES, Package, decode_package, encode_stored_zip, read_package_bytes

FORMAT = "mambaint-chain-verifier"
VERSION = 1
State = tuple[int, ...] | str
"""A state: its integers, or the commitment to them, a point as the proof has it (hex)."""
CARD, HEAD = "chain.json", "head.zip"
MAX_CARD_BYTES = 1 << 26
MAX_STAGES = 1000
MAX_CHAIN_PACKAGE_BYTES = 1 << 30
LINKS = (STATE_IN, STATE_OUT, ACTIVATIONS_IN, ACTIVATIONS_OUT)
"""What links circuits, in the order in which they commit to it."""
_REMEDY = "get it again from whoever you trust for it"


@dataclass(frozen=True)
class ChainPackage:
    """What a verifier of chains trusts.

    Attributes:
        stages: packages of the circuits of every segment, in the order of the model's nodes.
        stage_starts: the first node of each.
        head: package of the circuit that stands for the last stage in the last segment; None where that is
            like the others.
        segment_steps: steps of a segment.
        total_steps: steps of every sequence, where the model has a head; 0 for any number.
        first_states: of every stage the state before the first segment, flat; where states are hidden, the
            commitment to it.
    """

    stages: tuple[Package, ...]
    stage_starts: tuple[int, ...]
    head: Package | None
    segment_steps: int
    total_steps: int
    first_states: tuple[State, ...]

    @property
    def hides_states(self) -> bool:
        """Whether segments commit to their states instead of showing them."""
        return isinstance(self.first_states[0], str)

    @property
    def greedy(self) -> bool:
        """Whether proofs show what was generated instead of logits."""
        return any(tensor.name == GENERATED for tensor in self.last.public)

    @property
    def last(self) -> Package:
        """Package of the last stage, which computes the logits."""
        return self.stages[-1]

    @property
    def model_id(self) -> str:
        """Of all circuits."""
        return self.last.model_id

    def encode(self) -> bytes:
        """The bytes of ``verifier.zip``."""
        card = {
            "format": FORMAT,
            "version": VERSION,
            "segment_steps": self.segment_steps,
            "total_steps": self.total_steps,
            "stage_starts": list(self.stage_starts),
            "first_states": [state if isinstance(state, str) else list(state) for state in self.first_states],
        }
        content = {CARD: canonical_json(card)}
        content |= {_member(d): stage.encode() for d, stage in enumerate(self.stages)}
        if self.head is not None:
            content[HEAD] = self.head.encode()
        return encode_stored_zip({name: content[name] for name in sorted(content)})


def _member(stage: int) -> str:
    return f"stage{stage:03}.zip"


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
            stages = [_member(d) for d in range(len(names) - 1 - (HEAD in names))]
            if not 1 <= len(stages) <= MAX_STAGES or names not in (
                [CARD, *stages],
                [CARD, HEAD, *stages],
            ):
                raise _refuse(source, "its members are not those of a chain's package")
            if any(
                member.compress_type != zipfile.ZIP_STORED
                or member.flag_bits
                or max(member.file_size, member.compress_size)
                > (MAX_CARD_BYTES if member.filename == CARD else MAX_PACKAGE_BYTES)
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
    fields = {"format", "version", "segment_steps", "total_steps", "stage_starts", "first_states"}
    if not isinstance(card, dict) or set(card) != fields:
        raise _refuse(source, f"{CARD} has wrong fields")
    if (card["format"], card["version"]) != (FORMAT, VERSION) or type(card["version"]) is not int:
        raise _refuse(source, f"it is not of version {VERSION} of this format")
    steps, total, starts, firsts = (
        card[name] for name in ("segment_steps", "total_steps", "stage_starts", "first_states")
    )
    if type(steps) is not int or type(total) is not int or steps < 1 or total < 0:
        raise _refuse(source, "its numbers of steps are wrong")
    # Stages that begin where the one before ends leave no node out.
    if (
        not _integers(starts)
        or len(starts) != len(stages)
        or starts[0] != 0
        or any(a >= b for a, b in pairwise(starts))
    ):
        raise _refuse(source, "its stages do not begin one after the other")
    if (
        not isinstance(firsts, list)
        or len(firsts) != len(stages)
        or not (all(map(is_point, firsts)) or all(map(_integers, firsts)))
    ):
        raise _refuse(source, "its first states are neither lists of integers nor commitments")
    package = ChainPackage(
        stages=tuple(decode_package(content[name], f"{source}/{name}") for name in stages),
        stage_starts=tuple(starts),
        head=decode_package(content[HEAD], f"{source}/{HEAD}") if HEAD in content else None,
        segment_steps=steps,
        total_steps=total,
        first_states=tuple(state if isinstance(state, str) else tuple(state) for state in firsts),
    )
    _check(package, source)
    if package.encode() != raw:
        raise _refuse(source, "it is not in the one canonical form")
    return package


def _integers(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int and abs(v) <= HALF for v in value)


def _check(package: ChainPackage, source: str) -> None:
    """The circuits belong to one chain."""
    stages, head, hidden = package.stages, package.head, package.hides_states
    received = 0
    for d, (stage, first) in enumerate(zip(stages, package.first_states, strict=True)):
        sizes = _links(stage, hidden)
        state, handed_on = sizes.get(STATE_IN, 0), sizes.get(ACTIVATIONS_OUT, 0)
        expected = {STATE_IN: state, STATE_OUT: state}
        if d > 0:
            expected[ACTIVATIONS_IN] = received
        if d < len(stages) - 1:
            expected[ACTIVATIONS_OUT] = handed_on
        if sizes != expected or 0 in expected.values():
            raise _refuse(source, f"its circuit {d} is not that of a stage")
        if isinstance(first, tuple) and len(first) != state:
            raise _refuse(source, "its first state has another size than its circuit's")
        received = handed_on
    if (head is None) != (package.total_steps == 0):
        raise _refuse(source, "it has a head without a number of steps, or the reverse")
    # Commitments of circuits with other rows, or another SRS, could not be compared.
    shared = ("model_id", "ezkl_version", *(("logrows", "verifying_srs") if hidden else ()))
    for other in (*stages[:-1], *([] if head is None else [head])):
        if any(getattr(other, name) != getattr(package.last, name) for name in shared):
            raise _refuse(source, "its circuits do not belong together")
    if head is None:
        return
    entering = {name: size for name, size in _links(package.last, hidden).items() if name != STATE_OUT}
    if _links(head, hidden) != entering:
        raise _refuse(source, "its head is not that of a chain")
    if package.total_steps % package.segment_steps or package.total_steps == package.segment_steps:
        raise _refuse(source, "its segments do not make up the sequence")


def _links(circuit: Package, hidden: bool) -> dict[str, int]:
    """Sizes of what links a circuit, among its public values or its first commitments; empty for one that
    does not show its place, or mixes the two forms."""
    shown = {tensor.name: tensor.size for tensor in circuit.public if tensor.stated}
    sizes = {name: shown[name] for name in LINKS if name in shown}
    committed = [name for name, _ in circuit.committed if name in LINKS]
    if shown.get(CHAIN) != CHAIN_VALUES or (sizes if hidden else committed):
        return {}
    if not hidden:
        return sizes
    expected = [name for name in LINKS if name in committed]
    # Committed to elsewhere, it would be none of these.
    if [name for name, _ in circuit.committed[: len(expected)]] != expected or committed != expected:
        return {}
    return {name: size for name, size in circuit.committed if name in LINKS}


def read_chain_package(path: Path) -> tuple[ChainPackage, str]:
    """Read a package file; returns it and its SHA-256 (hex).

    Raises:
        MambaintError: if it is missing, too large or malformed.
    """
    raw = read_package_bytes(path, MAX_CHAIN_PACKAGE_BYTES)
    return decode_chain_package(raw, str(path)), hashlib.sha256(raw).hexdigest()
