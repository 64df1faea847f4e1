"""A configuration that cannot be a model is refused by the key at fault."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest

from mamba_int.config import MambaIntConfig, dataclass_from_dict
from mamba_int.errors import MambaintError


def refusal(values: dict[str, Any]) -> MambaintError:
    with pytest.raises(MambaintError) as caught:
        MambaIntConfig.from_dict(values)
    assert "\n" not in str(caught.value)
    assert caught.value.cause.startswith("[model] ")
    return caught.value


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("d_modell", "d_model"),
        ("head_dim", "headdim"),
        ("seqlen", "seq_len"),
        ("n_layers", "n_layer"),
        ("chunksize", "chunk_size"),
        ("activation_bit", "activation_bits"),
    ],
)
def test_misspelt_key_is_told_the_nearest(key: str, near: str) -> None:
    error = refusal({key: 1})
    assert key in error.cause
    assert error.remedy == f"did you mean '{near}'?"


def test_key_like_no_other_is_told_them_all() -> None:
    error = refusal({"zzzzzzzz": 1})
    assert all(field.name in error.remedy for field in dataclasses.fields(MambaIntConfig))


@pytest.mark.parametrize(
    ("key", "value", "kind"),
    [
        ("n_layer", True, "int"),
        ("n_layer", 1.0, "int"),
        ("n_layer", "1", "int"),
        ("n_layer", None, "int"),
        ("conv_bias", 1, "bool"),
        ("conv_bias", "yes", "bool"),
        ("expand", "2", "float"),
        ("expand", True, "float"),
        ("decay_min", [0.1], "float"),
    ],
)
def test_wrong_type_is_refused_though_python_would_take_it(key: str, value: Any, kind: str) -> None:
    error = refusal({key: value})
    assert f"{key} = {value!r}" in error.cause
    assert kind in error.remedy


@pytest.mark.parametrize(
    "key", ["task", "weights", "activation", "gate", "rotation", "pooling", "arithmetic"]
)
@pytest.mark.parametrize("value", ["relu6", "", 1, None, True, [], {"a": 1}])
def test_form_that_does_not_exist_is_told_those_that_do(key: str, value: Any) -> None:
    error = refusal({key: value})
    assert str(getattr(MambaIntConfig(), key)) in error.remedy


def test_a_whole_number_is_a_float_where_one_is_wanted() -> None:
    config = MambaIntConfig.from_dict({"expand": 2})
    assert config == MambaIntConfig() and type(config.expand) is float


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"seq_len": 0}, "seq_len = 0"),
        ({"n_layer": -1}, "n_layer = -1"),
        ({"n_classes": 0}, "n_classes = 0"),
        ({"vocab_size": 0}, "vocab_size = 0"),
        ({"chunk_size": 0}, "chunk_size = 0"),
        ({"d_conv": 0}, "d_conv = 0"),
        ({"expand": 0.0}, "expand = 0.0"),
        ({"expand": -2.0}, "expand = -2.0"),
        ({"expand": math.nan}, "expand = nan"),
        ({"expand": 0.01}, "expand*d_model = 0"),
        ({"rotation_frac": 70}, "rotation_frac = 70"),
        ({"pool_bits": 0}, "pool_bits = 0"),
        ({"seq_len": 10**30}, "seq_len = 1000"),
        ({"d_model": 1 << 20}, "d_model = 1048576"),
        ({"headdim": 24}, "not a multiple of headdim = 24"),
        ({"headdim": 1 << 20}, "headdim = 1048576"),
        ({"d_state": 3}, "d_state = 3 is odd"),
        ({"input_low": 16}, "16..16"),
        ({"input_high": 128}, "input_high = 128"),
        ({"input_low": -128}, "input_low = -128"),
        ({"decay_bits": 9}, "decay_bits = 9"),
        ({"decay_bits": 3}, "decay_bits = 3"),
        ({"A_bits": 7}, "A_bits = 7"),
        ({"A_bits": 13}, "A_bits = 13"),
        ({"decay_min": 0.0}, "decay_min"),
        ({"decay_min": 0.9}, "decay_min"),
        ({"decay_max": 1.0}, "decay_max"),
        ({"decay_max": math.nan}, "decay_max"),
        ({"decay_min": math.inf}, "decay_min"),
    ],
)
def test_impossible_shape_is_refused(values: dict[str, Any], words: str) -> None:
    assert words in str(refusal(values))


def test_dictionary_and_back_through_json_is_the_same_configuration() -> None:
    config = MambaIntConfig(task="language_model", expand=1.5, gate="algebraic", chunk_size=3)
    assert MambaIntConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert MambaIntConfig.from_dict({}) == MambaIntConfig()


def test_the_source_is_named_as_given() -> None:
    @dataclasses.dataclass
    class Options:
        rate: float = 0.1

    with pytest.raises(MambaintError, match=r"^\[other\] has an unknown key 'rte'; did you mean 'rate'\?"):
        dataclass_from_dict(Options, {"rte": 1}, "[other]")
