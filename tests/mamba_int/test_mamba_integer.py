"""The float models of Mamba-Integer against its formulas, written out in float64."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from triton import knobs

from mamba_int.errors import MambaintError
from mamba_int.float_models.bit_linear import BitLinear
from mamba_int.float_models.bit_shift_norm import BitShiftNorm
from mamba_int.float_models.config import MambaConfig
from mamba_int.float_models.models import MambaForCausalLM
from mamba_int.float_models.numpy_forward import NumpyMamba

Array = NDArray[np.float64]
TINY = MambaConfig(
    mixer="mamba_integer_v1",
    vocab_size=19,
    pad_vocab_size_multiple=1,
    d_model=12,
    n_layer=2,
    d_state=3,
    dt_rank=5,
    headdim=8,
    activation="squareplus",
    gate_activation="algebraic_sigmoid",
    norm="bit_shift",
    head="bit_linear",
    scale_logits=True,
    tie_embeddings=False,
)
VERSIONS = ("mamba_integer_v1", "mamba_integer_v2")


@pytest.fixture(autouse=True, scope="module")
def without_kernels() -> Any:
    """The interpreter would run Triton's kernels on these tensors."""
    with knobs.runtime.scope():
        knobs.runtime.interpret = False
        yield


def model_of(version: str, **changes: Any) -> MambaForCausalLM:
    """In float64; the decays reach both ends of their range, the steps both of theirs."""
    torch.manual_seed(0)
    config = replace(TINY, mixer=version, **changes)
    model = MambaForCausalLM(config).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("norm.weight", "norm_f.weight", "step_size", "res_gate")):
                parameter.mul_(torch.rand_like(parameter) + 0.5)
            elif name.endswith("base_decay_nums"):
                parameter.copy_(torch.rand_like(parameter) * 36000 - 2000)
            elif name.endswith("A_log"):
                parameter.copy_(-3 * torch.rand_like(parameter))
            elif name.endswith("embeddings.weight"):
                # Variances on both sides of one.
                parameter.mul_(torch.logspace(-4, 4, len(parameter), 2, dtype=parameter.dtype)[:, None])
            elif name.endswith("dt_proj.weight"):
                parameter.mul_(30)
    return model


def tokens(batch: int, length: int) -> Tensor:
    return torch.randint(TINY.vocab_size, (batch, length), generator=torch.Generator().manual_seed(1))


# -- the formulas -------------------------------------------------------------------------------------------


def bit_linear(W: Array, x: Array) -> Array:
    s = max(np.abs(W).mean(), 1e-6)
    a = max(np.abs(x).max(), 1e-8)
    out = np.zeros(len(W))
    for i in range(len(W)):
        for j in range(len(x)):
            w = min(max(round(W[i, j] / s), -1), 1)
            out[i] += w * min(max(round(127 * x[j] / a), -127), 127) * s * a / 127
    return out


def bit_shift_norm(x: Array, gamma: Array, step: float) -> Array:
    xc = x - x.mean()
    v = (xc * xc).mean()
    scale = 8.0
    for k in range(-3, 9):
        if v >= 4.0**k:
            scale = 2.0**-k
    return xc * scale * gamma * step


def squareplus(x: float) -> float:
    return 0.5 * (x + (x * x + 4) ** 0.5)


def clip(x: float, low: float, high: float) -> float:
    return min(max(x, low), high)


