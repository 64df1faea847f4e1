"""Checkpoints that must be refused with one line that names the tensor or the file."""

from __future__ import annotations

import functools
import io
import json
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file
from torch import Tensor

from mamba_int.errors import MambaintError
from mamba_int.float_models.config import MambaConfig
from mamba_int.float_models.models import MambaForCausalLM
from quantize.importers import IMPORTERS, load_float_model

NAME = "backbone.layers.0.mixer.x_proj.weight"
CONFIG = MambaConfig(vocab_size=11, pad_vocab_size_multiple=1, d_model=8, n_layer=2, d_state=3)
SETTINGS: dict[str, Any] = {
    "model_type": "mamba",
    "vocab_size": 11,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "state_size": 3,
}


def weights() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {name: p.detach().clone() for name, p in MambaForCausalLM(CONFIG).named_parameters()}


def write(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any] | None = None) -> Path:
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(SETTINGS if config is None else config))
    return folder


def refused(path: Path, *parts: str, format: str | None = None) -> str:
    with pytest.raises(MambaintError) as caught:
        load_float_model(path, format)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message
    return message


def test_sound_folder_is_read_and_leaves_the_random_numbers_alone(tmp_path: Path) -> None:
    tensors = weights()
    before = torch.random.get_rng_state()
    model, description = load_float_model(write(tmp_path, tensors))
    assert torch.equal(before, torch.random.get_rng_state())
    assert not model.training
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, tensors[name])
    assert description.dtypes == {"float32": len(tensors)}


def test_all_wrong_keys_are_in_one_message(tmp_path: Path) -> None:
    tensors = weights()
    tensors["backbone.layers.0.mixer.rotary.weight"] = torch.ones(2)
    del tensors["backbone.layers.1.mixer.D"]
    tensors[NAME] = tensors[NAME].T
    refused(
        write(tmp_path, tensors),
        "lacks backbone.layers.1.mixer.D",
        "unknown backbone.layers.0.mixer.rotary.weight",
        f"{NAME} [16, 7] instead of [7, 16]",
    )


def test_no_key_can_be_missing(tmp_path: Path) -> None:
    tensors = weights()
    for name in tensors:
        refused(write(tmp_path, {k: v for k, v in tensors.items() if k != name}), f"lacks {name};")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e300])
