"""Float Mamba models: the backbone and its heads, with the names of HuggingFace's parameters.

A step of training waits for nothing on the host and has the same launches every time, so that it can be
captured in a CUDA graph. Under ``torch.autocast`` matrix products and activations are in half precision;
parameters, the residual stream, states and sums stay float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# Importing a mixer registers it.
from mamba_int.float_models import mamba, mamba2  # noqa: F401
from mamba_int.float_models.config import MambaConfig
from mamba_int.float_models.mixer import MixerState, build_mixer
from triton_kernels.cross_entropy import IGNORED_LABEL, cross_entropy
from triton_kernels.rms_norm import add_rms_norm


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


class MambaBlock(nn.Module):
    """Norm and mixer of a layer; the residual is carried beside."""

    def __init__(self, config: MambaConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.d_model, config.norm_epsilon, config.residual_in_fp32)
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
            nn.init.normal_(self.embeddings.weight, std=0.02)
        self.layers = nn.ModuleList(MambaBlock(c) for _ in range(c.n_layer))
        self.norm_f = RMSNorm(c.d_model, c.norm_epsilon, c.residual_in_fp32)
        self.gradient_checkpointing = False
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                # One residual branch a layer (GPT-2, section 2.3).
                if name.endswith("out_proj.weight"):
                    parameter.div_(c.n_layer**0.5)

    def forward(
        self, inputs: Tensor, attention_mask: Tensor | None = None, states: list[MixerState] | None = None
    ) -> Tensor:
        """Hidden states [batch, T, d_model] of token ids [batch, T], or of reals [batch, T, n_features].

        Args:
            inputs: the steps.
            attention_mask: [batch, T], zero where a step is padding, left or right.
            states: of all layers, for the steps before these; they are advanced in place.
        """
        mask = None if attention_mask is None else attention_mask.bool()
        x, residual = self.embeddings(inputs), None
        for i, layer in enumerate(self.layers):
            state = None if states is None else states[i]
            if self.gradient_checkpointing and self.training and state is None:
                x, residual = checkpoint(layer, x, residual, mask, None, use_reentrant=False)
            else:
                x, residual = layer(x, residual, mask, state)
        hidden: Tensor = self.norm_f(x, residual)[0]
        return hidden


@dataclass
class CausalLMOutput:
    """Logits [batch, T, vocab_size]; the mean loss in nats per predicted token, if there were labels."""

    logits: Tensor
    loss: Tensor | None = None


class MambaForCausalLM(nn.Module):
    """The language model: the next token of every step."""

    def __init__(self, config: MambaConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = MambaBackbone(config)
        self.lm_head = nn.Linear(config.d_model, config.padded_vocab_size, bias=False)
        if config.tie_embeddings:
            assert isinstance(self.backbone.embeddings, nn.Embedding)
            self.lm_head.weight = self.backbone.embeddings.weight

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        states: list[MixerState] | None = None,
    ) -> CausalLMOutput:
        """Logits, and the loss of predicting each label from the steps before it.

        Args:
            input_ids: int64 [batch, T].
            attention_mask: [batch, T], zero where a token is padding, left or right.
            labels: int64 [batch, T], usually ``input_ids`` themselves: they are shifted here. Those equal to
                ``IGNORED_LABEL`` and those of padding are not counted.
            states: see :meth:`MambaBackbone.forward`.
        """
        logits = self.logits(self.backbone(input_ids, attention_mask, states))
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
        if logits.shape[-1] == self.config.vocab_size:
            return logits
        return logits[..., : self.config.vocab_size]
