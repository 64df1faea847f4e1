"""Token files and tokenizers: nothing is lost, damage is recognised, and bits per byte stay bits per byte."""

from __future__ import annotations

import dataclasses
import json
import math
import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from mamba_int.datasets import BYTES, DataSource, TextData, Tokenizer, load_data, write_token_file
from mamba_int.datasets.text_file import load_text
from mamba_int.datasets.token_file import load_token_file
from mamba_int.datasets.tokenizer import load_bpe, train_bpe
from mamba_int.errors import MambaintError
from mamba_int.files import canonical_json
from mamba_int.training import evaluate, load_checkpoint
from mamba_int.training.batches import make_batches
from mamba_int.training.metrics import read_metrics
from mamba_int.training.run import METRICS_FILE
from tests.mamba_int.stand_in import TEXT_RECIPE, StandIn, fit, make_config

TEXT = "".join(f"Call me Ishmael {i}. Some years agö — never mind how long.\n" for i in range(200)).encode()
SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return train_bpe(iter([TEXT]), 300)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "book.txt"
    path.write_bytes(TEXT)
    return path


@pytest.fixture
def corpus(text: Path, bpe: Tokenizer) -> Path:
    write_token_file([text], text.with_name("book.tokens"), "bpe", 300)
    return text.with_name("book.tokens")


def decoded(data: TextData, split: str) -> bytes:
    return data.tokenizer.decode(getattr(data, split).tolist())


# -- what is written ------------------------------------------------------------------------------------


def test_bytes_give_the_splits_of_the_text_itself(text: Path, tmp_path: Path) -> None:
    summary = write_token_file([text], tmp_path / "b.tokens", "bytes")
    data, plain = load_token_file(tmp_path / "b.tokens"), load_text(text)
    for split in SPLITS:
        assert torch.equal(getattr(data, split), getattr(plain, split))
        assert summary.tokens[split] == summary.bytes[split] == data.sizes[split] == plain.sizes[split]
    assert data.tokenizer == BYTES and data.vocab_size == 256


def test_bpe_loses_nothing_and_knows_its_bytes(corpus: Path) -> None:
    data = load_token_file(corpus)
    assert b"".join(decoded(data, split) for split in SPLITS) == TEXT
    for split in SPLITS:
        tokens = getattr(data, split)
        assert tokens.dtype is torch.uint16
        assert int(data.tokenizer.lengths[tokens.numpy()].sum()) == data.sizes[split] > len(tokens)
    assert 256 < data.vocab_size <= 300


def test_several_files_are_one_text(text: Path, tmp_path: Path, bpe: Tokenizer) -> None:
    parts = [tmp_path / name for name in ("1", "2", "3")]
    for part, (start, stop) in zip(parts, ((0, 0), (0, 3001), (3001, len(TEXT))), strict=True):
        part.write_bytes(TEXT[start:stop])
    write_token_file([text], tmp_path / "one.tokens", "bpe", 300)
    write_token_file(parts, tmp_path / "three.tokens", "bpe", 300)
    one, three = (load_token_file(tmp_path / f"{name}.tokens") for name in ("one", "three"))
    for split in SPLITS:
        assert torch.equal(getattr(one, split), getattr(three, split))
    assert one.tokenizer == three.tokenizer and three.name == "three"


def test_the_tokenizer_sees_nothing_of_validation_and_test(tmp_path: Path, bpe: Tokenizer) -> None:
    path = tmp_path / "t.txt"
    path.write_bytes(TEXT[:8000] + b"zyzzyva " * 300)
    write_token_file([path], tmp_path / "t.tokens", "bpe", 300)
    cut = (8000 + 2400) * 85 // 100
    path.write_bytes(TEXT[:8000] + (b"zyzzyva " * 300)[: cut - 8000] + b"Q" * (8000 + 2400 - cut))
    write_token_file([path], tmp_path / "u.tokens", "bpe", 300)
    first, second = (load_token_file(tmp_path / name) for name in ("t.tokens", "u.tokens"))
    assert first.tokenizer == second.tokenizer
    assert not torch.equal(first.test, second.test)


def test_splits_are_cut_between_characters(tmp_path: Path, bpe: Tokenizer) -> None:
    for extra in range(4):
        path = tmp_path / "e.txt"
        path.write_bytes(b"x" * extra + "€".encode() * 101)
        write_token_file([path], tmp_path / "e.tokens", "bpe", 260)
        data = load_token_file(tmp_path / "e.tokens")
        assert "".join(decoded(data, split).decode() for split in SPLITS).encode() == path.read_bytes()


