"""Float models: training, padding, cache, generation, and the same model in NumPy."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from triton import knobs

from mamba_int.errors import MambaintError
from mamba_int.float_models import decoder as decoder_module
from mamba_int.float_models.config import MambaConfig
from mamba_int.float_models.decoder import FloatDecoder
from mamba_int.float_models.metrics import run_metrics
from mamba_int.float_models.mixer import MIXERS, Mixer, register_mixer
from mamba_int.float_models.models import (
    MambaForCausalLM,
    MambaForFeatureExtraction,
    MambaForSequenceClassification,
    MambaModel,
    pool,
)
from mamba_int.float_models.numpy_forward import NumpyMamba
from mamba_int.sampling import SamplingConfig
from triton_kernels.cross_entropy import IGNORED_LABEL

MIXER_NAMES = ("mamba", "mamba2", "complex_mamba")
TINY = MambaConfig(
    vocab_size=21,
    d_model=8,
    n_layer=2,
    d_state=4,
    headdim=4,
    n_groups=2,
    dt_min=0.05,
    dt_max=0.5,
    dropout=0.0,
    tie_embeddings=False,
)
"""Steps large enough for the past to matter at once."""


@pytest.fixture(autouse=True, scope="module")
def without_kernels() -> Any:
    """The interpreter would run Triton's kernels on these tensors; one test here asks for that."""
    with knobs.runtime.scope():
        knobs.runtime.interpret = False
        yield


