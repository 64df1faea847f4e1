"""Presets and configuration files: what is laid over what, and which mistakes are named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mamba_int.config import MambaIntConfig
from mamba_int.datasets import ClassificationData, load_data
from mamba_int.errors import MambaintError
from mamba_int.experiment import preset_names, resolve
from mamba_int.float_models.config import MambaConfig


def toml(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "c.toml"
    path.write_text(text)
    return path


def csv(tmp_path: Path) -> Path:
    path = tmp_path / "mine.csv"
    path.write_text("".join(f"{i % 7},{i % 5},{'ab'[i % 2]}\n" for i in range(40)))
    return path


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_fits_its_own_data(name: str) -> None:
    experiment = resolve(name)
    data = load_data(experiment.source)
    classes = isinstance(data, ClassificationData)
    if experiment.is_float:
        config = experiment.model_config(data)
        assert isinstance(config, MambaConfig) and bool(config.n_features) == classes
    else:
        for arithmetic, native in (
            ("integer", experiment.model_config(data)),
            ("float", experiment.twin_config(data)),
        ):
            assert isinstance(native, MambaIntConfig) and native.arithmetic == arithmetic
            assert native.task == ("classification" if classes else "language_model")
    assert experiment.name == name


def test_file_overrides_preset_key_by_key_and_options_override_the_file(tmp_path: Path) -> None:
    path = toml(tmp_path, "[model]\nd_model = 64\n[training]\nepochs = 2\nseed = 5\n")
    experiment = resolve("digits", path)
    assert experiment.model["d_model"] == 64 and experiment.model["headdim"] == 16
    assert (experiment.training.epochs, experiment.training.seed) == (2, 5)
    assert experiment.training.shift_augmentation == 1
    experiment = resolve("digits", path, seed=7, steps=11)
    assert (experiment.training.steps, experiment.training.seed) == (11, 7)


def test_epochs_in_a_file_displace_the_steps_of_the_preset(tmp_path: Path) -> None:
    training = resolve("char", toml(tmp_path, "[training]\nepochs = 3\n")).training
    assert (training.steps, training.epochs) == (0, 3)


def test_own_data_is_not_shifted_like_an_image_and_sets_the_shape(tmp_path: Path) -> None:
    experiment = resolve(data_path=csv(tmp_path))
    assert experiment.name == "mine"
    assert experiment.training.shift_augmentation == 0
    config = experiment.model_config(load_data(experiment.source))
    assert (config.seq_len, config.n_features, config.n_classes) == (2, 1, 2)
    assert (config.input_low, config.input_high) == (0, 6)
    path = toml(tmp_path, "[training]\nshift_augmentation = 1\n")
    assert resolve(config_path=path, data_path=csv(tmp_path)).training.shift_augmentation == 1


@pytest.mark.parametrize(("largest", "frac"), [(1, 0), (2, 0), (7, 1), (8, 2), (16, 3), (127, 5)])
def test_input_places_put_the_largest_input_near_two_to_four(tmp_path: Path, largest: int, frac: int) -> None:
    path = tmp_path / "d.csv"
    path.write_text("".join(f"{largest * (i % 2)},{i % 2}\n" for i in range(20)))
    experiment = resolve(data_path=path)
    assert experiment.model_config(load_data(experiment.source)).input_frac == frac


def test_path_in_a_file_is_relative_to_that_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    csv(tmp_path)
    monkeypatch.chdir("/")
    experiment = resolve(config_path=toml(tmp_path, '[data]\npath = "mine.csv"\nseq_len = 1\n'))
    assert (experiment.source.kind, experiment.source.seq_len) == ("csv", 1)
    assert Path(experiment.source.path) == (tmp_path / "mine.csv").resolve()


def test_text_chooses_the_language_model_preset(tmp_path: Path) -> None:
    path = tmp_path / "t.md"
    path.write_text("x" * 1000)
    assert resolve(data_path=path).model["n_layer"] == 2
    assert resolve(config_path=toml(tmp_path, '[data]\nkind = "moby-dick"\n')).source.is_text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[modell]\nd_model = 3\n", r"unknown key 'modell'; did you mean the table \[model\]"),
        ("d_model = 3\n", r"unknown key 'd_model'"),
        ("model = 3\n", r"unknown key 'model'"),
        ("[model]\nd_modle = 3\n", "unknown key 'd_modle'; did you mean 'd_model'"),
        ("[training]\nlerning_rate = 3\n", "unknown key 'lerning_rate'; did you mean 'learning_rate'"),
        ("[data]\nknd = 3\n", "unknown key 'knd'; did you mean 'kind'"),
        ("[model]\nn_classes = 3\n", "n_classes is read from the data"),
        ("[model]\nd_model = 'wide'\n", "d_model = 'wide' has the wrong type"),
        ("[model]\nheaddim = 7\n", "headdim"),
        ("[training]\nsteps = 3\nepochs = 3\n", "both steps and epochs"),
        ("[training]\nsteps = 0\nepochs = 0\n", "both steps and epochs"),
        ("[training]\nbatch_size = 0\n", "batch_size = 0"),
        ("[data]\nkind = 'moby-dick'\npath = 'x'\n", "path"),
        ("[model\n", "not valid TOML"),
        ("[model]\nd_model = 1\nd_model = 2\n", "not valid TOML"),
    ],
)
def test_mistake_in_a_file_is_named(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(MambaintError, match=words):
        resolve(config_path=toml(tmp_path, text))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"preset": "digit"}, "no preset 'digit'; did you mean 'digits'"),
        ({"preset": "../digits"}, "no preset"),
        ({"preset": "zzz"}, "choose one of char, char-large, char-mamba2, char-quaternion, digits, "),
        ({"preset": "digits", "data_path": Path("a.txt")}, "trains on labelled sequences, .* --preset char"),
        ({"preset": "char", "data_path": Path("a.csv")}, "trains on text, .* --preset digits"),
        ({"config_path": Path("missing.toml")}, r"cannot read missing\.toml"),
    ],
)
def test_mistake_in_an_option_is_named(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(MambaintError, match=words):
        resolve(**arguments)
