"""Token files: a text as token ids on disk, read through a memory map so that it may exceed the memory.

Layout, little-endian, nothing before, between or after:

==========  ==================================================================================
bytes       content
==========  ==================================================================================
0..7        ``mbtokens``
8..11       uint32: version, 1
12..15      uint32: bytes per token: 1, 2 or 4
16..23      uint64: number of tokens
24..31      uint64: length of the description in bytes
32..63      SHA-256 of the description
64..        the tokens, unsigned: training, validation and test split one after the other
then        the description: canonical JSON with ``name``, ``tokenizer``, ``splits`` (per split its
            ``tokens`` and the ``bytes`` of text they stand for) and ``tokens_sha256``
==========  ==================================================================================
"""

from __future__ import annotations

import hashlib
import mmap
import os
import struct
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from mamba_int.datasets.records import SPLITS, TextData
from mamba_int.datasets.text_file import SHORTEST_TEXT, split_places
from mamba_int.datasets.tokenizer import BYTES, Tokenizer, load_bpe, train_bpe
from mamba_int.errors import MambaintError
from mamba_int.files import canonical_json, parse_json, replacing

MAGIC = b"mbtokens"
VERSION = 1
_PREFIX = struct.Struct("<8sIIQQ32s")
_PIECE = 1 << 20
"""Bytes of text that are read and encoded at a time."""
_LONGEST_DESCRIPTION = 1 << 28
_REMEDY = "make the file with 'mambaint tokenize'"

Report = Callable[[str, int, int], None]
"""Told the stage (``train``, ``encode``), the bytes done and the bytes in all."""


@dataclass(frozen=True)
class TokenFileSummary:
    """What was written.

    Attributes:
        path: the file.
        vocab_size: tokens of the tokenizer.
        tokens, bytes: per split.
        tokenizer_sha256: digest of the tokenizer.
    """

    path: Path
    vocab_size: int
    tokens: dict[str, int]
    bytes: dict[str, int]
    tokenizer_sha256: str