def language_model(mixer: str = "mamba", **changes: Any) -> MambaForCausalLM:
    torch.manual_seed(0)
    model = MambaForCausalLM(replace(TINY, mixer=mixer, **changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("embeddings.weight"):
                parameter.mul_(20)
            elif name.endswith(("conv1d.bias", "norm.weight", "D")):
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(TINY.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def difference(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return (a - b).abs().max().item()


# -- training -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mixer", MIXER_NAMES)
def test_a_parameter_does_not_learn(mixer: str) -> None:
    model = language_model(mixer, bias=True)
    ids = tokens(2, 9)
    loss = model(ids, labels=ids).loss
    loss.backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]


@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("mixer", MIXER_NAMES)
def test_gradients_differ_from_float64(mixer: str, kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knobs.runtime, "interpret", kernels)
    model, exact = language_model(mixer, n_layer=1), language_model(mixer, n_layer=1).double()
    ids = tokens(1, 19)
    model(ids, labels=ids).loss.backward()
    exact(ids, labels=ids).loss.backward()
    for (name, p), q in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None
        assert difference(p.grad.double(), q.grad) <= 2e-5 * float(q.grad.abs().max()), name


@pytest.mark.parametrize("mixer", MIXER_NAMES)
def test_a_sequence_cannot_be_learned_by_heart(mixer: str) -> None:
    model = language_model(mixer).train()
    ids = tokens(1, 12)
    optimizer = torch.optim.Adam(model.parameters(), 2e-2)
    for _ in range(40):
        optimizer.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.1


def test_the_loss_is_not_that_of_the_next_token() -> None:
    model, ids = language_model(), tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    labels = ids.clone()
    labels[1, 3] = IGNORED_LABEL
    out = model(ids, mask, labels)
    log_probabilities = out.logits.log_softmax(-1)
    counted = [(0, t) for t in range(5)] + [(1, t) for t in range(8) if t != 2]
    expected = -sum(log_probabilities[row, t, ids[row, t + 1]] for row, t in counted) / len(counted)
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_checkpointed_layers_have_other_gradients() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = language_model().train()
        model.backbone.gradient_checkpointing = checkpointing
        model(tokens(1, 7), labels=tokens(1, 7)).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(p, q) for p, q in zip(*gradients, strict=True))


def test_autocast_rounds_the_residual_stream_or_the_states() -> None:
    model, ids = language_model(), tokens(2, 9)
    dtypes: list[torch.dtype] = []

    def note(module: nn.Module, inputs: Any, outputs: tuple[Tensor, Tensor]) -> None:
        dtypes.extend(out.dtype for out in outputs)

    model.backbone.layers[1].register_forward_hook(note)
    with torch.no_grad():
        exact = model(ids).logits
        with torch.autocast("cpu", torch.bfloat16):
            rounded = model(ids).logits
    assert dtypes == [torch.float32, torch.float32, torch.bfloat16, torch.float32]
    assert 0 < difference(rounded.float(), exact) < 0.1 * float(exact.abs().max())


def test_a_parameter_has_no_role_or_two() -> None:
    model = language_model("complex_mamba")
    listed = [p for role in model.parameter_roles().values() for p in role]
    assert sorted(map(id, listed)) == sorted(map(id, model.parameters()))


# -- forms --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mixer", MIXER_NAMES)
@pytest.mark.parametrize("way", ["sequential", "associative"])
def test_the_way_of_scanning_changes_the_model(mixer: str, way: str) -> None:
    ids = tokens(2, 37)
    one, other = language_model(mixer)(ids).logits, language_model(mixer, scan_type=way)(ids).logits
    assert difference(one, other) < 1e-5


FORMS: list[dict[str, Any]] = [
    {"mixer": "mamba", "activation": "gelu", "gate_activation": "identity", "BCdt_norm": True},
    {"mixer": "mamba", "activation": "relu", "conv_bias": False, "bias": True, "d_conv": 2, "dt_rank": 3},
    {"mixer": "mamba2", "D_has_hdim": True, "gate_activation": "relu", "dt_limit_high": 0.2},
    {"mixer": "mamba2", "norm_per_group": False, "n_groups": 4, "tie_embeddings": True, "expand": 4.0},
    {"mixer": "mamba2", "dt_limit_low": 0.3, "d_conv": 1},
    {"mixer": "complex_mamba", "activation": "identity", "d_state": 3},
]


@pytest.mark.parametrize("form", FORMS)
def test_numpy_or_a_cache_departs_from_a_form_of_the_model(form: dict[str, Any]) -> None:
    model = language_model(**form)
    ids = tokens(2, 11)
    with torch.no_grad():
        whole = model(ids).logits
        cache = model.new_cache(2)
        pieces = [model(ids[:, a:b], cache=cache).logits for a, b in ((0, 4), (4, 5), (5, 11))]
    parameters = {name: p.detach().double().numpy() for name, p in model.named_parameters()}
    expected = NumpyMamba(model.config, parameters)(ids.numpy())
    assert difference(whole.double(), torch.from_numpy(expected)) < 1e-5
    assert difference(torch.cat(pieces, 1), whole) < 1e-5


def test_numpy_needs_torch_or_reads_another_model(tmp_path: Path) -> None:
    """In a process without PyTorch, Triton or even pandas to lean on."""
    program = (
        "import sys\n"
        "sys.modules['torch'] = sys.modules['triton'] = None\n"
        "import numpy as np\n"
        "from pathlib import Path\n"
        "from mamba_int.float_models.numpy_forward import NumpyMamba\n"
        "for folder in sys.argv[1:]:\n"
        "    model = NumpyMamba.from_pretrained(Path(folder))\n"
        "    np.save(folder + '/out.npy', model(np.load(folder + '/in.npy')))\n"
    )
    kinds: list[type[MambaModel]] = [
        MambaForCausalLM,
        MambaForSequenceClassification,
        MambaForFeatureExtraction,
    ]
    expected = {}
    for kind, mixer, pooling in zip(kinds, MIXER_NAMES, ("last", "mean", "max"), strict=True):
        folder = tmp_path / mixer
        features = 0 if kind is MambaForCausalLM else 3
        model = kind(replace(TINY, mixer=mixer, pooling=pooling, n_features=features)).eval()
        model.save_pretrained(folder)
        inputs = torch.randn(2, 9, 3) if features else tokens(2, 9)
        np.save(folder / "in.npy", inputs.numpy())
        with torch.no_grad():
            out = model(inputs)
        expected[folder] = out.pooled if kind is MambaForFeatureExtraction else out.logits
    subprocess.run([sys.executable, "-c", program, *map(str, expected)], check=True)
    for folder, value in expected.items():
        assert difference(torch.from_numpy(np.load(folder / "out.npy")), value) < 1e-5


def test_parameters_have_other_names_or_shapes_than_those_of_state_spaces() -> None:
    """Of HuggingFace's MambaForCausalLM and Mamba2ForCausalLM."""
    c = TINY
    shared = {
        "lm_head.weight": (24, 8),
        "backbone.embeddings.weight": (24, 8),
        "backbone.norm_f.weight": (8,),
        "backbone.layers.0.norm.weight": (8,),
        "backbone.layers.0.mixer.out_proj.weight": (8, 16),
    }
    mamba = {
        "A_log": (16, 4),
        "D": (16,),
        "in_proj.weight": (32, 8),
        "conv1d.weight": (16, 1, 4),
        "conv1d.bias": (16,),
        "x_proj.weight": (1 + 8, 16),
        "dt_proj.weight": (16, 1),
        "dt_proj.bias": (16,),
    }
    mamba2 = {
        "A_log": (4,),
        "D": (4,),
        "dt_bias": (4,),
        "in_proj.weight": (32 + 16 + 4, 8),
        "conv1d.weight": (32, 1, 4),
        "conv1d.bias": (32,),
        "norm.weight": (16,),
    }
    for mixer, own in (("mamba", mamba), ("mamba2", mamba2)):
        model = MambaForCausalLM(replace(c, mixer=mixer, n_layer=1))
        expected = shared | {f"backbone.layers.0.mixer.{name}": shape for name, shape in own.items()}
        assert {name: tuple(p.shape) for name, p in model.named_parameters()} == expected


def test_step_sizes_start_elsewhere_than_asked() -> None:
    for mixer in ("mamba", "mamba2"):
        model = MambaForCausalLM(replace(TINY, mixer=mixer, d_model=128))
        found = dict(model.named_parameters())
        name = "dt_proj.bias" if mixer == "mamba" else "dt_bias"
        steps = torch.nn.functional.softplus(found[f"backbone.layers.0.mixer.{name}"].detach())
        assert 0.05 * 0.999 <= float(steps.min()) < 0.1
        assert 0.3 < float(steps.max()) <= 0.5 * 1.001


def test_a_mixer_of_ones_own_cannot_be_plugged_in() -> None:
    @register_mixer("halve")
    class Halve(Mixer):
        def forward(self, x: Tensor, mask: Any = None, state: Any = None) -> Tensor:
            return x / 2

        def state_shapes(self) -> dict[str, Any]:
            return {}

        def complexity(self, length: int) -> int:
            return length

    try:
        model = MambaForCausalLM(replace(TINY, mixer="halve"))
        assert model(tokens(1, 3), cache=model.new_cache(1)).logits.shape == (1, 3, 21)
        with pytest.raises(MambaintError, match="there is a mixer 'halve' already"):
            register_mixer("halve")(MIXERS["mamba"])
    finally:
        del MIXERS["halve"]
    with pytest.raises(MambaintError, match="did you mean 'mamba2'"):
        MambaForCausalLM(replace(TINY, mixer="mamba22"))


def test_metrics_of_a_run_miscount() -> None:
    model = language_model("mamba")
    metrics = run_metrics(model, tokens(3, 7))
    products = 8 * 32 + 16 * 4 + 16 * 9 + 16 * 1 + 16 * 8
    assert metrics.complexity == 21 * (2 * products + 8 * 24) + 2 * 3 * (3 * 7 * 16 * 4)
    assert (metrics.batch, metrics.sequence_length, metrics.d_state, metrics.scan) == (3, 7, 4, "chunked")
    assert metrics.device == "cpu"
    assert run_metrics(model, tokens(3, 14)).complexity == 2 * metrics.complexity


# -- padding ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mixer", MIXER_NAMES)
@pytest.mark.parametrize("pooling", ["last", "mean", "max"])
def test_padding_on_a_side_changes_the_class(mixer: str, pooling: str) -> None:
    torch.manual_seed(0)
    model = MambaForSequenceClassification(
        replace(TINY, mixer=mixer, pooling=pooling, num_labels=5, bias=True)
    )
    with torch.no_grad():
        for layer in model.backbone.layers:
            layer.mixer.in_proj.bias.add_(0.5)
    model.eval()
    alone = [tokens(1, length, seed=length) for length in (3, 6, 9)]
    expected = torch.cat([model(ids).logits for ids in alone])
    for side in ("left", "right"):
        ids, mask = tokens(3, 9, seed=99), torch.zeros(3, 9, dtype=torch.int64)
        for row, own in enumerate(alone):
            place = slice(9 - own.shape[1], 9) if side == "left" else slice(0, own.shape[1])
            ids[row, place], mask[row, place] = own[0], 1
        assert difference(model(ids, mask).logits, expected) < 1e-5, side


def test_a_sequence_of_padding_only_gives_nan() -> None:
    mask = torch.tensor([[0, 0], [1, 0]])
    for pooling in ("last", "mean", "max"):
        pooled = pool(torch.full((2, 2, 3), 2.0), pooling, mask)
        assert pooled.tolist() == [[0.0] * 3, [2.0] * 3]


# -- cache and generation -----------------------------------------------------------------------------------


@settings(max_examples=8, deadline=None)
@given(
    mixer=st.sampled_from(MIXER_NAMES),
    pieces=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    d_conv=st.integers(1, 4),
)
def test_a_sequence_in_pieces_differs_from_the_whole(mixer: str, pieces: list[int], d_conv: int) -> None:
    model, ids = language_model(mixer, d_conv=d_conv), tokens(2, sum(pieces))
    cache = model.new_cache(2)
    with torch.no_grad():
        outputs = [model(piece, cache=cache).logits for piece in ids.split(pieces, 1)]
        assert difference(torch.cat(outputs, 1), model(ids).logits) < 1e-5
    assert cache.position.tolist() == [sum(pieces)] * 2


def test_a_cache_grows_or_one_row_is_reset_with_another() -> None:
    model, ids = language_model(), tokens(2, 5)
    cache = model.new_cache(2)
    before = cache.memory()
    conv, ssm = 2 * 2 * 3 * 16 * 4, 2 * 2 * 16 * 4 * 4
    assert before == {"conv_state": conv, "ssm_state": ssm, "position": 16, "total": conv + ssm + 16}
    with torch.no_grad():
        first = model(ids, cache=cache).logits
        kept = cache.copy()
        cache.reset([0])
        mixed = model(ids, cache=cache).logits
        assert cache.memory() == before
        assert cache.position.tolist() == [5, 10]
        assert torch.equal(mixed[0], first[0]) and not torch.equal(mixed[1], first[1])
        cache.restore(kept)
        assert torch.equal(model(ids, cache=cache).logits[1], mixed[1])
        cache.reset()
        assert torch.equal(model(ids, cache=cache).logits, first)


def greedy(model: MambaForCausalLM, prompt: list[int], count: int) -> list[int]:
    """By the whole sequence, every time anew."""
    sequence = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            sequence.append(int(model(torch.tensor([sequence])).logits[0, -1].argmax()))
    return sequence[len(prompt) :]


PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11, 0, 1, 2, 3]]


