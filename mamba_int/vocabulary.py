"""Between text and token ids: bytes as they are, or the tokens of a Hugging Face tokenizer file."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from mamba_int.errors import MambaintError
from mamba_int.files import read_bytes

TOKENIZER_FILE = "tokenizer.json"
"""Its name in the folder of a run."""
BYTES = 256


class Vocabulary(Protocol):
    """What the tokens of a model mean."""

    def encode(self, text: bytes) -> list[int]:
        """Token ids of a text."""

    def decoder(self) -> Callable[[int | None], str]:
        """A function that is given one token after the other and returns what has become readable: nothing
        while a character is incomplete. None is the end, where what is left becomes U+FFFD."""

    def special_token(self, text: str) -> int | None:
        """The id of the special token of this name, or None."""


class Bytes:
    """256 tokens, the bytes of the text in UTF-8."""

    def encode(self, text: bytes) -> list[int]:
        return list(text)

    def decoder(self) -> Callable[[int | None], str]:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        return lambda token: decoder.decode(b"" if token is None else bytes([token]), final=token is None)

    def special_token(self, text: str) -> int | None:
        return None


class TokenizerFile:
    """A tokenizer of the library ``tokenizers``, read from its JSON file.

    Args:
        path: the file.
        vocab_size: tokens of the model.

    Raises:
        MambaintError: if the file or the library is missing, or the file is no tokenizer, or has more tokens
            than the model.
    """

    def __init__(self, path: Path, vocab_size: int) -> None:
        content = read_bytes(path, "give the path of a tokenizer JSON file")
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise MambaintError(
                f"{path} needs the library 'tokenizers', which is not installed", "pip install tokenizers"
            ) from error
        try:
            self._tokenizer = Tokenizer.from_buffer(content)
        except Exception as error:  # the library raises nothing narrower
            raise MambaintError(
                f"{path} is not a tokenizer: {error}", "give a JSON file of the library 'tokenizers'"
            ) from error
        size = self._tokenizer.get_vocab_size()
        if size > vocab_size:
            raise MambaintError(
                f"{path} has {size} tokens, the model {vocab_size}",
                "give the tokenizer of the model's training",
            )
        added = self._tokenizer.get_added_tokens_decoder()
        self._special = {added[token].content: token for token in added if added[token].special}

    def encode(self, text: bytes) -> list[int]:
        try:
            decoded = text.decode()
        except UnicodeDecodeError as error:
            raise MambaintError(
                f"the prompt is not UTF-8 ({error.reason} at byte {error.start})", "give a text in UTF-8"
            ) from error
        ids: list[int] = self._tokenizer.encode(decoded).ids
        return ids

    def decoder(self) -> Callable[[int | None], str]:
        from tokenizers.decoders import DecodeStream

        stream, incomplete = DecodeStream(skip_special_tokens=True), False

        def decode(token: int | None) -> str:
            nonlocal incomplete
            if token is None:
                return "\N{REPLACEMENT CHARACTER}" if incomplete else ""
            part = stream.step(self._tokenizer, token)
            incomplete = part is None and token not in self._special.values()
            return part or ""

        return decode

    def special_token(self, text: str) -> int | None:
        return self._special.get(text)


def find_vocabulary(vocab_size: int, tokenizer: Path | None, folders: Sequence[Path]) -> Vocabulary:
    """The vocabulary of a model.

    Args:
        vocab_size: its tokens.
        tokenizer: a tokenizer file, if one is given.
        folders: where a ``tokenizer.json`` may lie, the nearest first.

    Raises:
        MambaintError: if there is none, and the tokens are not bytes; those of :class:`TokenizerFile`.
    """
    beside = next((path for folder in folders if (path := folder / TOKENIZER_FILE).is_file()), None)
    chosen = tokenizer if tokenizer is not None else beside
    if chosen is not None:
        return TokenizerFile(chosen, vocab_size)
    if vocab_size != BYTES:
        raise MambaintError(
            f"the model has {vocab_size} tokens, not bytes, and no {TOKENIZER_FILE} lies beside it",
            "give --tokenizer FILE",
        )
    return Bytes()


class TextStream:
    """The text of one sequence as its tokens come, up to the first of the ``stops``.

    What could be the beginning of a stop is held back until it is known not to be one.
    """

    def __init__(self, vocabulary: Vocabulary, stops: Sequence[str] = ()) -> None:
        self._decode = vocabulary.decoder()
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.text = ""
        """All text released so far."""
        self.stopped = False

    def feed(self, token: int | None) -> str:
        """The text that this token, or None for the end of the sequence, releases."""
        if self.stopped:
            return ""
        self._held += self._decode(token)
        found = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            released, self._held = self._held[: min(found)], ""
        else:
            kept = 0 if token is None else self._possible_stop()
            released, self._held = self._held[: len(self._held) - kept], self._held[len(self._held) - kept :]
        self.text += released
        return released

    def _possible_stop(self) -> int:
        """Length of the longest end of the held text that a stop begins with."""
        longest = max(map(len, self._stops), default=1) - 1
        sizes = range(min(longest, len(self._held)), 0, -1)
        return next((n for n in sizes if any(s.startswith(self._held[-n:]) for s in self._stops)), 0)
