"""Token-by-token execution of a float language model: what ``mamba_int.generation.generate`` runs on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from mamba_int.errors import MambaintError

if TYPE_CHECKING:
    from mamba_int.float_models.models import MambaForCausalLM

PREFILL_STEPS = 4096
"""Longer prompts are run in pieces of so many steps, which bounds the memory."""
WARM_UP = 3
"""Eager steps before a CUDA graph is captured: libraries allocate their workspaces in the first ones."""


class FloatDecoder:
    """A batch of sequences, decoded together, each at a position of its own.

    Args:
        model: in eval mode, on the device to run on.
        batch: number of sequences.
        cuda_graph: capture a step once and replay it, on a CUDA device.

    Attributes:
        model, batch: as given.
        cache: what the past has left.

    Raises:
        MambaintError: for a CUDA graph elsewhere than on CUDA.
    """

    def __init__(self, model: MambaForCausalLM, batch: int = 1, cuda_graph: bool = False) -> None:
        self.model, self.batch = model, batch
        self.cache = model.new_cache(batch)
        device = self.cache.position.device
        if cuda_graph and device.type != "cuda":
            raise MambaintError(
                f"there are no CUDA graphs on the device '{device}'", "leave cuda_graph out, or use cuda"
            )
        self._tokens = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self._graph: torch.cuda.CUDAGraph | None = None
        if cuda_graph:
            self._capture()

    def _advance(self) -> Tensor:
        return self.model.logits(self.model.backbone(self._tokens, cache=self.cache))[:, 0]

    @torch.no_grad()
    def _capture(self) -> None:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._tokens.device):
            for _ in range(WARM_UP):
                self._advance()
            with torch.cuda.graph(graph):
                self._logits = self._advance()
        self._graph = graph
        self.cache.reset()

    @torch.no_grad()
    def step(self, tokens: Tensor | ArrayLike) -> Tensor:
        """Logits [batch, vocabulary] after one more token of every sequence, int64 [batch]."""
        self._tokens[:, 0] = torch.as_tensor(tokens)
        if self._graph is None:
            return self._advance()
        self._graph.replay()
        return self._logits.clone()

    @torch.no_grad()
    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Start all sequences anew from prompts of any lengths, padded on the right.

        Returns:
            The logits after each prompt, [batch, vocabulary].

        Raises:
            MambaintError: for an empty prompt, tokens that the model does not have, or a wrong number of
                prompts.
        """
        if len(prompts) != self.batch:
            raise MambaintError(
                f"{len(prompts)} prompts for {self.batch} sequences", "give one prompt for each, in a list"
            )
        vocab_size = self.model.config.vocab_size
        lengths = [len(prompt) for prompt in prompts]
        padded = np.zeros((self.batch, max(lengths)), np.int64)
        for i, prompt in enumerate(prompts):
            if not lengths[i]:
                raise MambaintError(f"prompt {i} is empty", "give at least one token")
            padded[i, : lengths[i]] = prompt
        if padded.min() < 0 or padded.max() >= vocab_size:
            raise MambaintError(
                "a prompt has a token that the model does not have", f"give tokens 0 to {vocab_size - 1}"
            )
        self.cache.reset()
        device = self._tokens.device
        ends = torch.tensor(lengths, device=device) - 1
        inputs = torch.from_numpy(padded).to(device)
        last = torch.zeros(0)
        for start in range(0, padded.shape[1], PREFILL_STEPS):
            piece = inputs[:, start : start + PREFILL_STEPS]
            places = start + torch.arange(piece.shape[1], device=device)
            mask = None if min(lengths) == max(lengths) else places <= ends[:, None]
            hidden = self.model.backbone(piece, mask, self.cache)
            ended = (ends >= start) & (ends < start + piece.shape[1])
            chosen = hidden[
                torch.arange(self.batch, device=device), (ends - start).clamp(0, piece.shape[1] - 1)
            ]
            last = torch.where(ended[:, None], chosen, last) if start else chosen
        return self.model.logits(last)