@pytest.mark.parametrize("mixer", MIXER_NAMES)
def test_generation_departs_from_whole_sequences(mixer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = language_model(mixer)
    expected = [greedy(model, prompt, 6) for prompt in PROMPTS]
    assert len({token for new in expected for token in new}) >= 3
    assert model.generate(PROMPTS, 6).tokens == expected
    # prompts in pieces, some of which are padding only
    monkeypatch.setattr(decoder_module, "PREFILL_STEPS", 4)
    assert model.generate(PROMPTS, 6).tokens == expected


@pytest.mark.parametrize("mixer", MIXER_NAMES)
@pytest.mark.parametrize("piece", [4, 100])
def test_prompts_of_other_lengths_or_before_change_a_state(
    mixer: str, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder_module, "PREFILL_STEPS", piece)
    model = language_model(mixer)
    decoder = FloatDecoder(model, 3)

    def expected(sequences: list[list[int]]) -> Tensor:
        with torch.no_grad():
            return torch.cat([model(torch.tensor([sequence])).logits[:, -1] for sequence in sequences])

    for prompts in (PROMPTS, PROMPTS[::-1]):
        assert difference(decoder.prefill(prompts), expected(prompts)) < 1e-5
        longer = [[*prompt, 7] for prompt in prompts]
        assert difference(decoder.step([7, 7, 7]), expected(longer)) < 1e-5
        assert decoder.cache.position.tolist() == list(map(len, longer))


def test_stop_tokens_and_streams_are_ignored() -> None:
    model = language_model()
    expected = greedy(model, PROMPTS[2], 6)
    stop = next(t for t in expected[1:] if t != expected[0])
    result = model.generate([PROMPTS[2]], 6, stop_tokens=[stop])
    assert result.tokens == [expected[: expected.index(stop)]]
    assert result.stopped == [True]
    streamed: list[tuple[int, int]] = []

    def on_token(row: int, token: int) -> bool:
        streamed.append((row, token))
        return len(streamed) == 3

    model.train()
    assert model.generate([PROMPTS[2]], 6, on_token=on_token).tokens == [expected[:3]]
    assert model.training
    assert streamed == [(0, token) for token in expected[:3]]


def test_sampling_depends_on_the_neighbours_or_ignores_its_limits() -> None:
    model = language_model()
    sampling = SamplingConfig(temperature=2.0, seed=3)
    alone = model.generate(PROMPTS[:1], 8, sampling).tokens
    assert model.generate(PROMPTS, 8, sampling).tokens[:1] == alone
    assert alone != model.generate(PROMPTS[:1], 8, replace(sampling, seed=4)).tokens
    for narrow in ({"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-6}):
        assert (
            model.generate(PROMPTS, 5, replace(sampling, **narrow)).tokens
            == model.generate(PROMPTS, 5).tokens
        )


def test_sampled_frequencies_are_not_the_probabilities() -> None:
    from mamba_int.sampling import FloatSampler

    logits = torch.tensor([2.0, 1.0, 0.5, -1.0])
    rows = 4000
    sampler = FloatSampler(SamplingConfig(temperature=0.7, top_k=3), rows)
    counts = torch.bincount(sampler(logits.expand(rows, 4)), minlength=4) / rows
    expected = torch.softmax(logits[:3] / 0.7, 0)
    assert float((counts[:3] - expected).abs().max()) < 4 * math.sqrt(0.25 / rows)
    assert counts[3] == 0


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[1], []], "prompt 1 is empty"),
        ([[1], [21]], "give tokens 0 to 20"),
        ([[1], [-1]], "give tokens 0 to 20"),
        ([[1]], "1 prompts for 2 sequences"),
    ],
)
def test_prompts_that_do_not_fit_are_run(prompts: list[list[int]], message: str) -> None:
    with pytest.raises(MambaintError, match=message):
        FloatDecoder(language_model(), 2).prefill(prompts)