def test_a_text_of_many_pieces_is_encoded_whole(
    tmp_path: Path, bpe: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces end in the middle of nothing: not of a character, and of a word only if it is all there is."""
    monkeypatch.setattr("mamba_int.datasets.token_file._PIECE", 64)
    content = TEXT[:3000] + "ö".encode() * 500 + b" " + b"z" * 500 + "𝔸".encode() * 50
    path = tmp_path / "p.txt"
    path.write_bytes(content)
    seen: list[tuple[str, int, int]] = []
    write_token_file([path], tmp_path / "p.tokens", "bpe", 300, report=lambda *now: seen.append(now))
    data = load_token_file(tmp_path / "p.tokens")
    assert b"".join(decoded(data, split) for split in SPLITS) == content
    assert seen[-1] == ("encode", len(content), len(content))
    places = [done for stage, done, _ in seen if stage == "encode"]
    assert places == sorted(set(places)) and len(places) > 40


def test_another_tokenizer_can_be_used_as_it_is(corpus: Path, text: Path, tmp_path: Path) -> None:
    tokenizer = load_token_file(corpus).tokenizer
    (tmp_path / "tok.json").write_text(json.dumps(tokenizer.definition))
    for source in (corpus, tmp_path / "tok.json"):
        write_token_file([text], tmp_path / "again.tokens", "bpe", tokenizer_file=source)
        again = load_token_file(tmp_path / "again.tokens")
        assert again.tokenizer == tokenizer
        assert torch.equal(again.train, load_token_file(corpus).train)
    assert load_bpe(tmp_path / "tok.json").digest == tokenizer.digest


def test_what_is_not_utf8_or_too_short_is_refused_and_nothing_is_left(tmp_path: Path, bpe: Tokenizer) -> None:
    path = tmp_path / "t"
    for content, words in (
        (TEXT[:200] + b"\xff" * 300, "not UTF-8.*--tokenizer bytes"),
        (b"a" * 99, "99 bytes"),
    ):
        path.write_bytes(content)
        with pytest.raises(MambaintError, match=words):
            write_token_file([path], tmp_path / "x.tokens", "bpe", 300)
    for missing in (tmp_path / "missing", tmp_path):
        with pytest.raises(MambaintError, match=r"cannot read|bytes, fewer"):
            write_token_file([missing], tmp_path / "x.tokens", "bytes")
    path.write_bytes(TEXT)
    with pytest.raises(MambaintError, match="vocabulary of 255"):
        write_token_file([path], tmp_path / "x.tokens", "bpe", 255)
    assert [entry.name for entry in tmp_path.iterdir()] == ["t"]


# -- tokenizers -----------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.text(max_size=80))
def test_any_text_comes_back(bpe: Tokenizer, content: str) -> None:
    for tokenizer in (BYTES, bpe):
        ids = tokenizer.encode(content.encode())
        assert tokenizer.decode(ids) == content.encode()
        assert int(tokenizer.lengths[ids].sum()) == len(content.encode())


def test_every_byte_has_a_token_and_is_it(bpe: Tokenizer) -> None:
    alone = Counter(piece for piece in bpe.pieces if len(piece) == 1)
    assert alone == Counter(bytes([byte]) for byte in range(256))


def test_tokenizer_survives_json_and_training_it_again_gives_the_same(bpe: Tokenizer) -> None:
    assert Tokenizer.from_dict(json.loads(canonical_json(bpe.to_dict())), "x") == bpe
    assert train_bpe(iter([TEXT]), 300).digest == bpe.digest


def without(definition: dict[str, Any], token: str) -> dict[str, Any]:
    vocabulary = {text: n for text, n in definition["model"]["vocab"].items() if text != token}
    return definition | {"model": definition["model"] | {"vocab": vocabulary}}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: {}, "not a byte-level BPE"),
        (lambda d: d | {"model": d["model"] | {"type": "WordPiece"}}, "is a WordPiece"),
        (lambda d: without(d, "e"), "not numbered"),
        (lambda d: d | {"model": d["model"] | {"vocab": {"日": 0}}}, "not a byte-level BPE"),
        (lambda d: d | {"model": {"type": "BPE", "vocab": []}}, "no token for some bytes"),
        (lambda d: d | {"added_tokens": [1]}, "not a byte-level BPE"),
    ],
)
def test_other_tokenizers_are_refused(
    bpe: Tokenizer, tmp_path: Path, change: Callable[[Any], Any], words: str
) -> None:
    (tmp_path / "t.json").write_text(json.dumps(change(bpe.definition)))
    with pytest.raises(MambaintError, match=words):
        load_bpe(tmp_path / "t.json")


def test_a_tokenizer_that_changes_the_text_is_refused(bpe: Tokenizer) -> None:
    with_prefix = bpe.definition | {
        "pre_tokenizer": bpe.definition["pre_tokenizer"] | {"add_prefix_space": True}
    }
    with pytest.raises(MambaintError, match="does not keep the text"):
        Tokenizer("bpe", with_prefix).encode(b"word")
    with pytest.raises(MambaintError, match="token 300 is not in the vocabulary"):
        bpe.decode([300])


def test_missing_library_is_one_line_and_decoding_does_without(
    bpe: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    ids = bpe.encode(b"Call me").tolist()
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    copy = Tokenizer("bpe", bpe.definition)
    assert copy.decode(ids) == b"Call me"
    with pytest.raises(MambaintError, match="pip install tokenizers"):
        copy.encode(b"Call me")


# -- damage ---------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(draw=st.data())
def test_damaged_token_file_fails_with_one_sentence_or_in_its_tokens(
    corpus: Path, draw: st.DataObject
) -> None:
    """A changed token inside the vocabulary is beyond what is checked: the file may exceed the memory."""
    good = corpus.read_bytes()
    count = struct.unpack_from("<Q", good, 16)[0]
    content = bytearray(good)
    kind = draw.draw(st.sampled_from(["cut", "longer", "bit"]))
    place = draw.draw(st.integers(0, len(good) - 1))
    if kind == "cut":
        content = content[:place]
    elif kind == "longer":
        content += b"x"
    else:
        content[place] ^= draw.draw(st.integers(1, 255))
    damaged = corpus.with_name("damaged.tokens")
    damaged.write_bytes(bytes(content))
    try:
        load_token_file(damaged)
    except MambaintError as error:
        assert "\n" not in str(error)
    else:
        assert kind == "bit" and 64 <= place < 64 + 2 * count


def test_altered_description_is_refused(corpus: Path) -> None:
    import hashlib

    good = corpus.read_bytes()
    magic, version, width, count, length, _ = struct.unpack_from("<8sIIQQ32s", good)
    body, description = good[64:-length], json.loads(good[-length:])

    def write(change: dict[str, Any], **prefix: int) -> None:
        text = canonical_json(description | change)
        values = {"version": version, "width": width, "count": count} | prefix
        head = (magic, values["version"], values["width"], values["count"], len(text))
        corpus.write_bytes(struct.pack("<8sIIQQ32s", *head, hashlib.sha256(text).digest()) + body + text)

    write({})
    load_token_file(corpus)
    splits = description["splits"]
    for change in (
        {"extra": 1},
        {"tokenizer": BYTES.to_dict()},
        {"splits": splits | {"train": {"tokens": 1, "bytes": 1}}},
        {"splits": splits | {"train": {"tokens": -1, "bytes": 1}}},
        {"splits": {}},
        {"name": 3},
    ):
        write(change)
        with pytest.raises(MambaintError, match=r"description in|holds no tokenizer"):
            load_token_file(corpus)
    write({}, version=2)
    with pytest.raises(MambaintError, match="version 2, this program reads 1"):
        load_token_file(corpus)
    write({}, width=1)
    with pytest.raises(MambaintError, match="incomplete or damaged"):
        load_token_file(corpus)


def test_token_outside_the_vocabulary_is_refused_before_the_model_sees_it(corpus: Path) -> None:
    content = bytearray(corpus.read_bytes())
    content[64 : 64 + 4000] = b"\xff" * 4000
    corpus.write_bytes(bytes(content))
    batches = make_batches(load_token_file(corpus), TEXT_RECIPE, torch.device("cpu"))
    with pytest.raises(MambaintError, match="holds the token 65535, its vocabulary has"):
        for step in range(50):
            batches.at(step)


# -- training on it -------------------------------------------------------------------------------------


def test_token_file_is_not_read_into_memory(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_bytes", lambda path: pytest.fail(f"{path} was read whole"))
    data = load_data(DataSource("tokens", str(corpus)))
    assert isinstance(data, TextData) and data.name == "book"
    data.fingerprint()
    assert data.windows("test", np.array([0, 5]), 7).shape == (2, 7)


def test_bits_per_byte_of_a_uniform_bpe_model_count_bytes_and_not_tokens(corpus: Path) -> None:
    data = load_token_file(corpus)
    model = StandIn(make_config(data), 0)
    nn.init.zeros_(model.weight)
    length = (len(data.test) - 1) // 4 * 4
    score = evaluate(model, data, "test", torch.device("cpu"), 4)
    size = int(data.tokenizer.lengths[data.test.numpy()[1 : length + 1]].sum())
    assert score.loss == pytest.approx(math.log(data.vocab_size))
    assert score.metric == pytest.approx(math.log2(data.vocab_size) * length / size)
    assert size > 1.5 * length


def test_training_on_tokens_of_bytes_is_training_on_the_text(text: Path, tmp_path: Path) -> None:
    write_token_file([text], tmp_path / "b.tokens", "bytes")
    results = [
        fit(tmp_path / name, TEXT_RECIPE, data=data)
        for name, data in (("text", load_text(text)), ("tokens", load_token_file(tmp_path / "b.tokens")))
    ]
    assert results[0].test_metric == results[1].test_metric
    states = [load_checkpoint(result.checkpoint).model_state for result in results]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_checkpoint_carries_the_tokenizer_and_the_log_counts_bytes(corpus: Path, tmp_path: Path) -> None:
    data = load_token_file(corpus)
    recipe = dataclasses.replace(TEXT_RECIPE, steps=10)
    result = fit(tmp_path / "run", recipe, data=data)
    kept = load_checkpoint(result.checkpoint).data
    assert kept.tokenizer == data.tokenizer and kept.fingerprint == data.fingerprint()
    assert kept.tokenizer is not None and kept.tokenizer.decode(data.test[:5].tolist()) in TEXT
    row = read_metrics(tmp_path / "run" / METRICS_FILE)[-1]
    per_token = data.sizes["train"] / len(data.train)
    assert row["bits_per_byte"] == pytest.approx(row["loss"] / math.log(2) / per_token)
