"""Continuing prompts: decoder and sampler in a loop, many sequences at once, each until its own end."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from mamba_int.errors import MambaintError


class PromptDecoder(Protocol):
    """A batch of sequences: :class:`~mamba_int.decoder.Decoder`, or that of the float models."""

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Start all sequences anew; logits [batch, vocabulary] after the prompts."""

    def step(self, tokens: Tensor, /) -> Tensor:
        """Logits [batch, vocabulary] after one more token of each."""


@dataclass
class Generation:
    """What was generated, and in what time.

    Attributes:
        tokens: the new tokens of each sequence.
        stopped: whether a sequence ended by itself, not at the limit.
        prefill_seconds: for the prompts.
        decode_seconds: for the tokens after the first.
    """

    tokens: list[list[int]]
    stopped: list[bool]
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        """Of all sequences together, without the first token of each, which comes with its prompt."""
        return sum(max(0, len(tokens) - 1) for tokens in self.tokens) / max(self.decode_seconds, 1e-9)


def generate(
    decoder: PromptDecoder,
    prompts: Sequence[Sequence[int]],
    sampler: Callable[[Tensor], Tensor],
    max_tokens: int,
    stop_tokens: Collection[int] = (),
    on_token: Callable[[int, int], bool] | None = None,
) -> Generation:
    """Continue every prompt.

    Each sequence gets the tokens it would get alone (when sampling: alone at its place in the batch).

    Args:
        decoder: as many sequences as there are prompts; they are started anew.
        prompts: token ids, at least one each.
        sampler: of the same batch and device; token ids [batch] from logits.
        max_tokens: most new tokens of a sequence.
        stop_tokens: a sequence ends before one of these, which is not part of it.
        on_token: called with the sequence and its new token as soon as it is known; True ends that sequence
            after it.

    Raises:
        MambaintError: for an empty prompt, or tokens that the model does not know.
    """
    if max_tokens < 1:
        raise MambaintError(f"max_tokens = {max_tokens}", "choose 1 or more")
    result = Generation([[] for _ in prompts], [False for _ in prompts])
    start = time.perf_counter()
    logits = decoder.prefill(prompts)
    tokens = sampler(logits)
    chosen = tokens.tolist()
    result.prefill_seconds = time.perf_counter() - start
    start = time.perf_counter()
    while True:
        for row, token in enumerate(chosen):
            if result.stopped[row]:
                continue
            if token in stop_tokens:
                result.stopped[row] = True
                continue
            result.tokens[row].append(token)
            if on_token is not None and on_token(row, token):
                result.stopped[row] = True
        if all(result.stopped) or max(map(len, result.tokens)) == max_tokens:
            break
        # Sequences that have ended go on in silence: the shape of a step never changes.
        tokens = sampler(decoder.step(tokens))
        chosen = tokens.tolist()
    result.decode_seconds = time.perf_counter() - start
    return result
