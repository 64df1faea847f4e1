"""Many sequences at once are each as if alone, end where they should, and become text without breaking it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from mamba_int.datasets import BYTES, Tokenizer, find_tokenizer, save_tokenizer
from mamba_int.decoder import Decoder
from mamba_int.errors import MambaintError
from mamba_int.generation import Generation, generate
from mamba_int.graph import Graph
from mamba_int.interpreter import evaluate
from mamba_int.sampling import Sampler, SamplingConfig
from mamba_int.text_stream import TextStream
from tests.circuits_runtime.models import random_graph

GREEDY = SamplingConfig(temperature=0)
PROMPTS = [[1], [2, 3, 4, 5], [7, 7, 7, 7, 7, 1, 2, 3], [9, 0, 10], [4] * 17]


def model() -> Graph:
    return random_graph(3, task="language_model", vocab_size=11, seq_len=13, chunk_size=4)[0]


def run(
    graph: Graph, prompts: list[list[int]], config: SamplingConfig = GREEDY, limit: int = 12, **options: Any
) -> Generation:
    sampler = Sampler(graph, config, len(prompts))
    return generate(Decoder(graph, len(prompts)), prompts, sampler, limit, **options)


def test_padding_does_not_leak() -> None:
    graph = model()
    together = run(graph, PROMPTS).tokens
    assert together == [run(graph, [prompt]).tokens[0] for prompt in PROMPTS]
    assert together == run(graph, PROMPTS[::-1]).tokens[::-1]


def test_greedy_is_the_argmax_of_the_whole_run() -> None:
    import numpy as np

    graph = model()
    for prompt, tokens in zip(PROMPTS, run(graph, PROMPTS).tokens, strict=True):
        text = prompt + tokens
        logits = evaluate(graph, np.array([text[:-1]]))[0]
        assert logits.argmax(-1)[len(prompt) - 1 :].tolist() == tokens


def test_a_sampled_row_is_the_same_in_a_larger_batch() -> None:
    graph, config = model(), SamplingConfig(seed=2)
    assert run(graph, PROMPTS[:1], config).tokens == run(graph, PROMPTS, config).tokens[:1]
    assert run(graph, PROMPTS, config).tokens != run(graph, PROMPTS, SamplingConfig(seed=1)).tokens


def test_a_sequence_ends_before_its_stop_token_and_the_others_go_on() -> None:
    graph, config = model(), SamplingConfig(seed=2)
    free = run(graph, PROMPTS, config).tokens
    stop = free[0][2]
    stopped = run(graph, PROMPTS, config, stop_tokens={stop})
    for found, whole, ended in zip(stopped.tokens, free, stopped.stopped, strict=True):
        assert found == (whole[: whole.index(stop)] if stop in whole else whole)
        assert ended == (stop in whole)


def test_a_sequence_ends_when_its_reader_says_so_and_nothing_is_computed_after_the_last() -> None:
    graph = model()
    seen: list[tuple[int, int]] = []

    def reader(row: int, token: int) -> bool:
        seen.append((row, token))
        return len([r for r, _ in seen if r == row]) == row + 1

    decoder = Decoder(graph, 3)
    result = generate(decoder, PROMPTS[:3], Sampler(graph, GREEDY, 3), 50, on_token=reader)
    assert [len(tokens) for tokens in result.tokens] == [1, 2, 3] and all(result.stopped)
    assert [token for row, token in seen if row == 2] == result.tokens[2]
    assert decoder.inspect()["position"] == [len(prompt) + 2 for prompt in PROMPTS[:3]]


def test_the_limit_is_a_limit() -> None:
    result = run(model(), PROMPTS, limit=1)
    assert [len(tokens) for tokens in result.tokens] == [1] * 5 and not any(result.stopped)
    for limit in (0, -1):
        with pytest.raises(MambaintError, match="max_tokens"):
            run(model(), PROMPTS, limit=limit)
    with pytest.raises(MambaintError, match="prompt 1 is empty"):
        run(model(), [[1], []])


# -- text -------------------------------------------------------------------------------------------------


@given(st.text(max_size=20), st.text(min_size=1, max_size=3))
def test_text_comes_whole_and_ends_before_the_stop_wherever_it_is_cut(text: str, stop: str) -> None:
    stream = TextStream(BYTES, [stop])
    parts = [stream.feed(byte) for byte in text.encode()]
    before_the_end = stream.text
    parts.append(stream.feed(None))
    place = text.find(stop)
    assert "".join(parts) == stream.text == (text if place < 0 else text[:place])
    assert stream.stopped == (place >= 0)
    assert "\N{REPLACEMENT CHARACTER}" in text or "\N{REPLACEMENT CHARACTER}" not in before_the_end


def test_an_incomplete_character_is_held_back_and_a_broken_one_is_marked() -> None:
    stream = TextStream(BYTES)
    assert [stream.feed(byte) for byte in "é€".encode()] == ["", "é", "", "", "€"]
    assert stream.feed(0xE2) == "" and stream.feed(0x41) == "\N{REPLACEMENT CHARACTER}A"
    assert stream.feed(0xE2) == "" and stream.feed(None) == "\N{REPLACEMENT CHARACTER}"


def test_the_beginning_of_a_stop_is_held_back_until_it_is_none() -> None:
    stream = TextStream(BYTES, ["\n\n", "END"])
    assert [stream.feed(byte) for byte in b"a\nbEN"] == ["a", "", "\nb", "", ""]
    assert stream.feed(ord("!")) == "EN!"
    assert stream.feed(ord("\n")) == "" and stream.feed(None) == "\n"


def test_nothing_comes_after_a_stop() -> None:
    stream = TextStream(BYTES, ["ab"])
    assert "".join(stream.feed(byte) for byte in b"xaby") == "x" and stream.feed(None) == ""


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(["the whale, the white whale"] * 9, trainer)
    return Tokenizer.from_dict({"kind": "bpe", "definition": json.loads(made.to_str())}, "the test")


@pytest.mark.parametrize("text", ["the white whale", " the  whale\n", "naïve € 🐋 the", ""])
def test_tokens_of_a_bpe_become_the_text_again(tokenizer: Tokenizer, text: str) -> None:
    stream = TextStream(tokenizer)
    shown = [stream.feed(token) for token in tokenizer.encode(text.encode())]
    assert "".join(shown) == text == stream.text and stream.feed(None) == ""
    assert not any("\N{REPLACEMENT CHARACTER}" in part for part in shown)


def test_a_character_of_several_tokens_that_stays_incomplete_is_marked(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer)
    half = tokenizer.encode("🐋".encode())[:-1]
    assert len(half) > 0 and "".join(stream.feed(token) for token in half) == ""
    assert stream.feed(None) == "\N{REPLACEMENT CHARACTER}"


def test_a_special_token_is_found_by_its_text_and_another_token_is_not(tokenizer: Tokenizer) -> None:
    assert tokenizer.special_tokens == {"<|end|>": 0} and BYTES.special_tokens == {}
    stream = TextStream(tokenizer, ["<|end|>"])
    the, *_ = tokenizer.encode(b"the")
    assert [stream.feed(token) for token in (the, 0, the)] == ["the", "", ""] and stream.stopped


def test_a_tokenizer_that_is_not_that_of_the_model_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    assert find_tokenizer(256, tmp_path) == BYTES
    with pytest.raises(MambaintError, match="11 tokens, not bytes"):
        find_tokenizer(11, tmp_path)
    with pytest.raises(MambaintError, match="cannot read"):
        find_tokenizer(256, tmp_path, tmp_path / "none.json")
    path = save_tokenizer(tokenizer, tmp_path)
    assert path is not None and find_tokenizer(tokenizer.vocab_size, tmp_path) == tokenizer
    for size in (256, tokenizer.vocab_size + 1):
        with pytest.raises(MambaintError, match=f"{tokenizer.vocab_size} tokens, the model {size}"):
            find_tokenizer(size, tmp_path / "elsewhere", path)


def test_the_tokenizer_of_an_earlier_model_is_not_left_beside_the_next(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    for next_one in (BYTES, None):
        save_tokenizer(tokenizer, tmp_path)
        assert save_tokenizer(next_one, tmp_path) is None
        assert save_tokenizer(next_one, tmp_path) is None
        assert list(tmp_path.iterdir()) == []