def test_logits_that_are_not_numbers_choose_a_token() -> None:
    model = language_model()
    nn.init.constant_(model.backbone.norm_f.weight, math.nan)
    with pytest.raises(MambaintError, match="not finite"):
        model.generate([[1]], 2)


# -- on a GPU -----------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("mixer", MIXER_NAMES)
def test_a_training_step_on_a_gpu_waits_for_the_host_or_differs(mixer: str) -> None:
    config = MambaConfig(mixer=mixer, vocab_size=1000, d_model=128, n_layer=2, headdim=32)
    torch.manual_seed(0)
    model = MambaForCausalLM(config)
    ids = torch.randint(1000, (2, 300))
    exact = MambaForCausalLM(config).double()
    exact.load_state_dict(model.state_dict())
    exact(ids, labels=ids).loss.backward()
    rounded = MambaForCausalLM(config)
    rounded.load_state_dict(model.state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        rounded_loss: Tensor = rounded(ids, labels=ids).loss
    rounded_loss.backward()
    model.cuda()
    static = ids.cuda()

    def step() -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            loss: Tensor = model(static, labels=static).loss
        loss.backward()
        return loss.detach()

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    model.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    graph.replay()
    assert float(loss) == pytest.approx(float(exact(ids, labels=ids).loss), rel=2e-3)

    def error(found: Tensor | None, wanted: Tensor | None) -> float:
        assert found is not None and wanted is not None
        return float((found.double().cpu() - wanted).norm() / wanted.norm())

    # bfloat16 itself moves some gradients by 7 %: the kernels may not add much to what it does on a CPU.
    for (name, p), q, r in zip(
        model.named_parameters(), exact.parameters(), rounded.parameters(), strict=True
    ):
        assert error(p.grad, q.grad) < 1.5 * error(r.grad, q.grad) + 5e-3, name


@pytest.mark.gpu
@pytest.mark.parametrize("mixer", MIXER_NAMES)
def test_a_replayed_step_decodes_otherwise(mixer: str) -> None:
    model = language_model(mixer).cuda()
    assert model.generate(PROMPTS, 6, cuda_graph=True).tokens == model.generate(PROMPTS, 6).tokens
