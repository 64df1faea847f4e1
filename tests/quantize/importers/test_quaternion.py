"""Checkpoints of Quaternion Mamba-2's source: read by its layout, computed as its formulas say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from mamba_int.errors import MambaintError
from mamba_int.float_models.models import MambaForCausalLM
from quantize.importers import load_float_model

D_MODEL, D_INNER, D_STATE, LAYERS, ROWS = 6, 12, 3, 2, 16
Array = NDArray[np.float64]


def checkpoint(lite: bool) -> dict[str, Tensor]:
    """Random weights under the names and in the shapes of its ``model_state_dict``."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * 0.4

    weights = {
        "embedding.weight": random(ROWS, D_MODEL),
        "norm_f.weight": 1 + random(D_MODEL),
        "norm_f.bias": random(D_MODEL),
        "lm_head.weight": random(ROWS, D_MODEL),
    }
    for i in range(LAYERS):
        own = {
            "Lambda_alpha": random(D_INNER, D_STATE),
            "D": random(D_INNER),
            "in_proj.weight": random(2 * D_INNER, D_MODEL),
            "conv1d.conv.weight": random(D_INNER, 1, 4),
            "conv1d.conv.bias": random(D_INNER),
            "dt_proj.weight": random(D_INNER, D_INNER),
            "dt_proj.bias": random(D_INNER),
            "B_proj.weight": random(4 * D_INNER * D_STATE, D_INNER),
            "C_proj.weight": random(4 * D_INNER * D_STATE, D_INNER),
            "gate_proj.weight": random(D_INNER, D_INNER),
            "norm.gamma": 1 + random(D_INNER),
            "norm.beta": random(D_INNER, 4),
            "out_proj.weight": random(D_MODEL, 4 * D_INNER),
        }
        if not lite:
            own["Lambda_imag"] = random(D_INNER, D_STATE, 3)
        weights |= {f"layers.{i}.{name}": value for name, value in own.items()}
    return weights


def product(p: Array, q: Array) -> Array:
    a, b, c, d = np.moveaxis(p, -1, 0)
    e, f, g, h = np.moveaxis(q, -1, 0)
    parts = (
        a * e - b * f - c * g - d * h,
        a * f + b * e + c * h - d * g,
        a * g - b * h + c * e + d * f,
        a * h + b * g - c * f + d * e,
    )
    return np.stack(parts, -1)


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def block(w: dict[str, Array], u: Array, lite: bool) -> Array:
    """One block on [T, d_model], by the formulas of its description."""
    steps = len(u)
    x, z = np.split(u @ w["in_proj.weight"].T, 2, -1)
    padded = np.concatenate([np.zeros((3, D_INNER)), x])
    taps = w["conv1d.conv.weight"][:, 0]
    x = sum(padded[i : i + steps] * taps[:, i] for i in range(4)) + w["conv1d.conv.bias"]
    x = x * sigmoid(x)
    delta = np.log1p(np.exp(x @ w["dt_proj.weight"].T + w["dt_proj.bias"]))
    B, C = ((x @ w[f"{name}_proj.weight"].T).reshape(steps, D_INNER, D_STATE, 4) for name in ("B", "C"))
    real = sigmoid(x @ w["gate_proj.weight"].T) * x
    S = np.stack([real, *[np.zeros_like(real)] * 3], -1)
    alpha = np.log1p(np.exp(w["Lambda_alpha"]))
    h = np.zeros((D_INNER, D_STATE, 4))
    rows = []
    for t in range(steps):
        if lite:
            rate = -delta[t, :, None] * alpha
            A = (1 + rate / 2) / np.maximum(1 - rate / 2, 1e-4)
            h = A[..., None] * h
            h[..., 0] += B[t, ..., 0] * real[t, :, None]
            y = (C[t] * h[..., :1]).sum(1)
        else:
            rates = np.concatenate([-alpha[..., None], np.tanh(w["Lambda_imag"])], -1)
            half = delta[t, :, None, None] * rates / 2
            one = np.array([1.0, 0, 0, 0])
            bottom = one - half
            inverse = bottom * [1, -1, -1, -1] / np.maximum((bottom**2).sum(-1, keepdims=True), 1e-6)
            h = product(product(inverse, one + half), h) + product(B[t], S[t][:, None])
            y = product(C[t], h).sum(1)
        rows.append(y + w["D"][:, None] * S[t])
    y = np.stack(rows)
    n = np.sqrt((y**2).sum(-1) + 1e-5)
    normed = (n - n.mean(-1, keepdims=True)) / np.sqrt(n.var(-1, keepdims=True) + 1e-5)
    y = (w["norm.gamma"] * normed)[..., None] * y / (n + 1e-5)[..., None] + w["norm.beta"]
    return u + sigmoid(z[:, :D_MODEL]) * (y.reshape(steps, -1) @ w["out_proj.weight"].T)


def logits(weights: dict[str, Tensor], tokens: list[int], lite: bool) -> Array:
    w = {name: value.double().numpy() for name, value in weights.items()}
    u = w["embedding.weight"][tokens]
    for i in range(LAYERS):
        at = f"layers.{i}."
        own = {name.removeprefix(at): value for name, value in w.items() if name.startswith(at)}
        u = block(own, u, lite)
    u = (u - u.mean(-1, keepdims=True)) / np.sqrt(u.var(-1, keepdims=True) + 1e-5)
    found: Array = (u * w["norm_f.weight"] + w["norm_f.bias"]) @ w["lm_head.weight"].T
    return found


def saved(path: Path, weights: dict[str, Tensor]) -> Path:
    training: dict[str, Any] = {"step": 7, "epoch": 0, "model_state_dict": weights, "val_loss": 1.0}
    torch.save(training, path)
    return path


@pytest.mark.parametrize("lite", [False, True])
def test_a_checkpoint_of_the_source_is_another_model(lite: bool, tmp_path: Path) -> None:
    weights = checkpoint(lite)
    model, description = load_float_model(saved(tmp_path / "checkpoint.pt", weights))
    assert description.format == "quaternion"
    assert description.config.mixer == ("quaternion_full_lite" if lite else "quaternion_full")
    assert isinstance(model, MambaForCausalLM)
    tokens = [3, 1, 4, 1, 5, 9, 2, 6, 5]
    with torch.no_grad():
        found = model(torch.tensor([tokens])).logits[0]
    expected = logits(weights, tokens, lite)
    assert np.abs(found.double().numpy() - expected).max() < 2e-5 * np.abs(expected).max()


def test_a_tensor_of_the_source_is_lost(tmp_path: Path) -> None:
    weights = checkpoint(False)
    del weights["layers.1.C_proj.weight"]
    weights["layers.0.extra"] = torch.zeros(1)
    with pytest.raises(MambaintError, match=r"lacks layers\.1\.C_proj\.weight, has unknown layers\.0\.extra"):
        load_float_model(saved(tmp_path / "checkpoint.pt", weights))
