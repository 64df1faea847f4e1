"""Imported models against the programs that saved them: the same logits from the same random weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import triton
from safetensors.torch import save_file
from torch import Tensor, nn

from mamba_int.float_models.config import MambaConfig
from mamba_int.float_models.models import MambaForSequenceClassification
from quantize.importers import load_float_model

TOLERANCE = 1e-4
VOCAB = 45
SHAPE = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "vocab_size": VOCAB,
    "state_size": 4,
}


@pytest.fixture(autouse=True)
def seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    # These tests are about weights: interpreted kernels, which have their own, would be slow.
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)


def scrambled(model: nn.Module) -> Any:
    """No parameter keeps an initial value that would hide that it is left out or taken for another."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def tokens() -> Tensor:
    return torch.randint(0, VOCAB, (2, 19))


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    assert theirs.abs().max() > 0.1
    assert (ours - theirs).abs().max() < TOLERANCE


def huggingface(kind: str, **settings: Any) -> Any:
    import transformers

    config = {
        "mamba": transformers.MambaConfig,
        "falcon_mamba": transformers.FalconMambaConfig,
        "mamba2": transformers.Mamba2Config,
    }[kind]
    model = {
        "mamba": transformers.MambaForCausalLM,
        "falcon_mamba": transformers.FalconMambaForCausalLM,
        "mamba2": transformers.Mamba2ForCausalLM,
    }[kind]
    if kind == "mamba2":
        settings = {"num_heads": 4, "head_dim": 8, "n_groups": 2, "chunk_size": 8} | settings
    return scrambled(model(config(**SHAPE | settings)))


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("mamba", {}),
        ("mamba", {"tie_word_embeddings": False, "use_bias": True, "hidden_act": "gelu", "conv_kernel": 3}),
        ("mamba", {"expand": 3, "time_step_rank": 5, "use_conv_bias": False, "layer_norm_epsilon": 0.1}),
        ("falcon_mamba", {"mixer_rms_eps": 0.5}),
        ("mamba2", {}),
        ("mamba2", {"tie_word_embeddings": True, "use_bias": True, "time_step_limit": (0.3, 0.6)}),
    ],
)
def test_huggingface_in_shards(tmp_path: Path, kind: str, settings: dict[str, Any]) -> None:
    theirs = huggingface(kind, **settings)
    theirs.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    ours, description = load_float_model(tmp_path)
    assert description.format == "huggingface-" + kind.replace("_", "-")
    assert description.parameters == sum(p.numel() for p in theirs.parameters())
    x = tokens()
    with torch.no_grad():
        assert_close(ours(x).logits, theirs(x).logits)


def test_huggingface_backbone_alone(tmp_path: Path) -> None:
    theirs = huggingface("mamba").backbone
    theirs.save_pretrained(tmp_path)
    ours, description = load_float_model(tmp_path)
    assert description.architecture == "MambaForFeatureExtraction"
    x = tokens()
    with torch.no_grad():
        assert_close(ours(x).hidden, theirs(x).last_hidden_state)


def test_huggingface_embedding_by_its_old_name(tmp_path: Path) -> None:
    theirs = huggingface("mamba")
    theirs.save_pretrained(tmp_path)
    state = {k.replace("embeddings.", "embedding."): v.contiguous() for k, v in theirs.state_dict().items()}
    state["lm_head.weight"] = state["lm_head.weight"].clone()
    save_file(state, tmp_path / "model.safetensors")
    ours, _ = load_float_model(tmp_path)
    x = tokens()
    with torch.no_grad():
        assert_close(ours(x).logits, theirs(x).logits)


def save_state_spaces(theirs: Any, folder: Path, file: str, **settings: Any) -> None:
    """A HuggingFace model as ``mamba_ssm`` saves the same one: padded, both tied weights, one pickle."""
    state = {k.replace("embeddings.", "embedding."): v.clone() for k, v in theirs.state_dict().items()}
    for name in ("backbone.embedding.weight", "lm_head.weight"):
        state[name] = torch.cat([state[name], torch.ones(3, SHAPE["hidden_size"])])
    for name, value in state.items():
        if settings["ssm_cfg"].get("D_has_hdim") and name.endswith(".D"):
            state[name] = value.repeat_interleave(8)
    (folder / "config.json").write_text(
        json.dumps(
            {
                "d_model": 16,
                "d_intermediate": 0,
                "n_layer": 2,
                "vocab_size": VOCAB,
                "attn_layer_idx": [],
                "attn_cfg": {},
                "rms_norm": True,
                "residual_in_fp32": True,
                "fused_add_norm": True,
                "pad_vocab_size_multiple": 8,
            }
            | settings
        )
    )
    if file.endswith(".bin"):
        torch.save(state, folder / file)
    else:
        save_file(state, folder / file)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors"])
def test_state_spaces_mamba(tmp_path: Path, file: str) -> None:
    theirs = huggingface("mamba")
    save_state_spaces(theirs, tmp_path, file, ssm_cfg={"d_state": 4}, tie_embeddings=True)
    ours, description = load_float_model(tmp_path)
    assert description.format == "state-spaces-mamba"
    assert "3 logits" in description.notes[0]
    x = tokens()
    with torch.no_grad():
        assert_close(ours(x).logits, theirs(x).logits)