def test_values_that_are_no_finite_float32(tmp_path: Path, value: float) -> None:
    tensors = weights()
    tensors[NAME] = tensors[NAME].double()
    tensors[NAME][3, 2] = value
    refused(write(tmp_path, tensors), NAME, "1 values that are NaN or infinite")


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.float8_e4m3fn, torch.complex64])
def test_dtypes_that_are_no_weights(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = weights()
    tensors[NAME] = tensors[NAME].to(dtype)
    refused(write(tmp_path, tensors), NAME)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_of_training(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {name: t.to(dtype) for name, t in weights().items()}
    model, description = load_float_model(write(tmp_path, tensors))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, tensors[name].float())
    assert description.dtypes == {str(dtype).removeprefix("torch."): len(tensors)}


class Payload:
    """What a hostile pickle runs."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (Path(self.path),)

    def __init__(self, path: Path) -> None:
        self.path = str(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickle_with_code_is_refused_and_not_run(tmp_path: Path, zipped: bool) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SETTINGS))
    content = weights() | {"hook": Payload(tmp_path / "ran")}
    torch.save(content, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    refused(tmp_path, "pytorch_model.bin", "safetensors")
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "pytorch_model.bin", weights_only=False)
    assert (tmp_path / "ran").exists(), "the test's own payload is dead"


def test_other_pickles_are_not_opened(tmp_path: Path) -> None:
    (tmp_path / "model.pkl").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    refused(tmp_path / "model.pkl", "is a pickle")
    refused(tmp_path, "has none")


def test_torch_tensor_larger_than_its_bytes(tmp_path: Path) -> None:
    tensors = weights() | {NAME: torch.zeros(1, 1).expand(7, 16)}
    (tmp_path / "config.json").write_text(json.dumps(SETTINGS))
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    refused(tmp_path, NAME, "larger than its bytes")


def test_torch_file_without_weights(tmp_path: Path) -> None:
    for content in ([1.0], {"step": 3}, {"model": weights(), "state_dict": weights()}, torch.ones(3)):
        torch.save(content, tmp_path / "a.pt")
        refused(tmp_path / "a.pt", "no dictionary of tensors")


def test_safetensors_that_lies_about_its_size(tmp_path: Path) -> None:
    path = write(tmp_path, weights()) / "model.safetensors"
    content = path.read_bytes()
    for damaged in (content[:-4], content + bytes(4), struct.pack("<Q", 1 << 40) + content[8:], b""):
        path.write_bytes(damaged)
        refused(tmp_path, "model.safetensors")
    assert b'"shape":[7,16]' in content
    path.write_bytes(content.replace(b'"shape":[7,16]', b'"shape":[9,16]', 1))
    refused(tmp_path, "model.safetensors")


def npz(path: Path, header: dict[str, Any], data: bytes) -> Path:
    member = io.BytesIO()
    np.lib.format.write_array_header_1_0(member, header)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("A_log.npy", member.getvalue() + data)
    return path


def test_npz_that_lies_about_its_size_or_holds_objects(tmp_path: Path) -> None:
    header = {"descr": "<f4", "fortran_order": False, "shape": (1 << 40,)}
    refused(npz(tmp_path / "a.npz", header, bytes(64)), "A_log", "another size than its bytes")
    header = {"descr": "|O", "fortran_order": False, "shape": (2,)}
    refused(npz(tmp_path / "b.npz", header, bytes(16)), "A_log", "pickled objects")
    (tmp_path / "c.npz").write_bytes(b"PK\x03\x04")
    refused(tmp_path / "c.npz", "not a whole npz file")


def shards(folder: Path) -> dict[str, Any]:
    tensors = weights()
    write(folder, tensors)
    (folder / "model.safetensors").unlink()
    files = ("model-1-of-2.safetensors", "model-2-of-2.safetensors")
    names = sorted(tensors)
    weight_map = {}
    for file, part in zip(files, (names[:9], names[9:]), strict=True):
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    return weight_map


def test_index_that_lies(tmp_path: Path) -> None:
    weight_map = shards(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    load_float_model(tmp_path)
    load_float_model(index)
    for file in ("../model-1-of-2.safetensors", "/etc/passwd", "model-3-of-2.safetensors"):
        index.write_text(json.dumps({"weight_map": weight_map | {NAME: file}}))
        refused(tmp_path, file)
    other = next(file for file in weight_map.values() if file != weight_map[NAME])
    index.write_text(json.dumps({"weight_map": weight_map | {NAME: other}}))
    refused(tmp_path, NAME, other)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"vocab_size": 1 << 24, "hidden_size": 1 << 16}, "backbone.embeddings.weight [11, 8] instead of"),
        ({"num_hidden_layers": 40}, "and 372 more"),
        ({"num_hidden_layers": 1 << 40}, "n_layer"),
        ({"num_hidden_layers": 2.5}, "whole number"),
        ({"num_hidden_layers": float("nan")}, "whole number"),
        ({"hidden_size": "8"}, "hidden_size"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"hidden_act": "mish"}, "mish"),
        ({"tie_word_embeddings": 1}, "true or false"),
        ({"layer_norm_epsilon": float("inf")}, "finite"),
        ({"model_type": "jamba"}, "'jamba'"),
        ({"model_type": ["mamba"]}, "no known architecture"),
        ({"model_type": "mamba2", "time_step_limit": [0.5, 0.1]}, "least < most"),
        ({"model_type": "mamba2", "time_step_limit": [0.5]}, "pair"),
        ({"model_type": "mamba2", "num_heads": 3, "head_dim": 8, "n_groups": 1}, "num_heads = 3"),
    ],
)
def test_settings_that_lie_are_found_before_memory_is_taken(
    tmp_path: Path, change: dict[str, Any], part: str
) -> None:
    refused(write(tmp_path, weights(), SETTINGS | change), part)


def test_settings_that_cannot_be_read(tmp_path: Path) -> None:
    folder = write(tmp_path, weights())
    for content in ("{", "[1]", "[" * 100_000, "\udcff"):
        (folder / "config.json").write_bytes(content.encode(errors="surrogateescape"))
        refused(folder, "config.json")
    (folder / "config.json").unlink()
    refused(folder, "no known architecture", "there is no", "config.json")
    refused(folder, "there is no", "config.json", format="huggingface-mamba")


def test_paths_without_one_checkpoint(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "there is no")
    refused(tmp_path, "has none")
    for name in ("a.pt", "b.npz"):
        (tmp_path / name).write_bytes(b"")
    refused(tmp_path, "2 files of weights (a.pt, b.npz)")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    refused(tmp_path / "model.gguf", "of no known kind")


def test_format_by_name(tmp_path: Path) -> None:
    folder = write(tmp_path, weights())
    assert load_float_model(folder, "huggingface-mamba")[1].format == "huggingface-mamba"
    refused(folder, "did you mean 'huggingface-mamba2'", format="hugingface-mamba2")
    for name in IMPORTERS:
        if name not in ("huggingface-mamba", "huggingface-falcon-mamba"):
            refused(folder, format=name)


def test_names_with_wrappers(tmp_path: Path) -> None:
    tensors = weights()
    compiled = {f"module._orig_mod.{name}": t for name, t in tensors.items()}
    assert load_float_model(write(tmp_path, compiled))[1].parameters > 0
    layers = {name.replace("layers.0.", "layers.0._orig_mod."): t for name, t in tensors.items()}
    assert load_float_model(write(tmp_path, layers))[1].parameters > 0
    refused(write(tmp_path, tensors | {f"_orig_mod.{NAME}": torch.ones(7, 16)}), "has both", NAME)


def test_tied_weights_that_differ(tmp_path: Path) -> None:
    tensors = weights()
    head = tensors["backbone.embeddings.weight"].clone()
    assert load_float_model(write(tmp_path, tensors | {"lm_head.weight": head}))[1].parameters > 0
    refused(write(tmp_path, tensors | {"lm_head.weight": head + 1}), "lm_head.weight is tied")
    refused(write(tmp_path, tensors | {"lm_head.weight": head[:5]}), "lm_head.weight [5, 8] instead of")


STATE_SPACES: dict[str, Any] = {
    "d_model": 8,
    "n_layer": 2,
    "vocab_size": 11,
    "pad_vocab_size_multiple": 1,
    "ssm_cfg": {"d_state": 3},
}


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"attn_layer_idx": [1]}, "attention"),
        ({"d_intermediate": 32}, "feed-forward"),
        ({"rms_norm": False}, "LayerNorms"),
        ({"ssm_cfg": {"layer": "Mamba3"}}, "no known architecture"),
        ({"ssm_cfg": {"d_stat": 3}}, "unknown d_stat"),
        ({"ssm_cfg": {"dt_rank": "big"}}, "dt_rank"),
        ({"ssm_cfg": [3]}, "a table"),
        ({"ssm_cfg": {"layer": "Mamba2", "headdim": 8, "rmsnorm": False}}, "rmsnorm"),
        ({"ssm_cfg": {"layer": "Mamba2", "headdim": 8, "norm_before_gate": True}}, "norm_before_gate"),
        ({"ssm_cfg": {"layer": "Mamba2", "headdim": 8, "d_ssm": 8}}, "d_ssm"),
    ],
)
def test_forms_of_state_spaces_that_no_float_model_has(
    tmp_path: Path, change: dict[str, Any], part: str
) -> None:
    tensors = {name.replace("embeddings", "embedding"): t for name, t in weights().items()}
    assert load_float_model(write(tmp_path, tensors, STATE_SPACES))[1].format == "state-spaces-mamba"
    refused(write(tmp_path, tensors, STATE_SPACES | change), part)


def test_capibara_with_another_gelu_or_several_modules(tmp_path: Path) -> None:
    mixer = {
        name.rpartition(".mixer.")[2].replace(".", "_"): t.numpy()
        for name, t in weights().items()
        if ".0.mixer." in name and not name.endswith("dt_proj.bias")
    }
    np.savez(tmp_path / "a.npz", **mixer)
    assert load_float_model(tmp_path)[1].format == "capibara"
    (tmp_path / "config.json").write_text('{"activation": "gelu"}')
    refused(tmp_path, "gelu")
    kernels = {f"layer_{i}/in_proj/kernel": np.ones((2, 2)) for i in range(2)}
    np.savez(tmp_path / "a.npz", **kernels)
    refused(tmp_path, "holds 2 modules")


def test_layer_that_is_left_out_of_a_state_dict(tmp_path: Path) -> None:
    names = {"backbone.embeddings.weight": "embedding.weight"}
    legacy = {names.get(name, name.removeprefix("backbone.")): t for name, t in weights().items()}
    torch.save(legacy, tmp_path / "a.pt")
    load_float_model(tmp_path / "a.pt")
    torch.save({name.replace("layers.1.", "layers.2."): t for name, t in legacy.items()}, tmp_path / "a.pt")
    refused(tmp_path / "a.pt", "lacks layers.1.norm.weight")


@functools.cache
def sound(file: str) -> bytes:
    """The bytes of a sound file of weights."""
    tensors = weights()
    stream = io.BytesIO()
    if file == "model.safetensors":
        return save(tensors)
    if file == "pytorch_model.bin":
        torch.save(tensors, stream)
    else:
        np.savez_compressed(stream, **{name: t.numpy() for name, t in tensors.items()})
    return stream.getvalue()


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin", "a.npz"])
@settings(max_examples=30, deadline=None)
@given(st.data())
def test_damaged_bytes_give_an_error_or_a_model(
    tmp_path_factory: pytest.TempPathFactory, file: str, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    (folder / "config.json").write_text(json.dumps(SETTINGS))
    content = bytearray(sound(file))
    for _ in range(data.draw(st.integers(0, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    whole = content == sound(file)
    (folder / file).write_bytes(content)
    try:
        load_float_model(folder)
    except MambaintError as error:
        assert str(folder) in str(error)
        assert not whole
