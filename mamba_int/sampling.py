"""Choosing tokens from logits, in integers: the same in any batch, from integer logits also on any device."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mamba_int.errors import MambaintError
from mamba_int.graph import Graph

WEIGHT_BITS = 32
"""The likeliest token weighs 2^32; one less than half a 2^32th as likely is never chosen."""
MOST_WEIGHTS = 1 << 24
"""Entries of the largest table of weights."""
MAX_TEMPERATURE = 100.0


@dataclass(frozen=True)
class SamplingConfig:
    """How a token is chosen.

    Attributes:
        temperature: divides the logits; 0 is greedy, the likeliest token, of equals the first.
        top_k: only the k likeliest tokens; 0 for all. Of equals the first.
        top_p: only the fewest likeliest tokens that together have at least this probability, after ``top_k``
            (nucleus sampling, Holtzman et al. 2020, arXiv 1904.09751).
        seed: of the random numbers.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= MAX_TEMPERATURE:
            raise MambaintError(
                f"temperature = {self.temperature}", f"choose 0 (greedy) to {MAX_TEMPERATURE:g}"
            )
        if self.top_k < 0:
            raise MambaintError(f"top_k = {self.top_k}", "choose 1 or more, or 0 for all tokens")
        if not 0 < self.top_p <= 1:
            raise MambaintError(f"top_p = {self.top_p}", "choose a probability above 0, up to 1")
        if self.seed < 0:
            raise MambaintError(f"seed = {self.seed}", "choose 0 or more")


class Sampler:
    """Chooses one token for each of a batch of sequences, step after step.

    A token whose logit is d below the largest weighs round(2^32 exp(-d 2^-frac / temperature)), from a table
    that NumPy makes once; after that there are only integers, and one product of a uniform number with their
    sum. Row i draws from a generator of its own, seeded by (seed, i) alone: what it chooses depends on its
    own logits and its place in the batch, neither on the batch's size nor on the device.

    Args:
        graph: its logits' binary places and bounds.
        config: how to choose.
        batch: number of sequences.
        device: where the logits are.

    Raises:
        MambaintError: for a temperature at which the table is too large.
    """

    def __init__(
        self, graph: Graph, config: SamplingConfig, batch: int, device: torch.device | str = "cpu"
    ) -> None:
        self.config = config
        if config.temperature == 0:
            return
        self._generators = row_generators(config, batch)
        logits = graph.types[graph.output]
        step = 2.0 ** -graph.by_name[graph.output].frac / config.temperature
        # From here on a weight rounds to 0.
        reach = math.ceil((WEIGHT_BITS + 1) * math.log(2) / step) + 1
        entries = min(reach, logits.high - logits.low) + 1
        if entries > MOST_WEIGHTS:
            raise MambaintError(
                f"temperature {config.temperature:g} needs a table of {entries} weights", "choose a lower one"
            )
        weights = np.floor(np.exp(-np.arange(entries) * step) * 2.0**WEIGHT_BITS + 0.5)
        self._weights = torch.from_numpy(weights.astype(np.int64)).to(device)

    @torch.inference_mode()
    def __call__(self, logits: Tensor) -> Tensor:
        """Token ids int64 [batch] from integer logits [batch, vocabulary]."""
        if self.config.temperature == 0:
            return logits.argmax(-1)
        # Stable: of equal logits the first token comes first.
        ordered, tokens = logits.sort(stable=True, dim=-1, descending=True)
        distance = (ordered[:, :1] - ordered).clamp(max=len(self._weights) - 1)
        return tokens.gather(-1, draw(self._weights[distance], self.config, self._generators))[:, 0]


class FloatSampler:
    """As :class:`Sampler`, from the float logits of a float model; the weights are rounded to 2^-32.

    Args:
        config: how to choose.
        batch: number of sequences.
    """

    def __init__(self, config: SamplingConfig, batch: int) -> None:
        self.config = config
        self._generators = row_generators(config, batch)

    @torch.inference_mode()
    def __call__(self, logits: Tensor) -> Tensor:
        """Token ids int64 [batch] from logits [batch, vocabulary].

        Raises:
            MambaintError: if a largest logit is not finite.
        """
        ordered, tokens = logits.double().sort(stable=True, dim=-1, descending=True)
        # NaN counts as the largest.
        if not torch.isfinite(ordered[:, 0]).all():
            raise MambaintError("the logits are not finite", "check the weights of the model")
        if self.config.temperature == 0:
            return tokens[:, 0]
        likeliness = torch.exp((ordered - ordered[:, :1]) / self.config.temperature)
        weights = torch.floor(likeliness * 2.0**WEIGHT_BITS + 0.5).long()
        return tokens.gather(-1, draw(weights, self.config, self._generators))[:, 0]


def row_generators(config: SamplingConfig, batch: int) -> list[np.random.Generator]:
    """A generator of random numbers for every row, seeded by the config's seed and the row."""
    return [np.random.default_rng([config.seed, row]) for row in range(batch)]


def draw(weights: Tensor, config: SamplingConfig, generators: list[np.random.Generator]) -> Tensor:
    """A place [batch, 1] in each row of int64 weights [batch, vocabulary], which are in falling order."""
    if config.top_k:
        weights[:, config.top_k :] = 0
    if config.top_p < 1:
        before = weights.cumsum(-1) - weights
        weights = weights * (before < weights.sum(-1, keepdim=True) * config.top_p)
    sums = weights.cumsum(-1)
    total = sums[:, -1:]
    uniform = torch.tensor([[generator.random()] for generator in generators], dtype=torch.float64)
    drawn = (uniform.to(weights.device) * total).long()
    # The product may round up to the sum itself.
    return (sums <= torch.minimum(drawn, total - 1)).sum(-1, keepdim=True)