class _Corpus:
    """Files read as one string of bytes."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths
        try:
            self.sizes = [os.stat(path).st_size for path in paths]
        except OSError as error:
            raise MambaintError(
                f"cannot read {error.filename}: {error.strerror}", "give the path of a text file"
            ) from error
        self.size = sum(self.sizes)
        if self.size < SHORTEST_TEXT:
            raise MambaintError(
                f"the text has {self.size} bytes, fewer than {SHORTEST_TEXT}", "give a longer text"
            )

    def blocks(self, start: int, stop: int) -> Iterator[bytes]:
        """The bytes from ``start`` to ``stop`` in blocks of up to a mebibyte."""
        first = 0
        for path, size in zip(self.paths, self.sizes, strict=True):
            place, end = max(start - first, 0), min(stop - first, size)
            first += size
            if place >= end:
                continue
            try:
                with path.open("rb") as file:
                    file.seek(place)
                    while place < end:
                        block = file.read(min(_PIECE, end - place))
                        if not block:
                            raise MambaintError(f"{path} became shorter while it was read", "try again")
                        place += len(block)
                        yield block
            except OSError as error:
                raise MambaintError(
                    f"cannot read {path}: {error.strerror or error}", "give the path of a text file"
                ) from error

    def pieces(self, start: int, stop: int) -> Iterator[bytes]:
        """The same bytes cut where a line, else a word, else a character ends, as BPE wants."""
        rest = b""
        for block in self.blocks(start, stop):
            rest += block
            if len(rest) < _PIECE:
                continue
            cut = rest.rfind(b"\n") + 1 or max(rest.rfind(b" "), 0) or _character_start(rest, len(rest) - 1)
            yield rest[:cut]
            rest = rest[cut:]
        if rest:
            yield rest

    def character_start(self, place: int) -> int:
        """The last place up to ``place`` where a UTF-8 character starts."""
        before = max(0, place - 3)
        window = b"".join(self.blocks(before, min(place + 1, self.size)))
        return before + _character_start(window, place - before) if place < self.size else place


def _character_start(text: bytes, place: int) -> int:
    start = place
    while start > max(0, place - 3) and text[start] & 0xC0 == 0x80:
        start -= 1
    return start


def _counted(
    pieces: Iterator[bytes], report: Report | None, stage: str, done: int, total: int
) -> Iterator[bytes]:
    for piece in pieces:
        yield piece
        done += len(piece)
        if report is not None:
            report(stage, done, total)


def write_token_file(
    texts: Sequence[Path],
    output: Path,
    tokenizer: Literal["bytes", "bpe"] = "bpe",
    vocab_size: int = 4096,
    tokenizer_file: Path | None = None,
    report: Report | None = None,
) -> TokenFileSummary:
    """Tokenize text files, one after the other, into a token file.

    The splits are those of a text file: the first 85 % train, the next 5 % validate, the last 10 % test,
    cut (BPE) where a character starts. A BPE is trained on the training split alone. The text is read a
    mebibyte at a time.

    Args:
        texts: the files.
        output: the token file.
        tokenizer: its kind.
        vocab_size: BPE: tokens wanted.
        tokenizer_file: BPE: a ``tokenizer.json``, or a token file, whose tokenizer is used as it is.
        report: told the progress.

    Raises:
        MambaintError: if a file cannot be read or written, is too short, or (BPE) is not UTF-8.
    """
    corpus = _Corpus(texts)
    places = split_places(corpus.size)
    if tokenizer == "bytes":
        chosen = BYTES
    else:
        places = [corpus.character_start(place) for place in places]
        training = _counted(corpus.pieces(places[0], places[1]), report, "train", 0, places[1])
        chosen = train_bpe(training, vocab_size) if tokenizer_file is None else _bpe_of(tokenizer_file)
    dtype = np.dtype(_dtype(chosen.vocab_size)).newbyteorder("<")
    digest = hashlib.sha256()
    splits: dict[str, dict[str, int]] = {}
    with replacing(output) as temporary, temporary.open("wb") as file:
        file.write(bytes(_PREFIX.size))
        for split, start, stop in zip(SPLITS, places, places[1:], strict=False):
            count = 0
            for piece in _counted(corpus.pieces(start, stop), report, "encode", start, corpus.size):
                content = chosen.encode(piece).astype(dtype).tobytes()
                file.write(content)
                digest.update(content)
                count += len(content) // dtype.itemsize
            splits[split] = {"tokens": count, "bytes": stop - start}
        description = canonical_json(
            {
                "name": texts[0].stem if len(texts) == 1 else output.stem,
                "tokenizer": chosen.to_dict(),
                "splits": splits,
                "tokens_sha256": digest.hexdigest(),
            }
        )
        file.write(description)
        file.seek(0)
        tokens = {split: counts["tokens"] for split, counts in splits.items()}
        sha256 = hashlib.sha256(description).digest()
        file.write(
            _PREFIX.pack(MAGIC, VERSION, dtype.itemsize, sum(tokens.values()), len(description), sha256)
        )
    sizes = {split: counts["bytes"] for split, counts in splits.items()}
    return TokenFileSummary(output, chosen.vocab_size, tokens, sizes, chosen.digest)


def _bpe_of(path: Path) -> Tokenizer:
    return load_token_file(path).tokenizer if path.suffix == ".tokens" else load_bpe(path)


def _dtype(vocab_size: int) -> type[np.unsignedinteger[Any]]:
    return np.uint8 if vocab_size <= 1 << 8 else np.uint16 if vocab_size <= 1 << 16 else np.uint32


def load_token_file(path: Path) -> TextData:
    """Map a token file; nothing but its description is read, which states the digest of the tokens.

    Raises:
        MambaintError: if the file is missing, of another version, incomplete or inconsistent.
    """
    try:
        with path.open("rb") as file:
            prefix = file.read(_PREFIX.size)
            size = os.fstat(file.fileno()).st_size
            if len(prefix) != _PREFIX.size or prefix[: len(MAGIC)] != MAGIC:
                raise MambaintError(f"{path} is not a token file", _REMEDY)
            _, version, width, count, length, sha256 = _PREFIX.unpack(prefix)
            if version != VERSION:
                raise MambaintError(
                    f"{path} has token file version {version}, this program reads {VERSION}", _REMEDY
                )
            end = _PREFIX.size + count * width
            if width not in (1, 2, 4) or length > _LONGEST_DESCRIPTION or end + length != size:
                raise MambaintError(f"{path} is incomplete or damaged", _REMEDY)
            file.seek(end)
            content = file.read(length)
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise MambaintError(f"cannot read {path}: {error.strerror or error}", _REMEDY) from error
    if hashlib.sha256(content).digest() != sha256:
        raise MambaintError(f"the description in {path} is damaged", _REMEDY)
    description = parse_json(content, f"the description in {path}")
    tokenizer, tokens, sizes = _checked(description, str(path))
    if sum(tokens.values()) != count or np.dtype(_dtype(tokenizer.vocab_size)).itemsize != width:
        raise MambaintError(f"the description in {path} does not fit its tokens", _REMEDY)
    array = np.frombuffer(mapped, _dtype(tokenizer.vocab_size), count=count, offset=_PREFIX.size)
    with warnings.catch_warnings():
        # That the memory is read-only is meant: a private writable map of a file larger than the memory is
        # refused by the system, and nothing here writes.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        values = torch.from_numpy(array)
    train, validation, test = torch.split(values, [tokens[split] for split in SPLITS])
    digest = hashlib.sha256(content).hexdigest()
    return TextData(train, validation, test, description["name"], tokenizer, sizes, digest)


def _checked(description: Any, source: str) -> tuple[Tokenizer, dict[str, int], dict[str, int]]:
    """Tokenizer, tokens by split and bytes by split of a description."""
    wanted = {"name", "tokenizer", "splits", "tokens_sha256"}
    if not isinstance(description, dict) or description.keys() != wanted:
        raise MambaintError(f"the description in {source} has other entries than a token file's", _REMEDY)
    splits = description["splits"]
    well_formed = (
        isinstance(description["name"], str)
        and isinstance(description["tokens_sha256"], str)
        and isinstance(splits, dict)
        and splits.keys() == set(SPLITS)
        and all(
            isinstance(counts, dict)
            and counts.keys() == {"tokens", "bytes"}
            and all(type(value) is int and value >= 0 for value in counts.values())
            for counts in splits.values()
        )
    )
    if not well_formed:
        raise MambaintError(f"the description in {source} is damaged", _REMEDY)
    tokens = {split: splits[split]["tokens"] for split in SPLITS}
    sizes = {split: splits[split]["bytes"] for split in SPLITS}
    return Tokenizer.from_dict(description["tokenizer"], source), tokens, sizes
