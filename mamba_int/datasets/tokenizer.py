"""Tokenizers of language models: bytes, or byte-level byte-pair encoding (BPE).

Either is lossless: every token stands for a fixed string of bytes, so that bits per byte can be told
exactly whatever the vocabulary, and decoding needs no library.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt

from mamba_int.errors import MambaintError
from mamba_int.files import canonical_json, parse_json, read_json, remove, write_bytes

TOKENIZER_FILE = "tokenizer.json"
"""Name of a tokenizer's file in the folder of a run and beside a model."""

SMALLEST_VOCABULARY = 256
"""Byte-level BPE has a token for every byte."""
LARGEST_VOCABULARY = 1 << 20
_NOT_UTF8_REMEDY = "give a text in UTF-8, or tokenize with --tokenizer bytes"

IntArray = npt.NDArray[np.int64]


def _byte_of_character() -> dict[str, int]:
    """The alphabet of byte-level BPE (Radford et al. 2019, GPT-2): a printable character for every byte.

    Visible Latin-1 characters stand for themselves, the other bytes, in order, for U+0100 and on.
    """
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer as a value that travels with token files and checkpoints.

    Attributes:
        kind: ``bytes``, or ``bpe`` for byte-level BPE.
        definition: BPE: the JSON value of a ``tokenizer.json`` of the ``tokenizers`` library; else empty.
    """

    kind: Literal["bytes", "bpe"]
    definition: dict[str, Any]

    @cached_property
    def pieces(self) -> tuple[bytes, ...]:
        """The bytes that every token stands for, by token id.

        Raises:
            MambaintError: if the definition is not that of a byte-level BPE with consecutive ids.
        """
        if self.kind == "bytes":
            return tuple(bytes([byte]) for byte in range(256))
        remedy = "give the tokenizer.json of a byte-level BPE"
        alphabet = _byte_of_character()
        try:
            model, vocabulary = self.definition["model"], dict(self.definition["model"]["vocab"])
            added = {token["content"]: token["id"] for token in self.definition["added_tokens"]}
            if model["type"] != "BPE":
                raise MambaintError(f"the tokenizer is a {model['type']}, not a BPE", remedy)
            by_id = {
                number: bytes(alphabet[character] for character in text)
                for text, number in vocabulary.items()
                if text not in added
            }
            by_id |= {number: text.encode() for text, number in added.items()}
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise MambaintError(f"the tokenizer is not a byte-level BPE ({error!r})", remedy) from error
        if sorted(by_id) != list(range(len(by_id))) or not all(by_id.values()):
            raise MambaintError("the tokens of the tokenizer are not numbered 0, 1, 2, ...", remedy)
        if not {bytes([byte]) for byte in range(256)} <= set(by_id.values()):
            raise MambaintError("the tokenizer has no token for some bytes", remedy)
        if len(by_id) > LARGEST_VOCABULARY:
            raise MambaintError(
                f"the tokenizer has {len(by_id)} tokens, more than {LARGEST_VOCABULARY}", remedy
            )
        return tuple(by_id[number] for number in range(len(by_id)))

    @property
    def special_tokens(self) -> dict[str, int]:
        """Ids of the tokens that mark something, such as the end of a text, by their own text."""
        added = self.definition.get("added_tokens", [])
        return {token["content"]: token["id"] for token in added if token.get("special")}

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        return len(self.pieces)

    @cached_property
    def lengths(self) -> IntArray:
        """int64 [vocab_size]: bytes that every token stands for."""
        return np.array([len(piece) for piece in self.pieces], dtype=np.int64)

    def encode(self, text: bytes) -> IntArray:
        """Token ids, int64 [n], of a text; ``decode`` gives the text back.

        Raises:
            MambaintError: BPE: if the text is not UTF-8, the ``tokenizers`` library is missing, or the
                tokenizer loses something, as one with a normalizer does.
        """
        if self.kind == "bytes":
            return np.frombuffer(text, dtype=np.uint8).astype(np.int64)
        try:
            decoded = text.decode()
        except UnicodeDecodeError as error:
            raise MambaintError(
                f"the text is not UTF-8 ({error.reason} at byte {error.start})", _NOT_UTF8_REMEDY
            ) from error
        ids = np.array(self._library.encode(decoded, add_special_tokens=False).ids, dtype=np.int64)
        if int(self.lengths[ids].sum()) != len(text):
            raise MambaintError(
                "the tokenizer does not keep the text as it is",
                "give a byte-level BPE without normalizer and without prefix space",
            )
        return ids

    def decode(self, ids: Iterable[int]) -> bytes:
        """The text of token ids; a single token need not be whole characters.

        Raises:
            MambaintError: for an id that is not in the vocabulary.
        """
        pieces = self.pieces
        known = list(map(int, ids))
        wrong = next((number for number in known if not 0 <= number < len(pieces)), None)
        if wrong is not None:
            raise MambaintError(
                f"token {wrong} is not in the vocabulary of {len(pieces)}", "give ids of this tokenizer"
            )
        return b"".join(pieces[number] for number in known)

    @cached_property
    def _library(self) -> Any:
        library = _tokenizers()
        try:
            return library.Tokenizer.from_str(canonical_json(self.definition).decode())
        except Exception as error:  # the library raises Exception itself
            raise MambaintError(
                f"the tokenizers library refuses the tokenizer ({error})", "give a valid tokenizer.json"
            ) from error

    @property
    def digest(self) -> str:
        """SHA-256 of kind and definition, as hex digits."""
        return hashlib.sha256(canonical_json(self.to_dict())).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """Both fields as JSON-able values."""
        return {"kind": self.kind, "definition": self.definition}

    @classmethod
    def from_dict(cls, values: Any, source: str) -> Self:
        """Inverse of :meth:`to_dict`; ``source`` names the file in an error.

        Raises:
            MambaintError: if this is no tokenizer.
        """
        well_formed = (
            isinstance(values, dict)
            and values.keys() == {"kind", "definition"}
            and values["kind"] in ("bytes", "bpe")
            and isinstance(values["definition"], dict)
            and (values["kind"] == "bpe" or not values["definition"])
        )
        if not well_formed:
            raise MambaintError(f"{source} holds no tokenizer", "make the file again")
        tokenizer = cls(values["kind"], values["definition"])
        _ = tokenizer.pieces
        return tokenizer


BYTES = Tokenizer("bytes", {})


def _tokenizers() -> Any:
    """The ``tokenizers`` library, which only encoding and training need."""
    try:
        import tokenizers
    except ImportError as error:
        raise MambaintError(
            "byte-pair encoding needs the tokenizers library", "pip install tokenizers"
        ) from error
    return tokenizers


def train_bpe(texts: Iterator[bytes], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE (Sennrich et al. 2016, arXiv 1508.07909, on bytes as in GPT-2).

    Args:
        texts: UTF-8 pieces of the training text.
        vocab_size: tokens wanted; fewer where the text has no more pairs to merge.

    Raises:
        MambaintError: if the size is impossible, a piece is not UTF-8, or the library is missing.
    """
    if not SMALLEST_VOCABULARY <= vocab_size <= LARGEST_VOCABULARY:
        raise MambaintError(
            f"a vocabulary of {vocab_size} is not possible",
            f"choose {SMALLEST_VOCABULARY} to {LARGEST_VOCABULARY}",
        )
    library = _tokenizers()
    trained = library.Tokenizer(library.models.BPE())
    trained.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=sorted(library.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    fault: list[MambaintError] = []

    def decoded() -> Iterator[str]:
        for text in texts:
            try:
                yield text.decode()
            except UnicodeDecodeError as error:
                # The library would swallow an exception of the iterator.
                fault.append(MambaintError(f"the text is not UTF-8 ({error})", _NOT_UTF8_REMEDY))
                return

    trained.train_from_iterator(decoded(), trainer)
    if fault:
        raise fault[0]
    definition = parse_json(trained.to_str().encode(), "the trained tokenizer")
    return Tokenizer.from_dict({"kind": "bpe", "definition": definition}, "the trained tokenizer")


def load_bpe(path: Path) -> Tokenizer:
    """Read a ``tokenizer.json`` of the ``tokenizers`` library.

    Raises:
        MambaintError: if it is missing, or not a byte-level BPE.
    """
    definition = read_json(path, "give the path of a tokenizer.json")
    return Tokenizer.from_dict({"kind": "bpe", "definition": definition}, str(path))


def save_tokenizer(tokenizer: Tokenizer | None, folder: Path) -> Path | None:
    """Write the ``tokenizer.json`` of a BPE into a folder; return its path.

    For bytes and for what is no text there is none: one that was left by an earlier model is removed.

    Raises:
        MambaintError: if the folder cannot be written.
    """
    path = folder / TOKENIZER_FILE
    if tokenizer is None or tokenizer.kind == "bytes":
        remove(path)
        return None
    write_bytes(path, canonical_json(tokenizer.definition))
    return path


def find_tokenizer(vocab_size: int, folder: Path, path: Path | None = None) -> Tokenizer:
    """The tokenizer of a model.

    Args:
        vocab_size: the model's tokens.
        folder: where the model lies, perhaps with a ``tokenizer.json``; without one the tokens are bytes.
        path: a ``tokenizer.json`` to use instead.

    Raises:
        MambaintError: if the tokens are not bytes and there is no file, or its tokenizer has another number
            of tokens; those of :func:`load_bpe`.
    """
    beside = folder / TOKENIZER_FILE
    if path is None and not os.path.exists(beside):
        if vocab_size == BYTES.vocab_size:
            return BYTES
        raise MambaintError(
            f"the model has {vocab_size} tokens, not bytes, and no {TOKENIZER_FILE} lies beside it",
            "give --tokenizer-file FILE",
        )
    chosen = beside if path is None else path
    tokenizer = load_bpe(chosen)
    if tokenizer.vocab_size != vocab_size:
        raise MambaintError(
            f"{chosen} has {tokenizer.vocab_size} tokens, the model {vocab_size}",
            "give the tokenizer of the model's training",
        )
    return tokenizer
