"""The text of a sequence as its tokens come."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from mamba_int.datasets import Tokenizer


class TextStream:
    """The text of one sequence as its tokens come, up to the first of the ``stops``.

    A character is released when it is whole; bytes that are none become U+FFFD. What could be the beginning
    of a stop is held back until it is known not to be one.

    Args:
        tokenizer: what the tokens mean.
        stops: texts that end the sequence and are not part of it.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        self._pieces = tokenizer.pieces
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.text = ""
        """All text released so far."""
        self.stopped = False
        """Whether a stop was found."""

    def feed(self, token: int | None) -> str:
        """The text that this token, or None for the end of the sequence, releases."""
        if self.stopped:
            return ""
        piece = b"" if token is None else self._pieces[token]
        self._held += self._decoder.decode(piece, final=token is None)
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