def reference(model: MambaForCausalLM, ids: list[int]) -> Array:
    """Logits of one sequence."""
    c = model.config
    p = {name: value.detach().numpy() for name, value in model.named_parameters()}
    stream = [p["backbone.embeddings.weight"][token].copy() for token in ids]
    for i in range(c.n_layer):
        at = f"backbone.layers.{i}.mixer."
        xs, zs = [], []
        for u in stream:
            norm = f"backbone.layers.{i}.norm."
            xz = bit_linear(
                p[f"{at}in_proj.weight"], bit_shift_norm(u, p[f"{norm}weight"], p[f"{norm}step_size"][0])
            )
            xs.append(xz[: c.d_inner])
            zs.append(xz[c.d_inner :])
        h1 = np.zeros((c.d_inner, c.d_state))
        h2 = np.zeros((c.n_heads, c.headdim, c.d_state))
        for t in range(len(ids)):
            x = np.zeros(c.d_inner)
            for d in range(c.d_inner):
                total = p[f"{at}conv1d.bias"][d]
                for j in range(4):
                    if t - 3 + j >= 0:
                        total += p[f"{at}conv1d.weight"][d, 0, j] * xs[t - 3 + j][d]
                x[d] = squareplus(clip(total, -50, 50))
            projected = bit_linear(p[f"{at}x_proj.weight"], x)
            y = np.zeros(c.d_inner)
            if c.mixer == "mamba_integer_v1":
                R, N = c.dt_rank, c.d_state
                modulation = bit_linear(p[f"{at}dt_proj.weight"], projected[:R])
                for d in range(c.d_inner):
                    m = clip(modulation[d], -20, 20)
                    dt = clip(0.01 * squareplus(m), 0.001, 0.1)
                    for k in range(N):
                        n = clip(p[f"{at}base_decay_nums"][d, k] + m, 0, 32000)
                        U = x[d] * dt * projected[R + k]
                        h1[d, k] = n / 2**15 * h1[d, k] + (1 - n / 2**15) * U
                        y[d] += h1[d, k] * projected[R + N + k]
            else:
                N, P = c.d_state, c.headdim
                for h in range(c.n_heads):
                    row = projected[h * (1 + 2 * N) : (h + 1) * (1 + 2 * N)]
                    B, C = row[1 : 1 + N], row[1 + N :]
                    B = B / ((B * B).sum() ** 0.5 + 1e-6)
                    C = C / ((C * C).sum() ** 0.5 + 1e-6)
                    softplus = clip(float(np.log1p(np.exp(clip(row[0], -10, 10)))), 0.01, 10)
                    A = clip(clip(p[f"{at}A_log"][h], -2.3, -0.01) * softplus, -20, -0.001)
                    for q in range(P):
                        h2[h, q] = np.exp(A) * h2[h, q] + B * x[h * P + q]
                        y[h * P + q] = (h2[h, q] * C).sum()
            gated = y * (0.5 + 0.5 * zs[t] / (1 + np.abs(zs[t])))
            stream[t] = stream[t] + p[f"{at}res_gate"] * bit_linear(p[f"{at}out_proj.weight"], gated)
    logits = []
    for u in stream:
        normed = bit_shift_norm(u, p["backbone.norm_f.weight"], p["backbone.norm_f.step_size"][0])
        logits.append(bit_linear(p["lm_head.weight"], normed) / c.d_model**0.5)
    return np.array(logits)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_logits_are_not_those_of_the_formulas(version: str) -> None:
    model, ids = model_of(version), tokens(2, 11)
    with torch.no_grad():
        found = model(ids).logits.numpy()
    expected = np.stack([reference(model, row) for row in ids.tolist()])
    assert found.std() > 1e-2
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9)
    # In float32 nothing but rounding to eight bits, where it is a tie, may be otherwise.
    with torch.no_grad():
        single = model.float()(ids).logits.double().numpy()
    assert np.median(np.abs(single - expected)) < 1e-4