@pytest.mark.parametrize("wide_skip", [False, True])
def test_state_spaces_mamba2(tmp_path: Path, wide_skip: bool) -> None:
    theirs = huggingface("mamba2", time_step_limit=(0.2, float("inf")))
    ssm_cfg = {
        "layer": "Mamba2",
        "d_state": 4,
        "headdim": 8,
        "ngroups": 2,
        "D_has_hdim": wide_skip,
        "dt_limit": [0.2, float("inf")],
    }
    save_state_spaces(theirs, tmp_path, "pytorch_model.bin", ssm_cfg=ssm_cfg, tie_embeddings=False)
    ours, description = load_float_model(tmp_path)
    assert description.format == "state-spaces-mamba2"
    x = tokens()
    with torch.no_grad():
        assert_close(ours(x).logits, theirs(x).logits)


MINI = {"d_model": 16, "n_layer": 2, "d_state": 4, "expand": 3}


def save_minimamba(theirs: Any, folder: Path, settings: bool) -> None:
    torch.save({"model_state_dict": theirs.state_dict(), "step": 7}, folder / "checkpoint.pt")
    if settings:
        theirs.config.save_to_json(str(folder / "config.json"))


@pytest.mark.parametrize("settings", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_minimamba_language_model(tmp_path: Path, settings: bool, tied: bool) -> None:
    import minimamba

    config = minimamba.MambaLMConfig(vocab_size=VOCAB, tie_embeddings=tied, **MINI)
    theirs = scrambled(minimamba.MambaForCausalLM(config))
    save_minimamba(theirs, tmp_path, settings)
    ours, description = load_float_model(tmp_path)
    assert description.format == "minimamba"
    assert description.parameters == sum(p.numel() for p in theirs.parameters())
    x = tokens()
    with torch.no_grad():
        logits = theirs(x)
        assert_close(ours(x).logits, logits[..., :VOCAB] if settings else logits)


def test_minimamba_first_layout(tmp_path: Path) -> None:
    from minimamba.config import MambaLMConfig
    from minimamba.model import Mamba

    theirs = scrambled(Mamba(MambaLMConfig(vocab_size=VOCAB, bias=True, **MINI)))
    save_minimamba(theirs, tmp_path, True)
    ours, _ = load_float_model(tmp_path)
    x = tokens()
    with torch.no_grad():
        assert_close(ours(x).logits, theirs(x)[..., :VOCAB])


@pytest.mark.parametrize("pooling", ["last", "mean", "max"])
def test_minimamba_classifier(tmp_path: Path, pooling: str) -> None:
    import minimamba

    config = minimamba.MambaClassificationConfig(num_labels=5, pooling_strategy=pooling, **MINI)
    config.vocab_size = VOCAB
    theirs = scrambled(minimamba.MambaForSequenceClassification(config))
    save_minimamba(theirs, tmp_path, True)
    ours, description = load_float_model(tmp_path)
    assert description.architecture == "MambaForSequenceClassification"
    x, mask = tokens(), torch.ones(2, 19, dtype=torch.long)
    mask[1, 12:] = 0
    with torch.no_grad():
        assert_close(ours(x, mask).logits, theirs(x, mask))


@pytest.mark.parametrize("table", [True, False])
def test_minimamba_features(tmp_path: Path, table: bool) -> None:
    import minimamba

    config = minimamba.MambaLMConfig(vocab_size=VOCAB, **MINI) if table else minimamba.BaseMambaConfig(**MINI)
    theirs = scrambled(minimamba.MambaForFeatureExtraction(config))
    save_minimamba(theirs, tmp_path, True)
    ours, _ = load_float_model(tmp_path)
    x = tokens() if table else torch.randn(2, 19, 16)
    with torch.no_grad():
        assert_close(ours(x).hidden, theirs(x))


def as_attributes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace(".", "_"): value for name, value in state.items() if name != "dt_proj.bias"}


def as_flax(prefix: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    def change(state: dict[str, Tensor]) -> dict[str, Tensor]:
        arrays = {}
        for name, value in state.items():
            if name == "conv1d.weight":
                arrays[f"{prefix}conv_weight"] = value.permute(2, 1, 0)
            elif name == "conv1d.bias":
                arrays[f"{prefix}conv_bias"] = value
            elif name.endswith(".weight"):
                arrays[prefix + name.replace(".weight", "/kernel")] = value.T
            else:
                arrays[prefix + name.replace(".", "/")] = value
        return arrays

    return change


@pytest.mark.parametrize("layout", [as_attributes, as_flax(""), as_flax("params/mamba_0/")])
def test_capibara(tmp_path: Path, layout: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    theirs = huggingface("mamba", use_bias=True).backbone.layers[0].mixer
    if layout is as_attributes:
        nn.init.zeros_(theirs.dt_proj.bias)
    arrays = {name: value.numpy() for name, value in layout(theirs.state_dict()).items()}
    np.savez_compressed(tmp_path / "mamba.npz", **arrays)
    ours, description = load_float_model(tmp_path / "mamba.npz")
    assert (description.format, description.architecture) == ("capibara", "Mixer")
    x = torch.randn(2, 19, 16)
    with torch.no_grad():
        assert_close(ours(x), theirs(x))


def test_our_own(tmp_path: Path) -> None:
    config = MambaConfig(mixer="complex_mamba", n_features=3, d_model=8, n_layer=2, d_state=4, num_labels=4)
    theirs = scrambled(MambaForSequenceClassification(config))
    theirs.save_pretrained(tmp_path)
    ours, description = load_float_model(tmp_path)
    assert description.format == "mambaint"
    assert json.loads(json.dumps(description.to_dict()))["config"] == config.to_dict()
    x = torch.randn(2, 19, 3)
    with torch.no_grad():
        assert torch.equal(ours(x).logits, theirs(x).logits)
