"""Every source that the README names, from its file to the integers of three backends."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import triton

from circuits.runtime.runner import OnnxRunner
from mamba_int.float_models.config import MambaConfig
from mamba_int.float_models.models import MambaForSequenceClassification
from mamba_int.graph import IntArray
from mamba_int.interpreter import evaluate
from quantize.calibration import input_features, trace
from quantize.equality import compare, torch_tracer
from quantize.float_mamba import InputFormat, convert
from quantize.importers import load_float_model
from tests.quantize.importers.test_against_libraries import (
    MINI,
    VOCAB,
    as_attributes,
    as_flax,
    huggingface,
    save_minimamba,
    save_state_spaces,
    scrambled,
)
from tests.quantize.importers.test_mamba_integer import tensors_of
from tests.quantize.importers.test_quaternion import checkpoint as quaternion_checkpoint
from tests.quantize.importers.test_quaternion import saved as quaternion_saved
from tests.quantize.test_mamba_integer import model_of

FORMAT = InputFormat(-64, 64, 5)


@pytest.fixture(autouse=True)
def seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    # This is about files and integers; interpreted kernels, which have their own tests, would be slow.
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)


def huggingface_folder(kind: str, **settings: Any) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        huggingface(kind, **settings).save_pretrained(folder, max_shard_size="10KB")
        return folder

    return write


def state_spaces_mamba(folder: Path) -> Path:
    save_state_spaces(
        huggingface("mamba"), folder, "pytorch_model.bin", ssm_cfg={"d_state": 4}, tie_embeddings=True
    )
    return folder


def state_spaces_mamba2(folder: Path) -> Path:
    ssm_cfg = {"layer": "Mamba2", "d_state": 4, "headdim": 8, "ngroups": 2, "D_has_hdim": True}
    save_state_spaces(
        huggingface("mamba2"), folder, "model.safetensors", ssm_cfg=ssm_cfg, tie_embeddings=False
    )
    return folder


def minimamba(folder: Path) -> Path:
    import minimamba

    config = minimamba.MambaLMConfig(vocab_size=VOCAB, **MINI)
    save_minimamba(scrambled(minimamba.MambaForCausalLM(config)), folder, True)
    return folder


def minimamba_first_layout(folder: Path) -> Path:
    from minimamba.config import MambaLMConfig
    from minimamba.model import Mamba

    save_minimamba(scrambled(Mamba(MambaLMConfig(vocab_size=VOCAB, bias=True, **MINI))), folder, True)
    return folder


def minimamba_classifier(folder: Path) -> Path:
    import minimamba

    config = minimamba.MambaClassificationConfig(num_labels=5, pooling_strategy="mean", **MINI)
    config.vocab_size = VOCAB
    save_minimamba(scrambled(minimamba.MambaForSequenceClassification(config)), folder, True)
    return folder


def minimamba_features(folder: Path) -> Path:
    import minimamba

    config = minimamba.BaseMambaConfig(**MINI)
    save_minimamba(scrambled(minimamba.MambaForFeatureExtraction(config)), folder, True)
    return folder


def capibara(layout: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        theirs = huggingface("mamba", use_bias=True).backbone.layers[0].mixer
        if layout is as_attributes:
            torch.nn.init.zeros_(theirs.dt_proj.bias)
        path = folder / "mamba.npz"
        np.savez_compressed(path, **{n: v.numpy() for n, v in layout(theirs.state_dict()).items()})
        return path

    return write


def mamba_integer(version: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        path = folder / "model.pt"
        torch.save(
            {f"_orig_mod.{name}": value for name, value in tensors_of(model_of(version)).items()}, path
        )
        return path

    return write


def quaternion(lite: bool) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        return quaternion_saved(folder / "checkpoint.pt", quaternion_checkpoint(lite))

    return write


def ours(folder: Path) -> Path:
    config = MambaConfig(
        mixer="mamba2", n_features=3, d_model=8, n_layer=2, d_state=4, headdim=4, num_labels=4
    )
    scrambled(MambaForSequenceClassification(config)).save_pretrained(folder)
    return folder


SOURCES: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "HuggingFace Mamba": ("huggingface-mamba", huggingface_folder("mamba")),
    "HuggingFace FalconMamba": ("huggingface-falcon-mamba", huggingface_folder("falcon_mamba")),
    "HuggingFace Mamba-2": ("huggingface-mamba2", huggingface_folder("mamba2")),
    "state-spaces Mamba": ("state-spaces-mamba", state_spaces_mamba),
    "state-spaces Mamba-2": ("state-spaces-mamba2", state_spaces_mamba2),
    "MiniMamba": ("minimamba", minimamba),
    "MiniMamba, first layout": ("minimamba", minimamba_first_layout),
    "MiniMamba classifier": ("minimamba", minimamba_classifier),
    "MiniMamba features": ("minimamba", minimamba_features),
    "Mamba-Integer V1": ("mamba-integer", mamba_integer("mamba_integer_v1")),
    "Mamba-Integer V2": ("mamba-integer", mamba_integer("mamba_integer_v2")),
    "Capibara": ("capibara", capibara(as_attributes)),
    "Capibara, Flax": ("capibara", capibara(as_flax("params/mamba_0/"))),
    "Quaternion Mamba-2": ("quaternion", quaternion(False)),
    "Quaternion Mamba-2, lite": ("quaternion", quaternion(True)),
    "mambaint": ("mambaint", ours),
}
"""Format and writer of a small checkpoint of every source."""


@pytest.mark.parametrize("source", SOURCES)
def test_a_source_becomes_integers_that_follow_its_floats(tmp_path: Path, source: str) -> None:
    wanted, write = SOURCES[source]
    model, description = load_float_model(write(tmp_path))
    assert description.format == wanted
    features = input_features(model)
    if features:
        whole = torch.randint(FORMAT.low, FORMAT.high + 1, (24, 19, features))
        inputs, form = whole * 2.0**-FORMAT.frac, FORMAT
    else:
        whole = inputs = torch.randint(0, model.config.vocab_size, (24, 19))
        form = None
    graph = convert(model, inputs, form).graph
    integers: IntArray = whole.numpy()
    equality = compare(graph, integers[:4], {"torch": torch_tracer(graph), "onnx": OnnxRunner(graph)})
    assert equality.equal, equality.first
    with torch.no_grad():
        exact = trace(model, inputs, lambda name, value: None).double().numpy()
    found = evaluate(graph, integers) * 2.0 ** -graph.by_name[graph.output].frac
    assert float(np.square(found - exact).mean() / exact.var()) < 0.03