@pytest.mark.parametrize("version", VERSIONS)
def test_a_mixer_of_random_weights_does_not_use_its_range(version: str) -> None:
    """Else the test above would not see a wrong clip."""
    model, ids = model_of(version), tokens(2, 11)
    mixer = model.backbone.layers[0].mixer
    with torch.no_grad():
        u, _ = mixer.in_proj(model.backbone.layers[0].norm(model.backbone.embeddings(ids))[0]).chunk(2, -1)
        u = mixer.convolve(mixer.conv1d, u, None, None)
        if version == "mamba_integer_v1":
            m, _, _ = mixer.parts(u)
            decay = mixer.decay(m)
            assert decay.min() == 0 and decay.max() == 32000 / 2**15 and m.abs().max() == 20
            assert 0.1 < float(((decay > 0) & (decay < 32000 / 2**15)).double().mean()) < 1
        else:
            exponent = mixer.exponent(mixer.parts(u)[0])
            assert exponent.std() > 0.1


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("way", ["sequential", "associative", "chunked"])
def test_pieces_ways_padding_or_numpy_change_the_logits(version: str, way: str) -> None:
    model, ids = model_of(version, scan_type=way, norm_max_shift=2), tokens(2, 37)
    with torch.no_grad():
        whole = model(ids).logits
        cache = model.new_cache(2)
        pieces = [model(ids[:, a:b], cache=cache).logits for a, b in ((0, 4), (4, 5), (5, 37))]
        padded = torch.cat([torch.zeros_like(ids[:, :3]), ids], 1)
        mask = torch.ones_like(padded)
        mask[:, :3] = 0
        left = model(padded, mask).logits[:, 3:]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=0, atol=1e-9)
    torch.testing.assert_close(left, whole, rtol=0, atol=1e-9)
    parameters = {name: p.detach().numpy() for name, p in model.named_parameters()}
    found = NumpyMamba(model.config, parameters)(ids.numpy())
    np.testing.assert_allclose(found, whole.numpy(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_saved_model_comes_back_as_another_or_generates_otherwise(version: str, tmp_path: Path) -> None:
    model = model_of(version).float()
    model.save_pretrained(tmp_path)
    again = MambaForCausalLM.from_pretrained(tmp_path)
    assert again.config == model.config
    ids = tokens(2, 9)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    prompts = [[1, 2, 3], [4]]
    double = model.double()
    expected = []
    for prompt in prompts:
        sequence = list(prompt)
        with torch.no_grad():
            for _ in range(5):
                sequence.append(int(double(torch.tensor([sequence])).logits[0, -1].argmax()))
        expected.append(sequence[len(prompt) :])
    assert double.generate(prompts, 5).tokens == expected


@pytest.mark.parametrize("version", VERSIONS)
def test_a_parameter_does_not_learn(version: str) -> None:
    torch.manual_seed(0)
    model = MambaForCausalLM(replace(TINY, mixer=version)).train()
    ids = tokens(1, 12)
    model(ids, labels=ids).loss.backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    roles = [p for role in model.parameter_roles().values() for p in role]
    assert sorted(map(id, roles)) == sorted(map(id, model.parameters()))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 1.0


def test_an_exact_power_of_four_or_zero_falls_on_the_wrong_side() -> None:
    norm = BitShiftNorm(2, -3, 8, True)
    for k in (-4, -3, 0, 5, 8, 9):
        # Variance 4^k exactly, and the float below.
        at = 2.0**k * torch.tensor([1.0, -1.0])
        below = torch.nextafter(at.abs(), torch.zeros(2)) * at.sign()
        held = min(max(k, -3), 8)
        assert torch.equal(norm.normed(at), at * 2.0**-held)
        held = min(max(k - 1, -3), 8)
        assert torch.equal(norm.normed(below), below * 2.0**-held)
    assert torch.equal(norm.normed(torch.full((2,), 7.0)), torch.zeros(2))


def test_a_matrix_of_zeros_or_a_zero_step_gives_nan() -> None:
    linear = BitLinear(3, 2)
    assert torch.equal(linear(torch.zeros(1, 3)), torch.zeros(1, 2))
    with torch.no_grad():
        linear.weight.zero_()
    y = linear(torch.randn(4, 3))
    assert torch.equal(y, torch.zeros(4, 2))


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"mixer": "mamba_integer_v2", "headdim": 7}, "headdim"),
        ({"norm_min_shift": 3, "norm_max_shift": 2}, "norm_min_shift exceeds"),
        ({"norm_max_shift": 17}, "norm_max_shift"),
    ],
)
def test_shapes_that_do_not_fit_are_taken(change: dict[str, Any], cause: str) -> None:
    with pytest.raises(MambaintError, match=cause):
        replace(TINY, **change)
