"""Float Mamba models: the backbone and its heads, with the names of HuggingFace's parameters.

A step of training waits for nothing on the host and has the same launches every time, so that it can be
captured in a CUDA graph. Under ``torch.autocast`` matrix products and activations are in half precision;
parameters, the residual stream, states and sums stay float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mamba_int.errors import MambaintError

# Importing a mixer registers it.
from mamba_int.float_models import complex_mamba, mamba, mamba2, mamba_integer, quaternion  # noqa: F401
from mamba_int.float_models.bit_linear import BitLinear
from mamba_int.float_models.bit_shift_norm import BitShiftNorm
from mamba_int.float_models.cache import MambaCache
from mamba_int.float_models.checkpoint import SafetensorsReader, read_config
from mamba_int.float_models.config import MambaConfig, Pooling
from mamba_int.float_models.decoder import FloatDecoder
from mamba_int.float_models.mixer import MixerState, build_mixer
from mamba_int.float_models.pretrained import load_parameters, save_pretrained
from mamba_int.generation import Generation, generate
from mamba_int.sampling import FloatSampler, SamplingConfig
from triton_kernels.cross_entropy import IGNORED_LABEL, cross_entropy
from triton_kernels.rms_norm import add_rms_norm

DECAYS = ("A_log", "A_imag", "dt_bias", "base_decay_nums", "Lambda_alpha", "Lambda_imag")
"""Parameters that say how states fade and turn, by their names within a mixer."""


class ModelOutput:
    """What a model returns, also by key: ``outputs["loss"]`` is ``outputs.loss``."""

    def __getitem__(self, name: str) -> Tensor | None:
        if name not in vars(self):
            raise KeyError(f"{name}; there are {', '.join(vars(self))}")
        value: Tensor | None = vars(self)[name]
        return value


class RMSNorm(nn.Module):
    """The residual stream and its norm: arXiv 1910.07467.

    Args:
        width: channels. eps: added to the mean square.
        residual_in_fp32: keep the sum in at least float32.
    """

    def __init__(self, width: int, eps: float, residual_in_fp32: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps
        self.residual_in_fp32 = residual_in_fp32

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """norm(residual + x) in the dtype of the products that follow, and residual + x."""
        device = x.device.type
        autocast = torch.is_autocast_enabled(device)
        out_dtype = torch.get_autocast_dtype(device) if autocast else self.weight.dtype
        residual_dtype = torch.promote_types(x.dtype, torch.float32) if self.residual_in_fp32 else x.dtype
        return add_rms_norm(x, self.weight, residual, self.eps, out_dtype, residual_dtype)


class ResidualSum(nn.Module):
    """The residual stream without a norm.

    Args:
        residual_in_fp32: keep the sum in at least float32.
    """

    def __init__(self, residual_in_fp32: bool) -> None:
        super().__init__()
        self.residual_in_fp32 = residual_in_fp32

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """residual + x, twice."""
        total = x if residual is None else residual + x
        if self.residual_in_fp32:
            total = total.to(torch.promote_types(total.dtype, torch.float32))
        return total, total


class ResidualLayerNorm(nn.Module):
    """The residual stream and its layer norm: arXiv 1607.06450.

    Args:
        width: channels. eps: added to the variance. residual_in_fp32: keep the sum in at least float32.
    """

    def __init__(self, width: int, eps: float, residual_in_fp32: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.eps = eps
        self.sum = ResidualSum(residual_in_fp32)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """norm(residual + x), and residual + x."""
        total, _ = self.sum(x, residual)
        return F.layer_norm(total, self.weight.shape, self.weight, self.bias, self.eps), total


def build_norm(config: MambaConfig, final: bool = False) -> nn.Module:
    """The norm of the residual stream that a configuration names, before blocks or after the last one."""
    c = config
    if final and c.final_norm == "layer":
        return ResidualLayerNorm(c.d_model, c.norm_epsilon, c.residual_in_fp32)
    if c.norm == "none":
        return ResidualSum(c.residual_in_fp32)
    if c.norm == "bit_shift":
        return BitShiftNorm(c.d_model, c.norm_min_shift, c.norm_max_shift, c.residual_in_fp32)
    return RMSNorm(c.d_model, c.norm_epsilon, c.residual_in_fp32)


class MambaBlock(nn.Module):
    """Norm and mixer of a layer; the residual is carried beside."""

    def __init__(self, config: MambaConfig) -> None:
        super().__init__()
        self.norm = build_norm(config)
        self.mixer = build_mixer(config)

    def forward(
        self, x: Tensor, residual: Tensor | None, mask: Tensor | None, state: MixerState | None
    ) -> tuple[Tensor, Tensor]:
        normed, residual = self.norm(x, residual)
        return self.mixer(normed, mask, state), residual


class MambaBackbone(nn.Module):
    """Embedding, layers and final norm. ``embeddings`` is a table, or with n_features a linear map."""

    def __init__(self, config: MambaConfig) -> None:
        super().__init__()
        c = config
        self.config = c
        self.embeddings: nn.Module
        if c.n_features:
            self.embeddings = nn.Linear(c.n_features, c.d_model)
        else:
            self.embeddings = nn.Embedding(c.padded_vocab_size, c.d_model)
            # A norm by powers of two raises small vectors by 2^-norm_min_shift at most.
            nn.init.normal_(self.embeddings.weight, std=1.0 if c.norm == "bit_shift" else 0.02)
        self.layers = nn.ModuleList(MambaBlock(c) for _ in range(c.n_layer))
        self.norm_f = build_norm(c, final=True)
        self.gradient_checkpointing = False
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                # One residual branch a layer (GPT-2, section 2.3).
                if name.endswith("out_proj.weight"):
                    parameter.div_(c.n_layer**0.5)

    def forward(
        self, inputs: Tensor, attention_mask: Tensor | None = None, cache: MambaCache | None = None
    ) -> Tensor:
        """Hidden states [batch, T, d_model] of token ids [batch, T], or of reals [batch, T, n_features].

        Args:
            inputs: the steps.
            attention_mask: [batch, T], zero where a step is padding, left or right.
            cache: of the steps before these; it is brought to the last of these, without gradients.
        """
        mask = None if attention_mask is None else attention_mask.bool()
        x, residual = self.embeddings(inputs), None
        for i, layer in enumerate(self.layers):
            state = None if cache is None else cache.layers[i]
            if self.gradient_checkpointing and self.training and state is None:
                x, residual = checkpoint(layer, x, residual, mask, None, use_reentrant=False)
            else:
                x, residual = layer(x, residual, mask, state)
        if cache is not None:
            cache.advance(inputs.shape[1], mask)
        hidden: Tensor = self.norm_f(x, residual)[0]
        return hidden


def pool(hidden: Tensor, pooling: Pooling, attention_mask: Tensor | None = None) -> Tensor:
    """One vector [batch, d_model] for each sequence of hidden states [batch, T, d_model].

    Args:
        hidden: of all steps.
        pooling: the ``last`` step, or the ``mean`` or ``max`` of all.
        attention_mask: [batch, T], zero where a step is padding, left or right, which does not count. A
            sequence of nothing but padding gives zeros.
    """
    if attention_mask is None:
        if pooling == "last":
            return hidden[:, -1]
        return hidden.mean(1) if pooling == "mean" else hidden.amax(1)
    mask = attention_mask.bool()
    if pooling == "last":
        steps = torch.arange(mask.shape[1], device=mask.device)
        last = (steps * mask).amax(1)
        pooled = hidden[torch.arange(len(hidden), device=mask.device), last]
    elif pooling == "mean":
        pooled = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
    else:
        pooled = hidden.masked_fill(~mask[..., None], -torch.inf).amax(1)
    return torch.where(mask.any(1, keepdim=True), pooled, 0.0).to(hidden.dtype)


class MambaModel(nn.Module):
    """A backbone and what stands on it; the base of the three models.

    Attributes:
        architecture: what its files name it.
    """

    architecture: ClassVar[str]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "architecture" not in vars(cls):
            cls.architecture = cls.__name__

    def __init__(self, config: MambaConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = MambaBackbone(config)

    def new_cache(self, batch: int) -> MambaCache:
        """An empty cache for so many sequences."""
        parameter = next(self.parameters())
        mixers = [layer.mixer for layer in self.backbone.layers if isinstance(layer, MambaBlock)]
        return MambaCache(mixers, batch, parameter.device, parameter.dtype)

    def parameter_roles(self) -> dict[str, list[nn.Parameter]]:
        """Every parameter once: ``matrices`` (projections), ``embeddings``, ``decays``, ``small`` ones."""
        roles: dict[str, list[nn.Parameter]] = {"matrices": [], "embeddings": [], "decays": [], "small": []}
        for name, parameter in self.named_parameters():
            key = name.rpartition(".")[2]
            if name == "backbone.embeddings.weight" and not self.config.n_features:
                roles["embeddings"].append(parameter)
            elif key in DECAYS or name.endswith("dt_proj.bias"):
                roles["decays"].append(parameter)
            else:
                matrix = key == "weight" and parameter.ndim == 2
                roles["matrices" if matrix else "small"].append(parameter)
        return roles

    def save_pretrained(self, folder: Path) -> None:
        """Write ``config.json`` and ``model.safetensors`` to a folder."""
        save_pretrained(self, self.config, self.architecture, folder)

    @classmethod
    def from_pretrained(cls, folder: Path) -> Self:
        """Read what :meth:`save_pretrained` wrote; the weights may be in shards. The model is in eval mode.

        Raises:
            MambaintError: for another architecture, weights that are missing, damaged, too many, of a wrong
                shape or dtype, or not finite.
        """
        architecture, config = read_config(folder)
        if architecture != cls.architecture:
            raise MambaintError(
                f"{folder} is a {architecture}", f"read it with {architecture}.from_pretrained"
            )
        model = cls(config)
        load_parameters(model, SafetensorsReader(folder), str(folder))
        return model.eval()


@dataclass
class FeatureOutput(ModelOutput):
    """Hidden states of all steps [batch, T, d_model], and the pooled ones [batch, d_model]."""

    hidden: Tensor
    pooled: Tensor


class MambaForFeatureExtraction(MambaModel):
    """Hidden states, of each step and of the whole sequence."""

    def forward(
        self, inputs: Tensor, attention_mask: Tensor | None = None, cache: MambaCache | None = None
    ) -> FeatureOutput:
        """See :meth:`MambaBackbone.forward`; what is pooled are the steps of this call."""
        hidden = self.backbone(inputs, attention_mask, cache)
        return FeatureOutput(hidden, pool(hidden, self.config.pooling, attention_mask))


@dataclass
class ClassificationOutput(ModelOutput):
    """Logits [batch, num_labels]; the mean loss in nats, if there were labels."""

    logits: Tensor
    loss: Tensor | None = None


class MambaForSequenceClassification(MambaModel):
    """One class for each sequence."""

    def __init__(self, config: MambaConfig) -> None:
        super().__init__(config)
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(config.d_model, config.num_labels)

    def forward(
        self, inputs: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> ClassificationOutput:
        """Logits, and the loss for ``labels``, int64 [batch]; see :meth:`MambaBackbone.forward`."""
        pooled = pool(self.backbone(inputs, attention_mask), self.config.pooling, attention_mask)
        logits = self.classifier(self.dropout(pooled))
        return ClassificationOutput(logits, None if labels is None else cross_entropy(logits, labels))


@dataclass
class CausalLMOutput(ModelOutput):
    """Logits [batch, T, vocab_size]; the mean loss in nats per predicted token, if there were labels."""

    logits: Tensor
    loss: Tensor | None = None


class MambaForCausalLM(MambaModel):
    """The language model: the next token of every step."""

    def __init__(self, config: MambaConfig) -> None:
        if config.n_features:
            raise MambaintError(
                f"[model] n_features = {config.n_features}", "a language model reads tokens: set it to 0"
            )
        super().__init__(config)
        make = BitLinear if config.head == "bit_linear" else nn.Linear
        self.lm_head = make(config.d_model, config.padded_vocab_size, bias=False)
        if config.tie_embeddings:
            assert isinstance(self.backbone.embeddings, nn.Embedding)
            self.lm_head.weight = self.backbone.embeddings.weight

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        cache: MambaCache | None = None,
    ) -> CausalLMOutput:
        """Logits, and the loss of predicting each label from the steps before it.

        Args:
            input_ids: int64 [batch, T].
            attention_mask: [batch, T], zero where a token is padding, left or right.
            labels: int64 [batch, T], usually ``input_ids`` themselves: they are shifted here. Those equal to
                ``IGNORED_LABEL`` and those of padding are not counted.
            cache: see :meth:`MambaBackbone.forward`.
        """
        logits = self.logits(self.backbone(input_ids, attention_mask, cache))
        if labels is None:
            return CausalLMOutput(logits)
        if attention_mask is not None:
            labels = labels.masked_fill(attention_mask == 0, IGNORED_LABEL)
        # Shifting the labels instead of cutting the logits leaves those in one piece.
        targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL)
        loss = cross_entropy(logits.flatten(0, 1), targets.flatten())
        return CausalLMOutput(logits, loss)

    def logits(self, hidden: Tensor) -> Tensor:
        """The head on hidden states, without the rows that pad the vocabulary."""
        logits: Tensor = self.lm_head(hidden)
        if self.config.scale_logits:
            logits = logits / math.sqrt(self.config.d_model)
        if logits.shape[-1] == self.config.vocab_size:
            return logits
        return logits[..., : self.config.vocab_size]

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        sampling: SamplingConfig | None = None,
        stop_tokens: Collection[int] = (),
        on_token: Callable[[int, int], bool] | None = None,
        cuda_graph: bool = False,
    ) -> Generation:
        """Continue prompts of any lengths together; see ``mamba_int.generation.generate``.

        Args:
            prompts: token ids, at least one each.
            max_tokens: most new tokens of a sequence.
            sampling: how tokens are chosen; greedily if not given.
            stop_tokens: a sequence ends before one of these.
            on_token: called with the sequence and its new token at once; True ends that sequence.
            cuda_graph: capture a step once and replay it, on a CUDA device.
        """
        training = self.training
        self.eval()
        try:
            decoder = FloatDecoder(self, len(prompts), cuda_graph)
            sampler = FloatSampler(sampling or SamplingConfig(temperature=0.0), len(prompts))
            return generate(decoder, prompts, sampler, max_tokens, stop_tokens, on_token)
        finally:
            self.train(training)
