"""A float kernel beside its reference in float64: values and all gradients, as relative errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from triton_kernels.dispatch import runs_on_triton

Scan = Callable[..., tuple[Tensor, Tensor]]
Operands = dict[str, Any]


class Random:
    """Normally distributed operands, the same for the same seed."""

    def __init__(self, seed: int, device: str = "cpu") -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.device = device

    def __call__(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        wide = torch.complex128 if dtype.is_complex else torch.float64
        return torch.randn(*shape, generator=self.generator, dtype=wide).to(self.device, dtype)


def widened(value: Any) -> Any:
    """The same numbers in float64 or complex128."""
    if not isinstance(value, Tensor):
        return value
    return value.to(torch.complex128 if value.is_complex() else torch.float64)


def results(scan: Scan, operands: Operands, gradients: tuple[Tensor | None, ...]) -> dict[str, Tensor]:
    """Output, final state and the gradient of every tensor among the operands."""
    leaves = {
        name: value.detach().clone().requires_grad_() if isinstance(value, Tensor) else value
        for name, value in operands.items()
    }
    outputs = scan(**leaves)
    given = [
        (out, grad.to(out.dtype)) for out, grad in zip(outputs, gradients, strict=True) if grad is not None
    ]
    torch.autograd.backward([out for out, _ in given], [grad for _, grad in given])
    found = {"output": outputs[0].detach(), "final_state": outputs[1].detach()}
    for name, leaf in leaves.items():
        if isinstance(leaf, Tensor):
            found[f"d{name}"] = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
    return found


def errors(
    scan: Scan, reference: Scan, operands: Operands, gradients: tuple[Tensor | None, ...]
) -> dict[str, float]:
    """Largest difference over largest value of each result, against the reference in float64."""
    first = next(iter(operands.values()))
    assert runs_on_triton(first), "kernels on CPU tensors need TRITON_INTERPRET=1 (make test sets it)"
    got = results(scan, operands, gradients)
    wanted = results(
        reference,
        {name: widened(value) for name, value in operands.items()},
        tuple(widened(value) for value in gradients),
    )
    found = {}
    for name, value in got.items():
        assert value.shape == wanted[name].shape, name
        assert torch.isfinite(torch.view_as_real(value) if value.is_complex() else value).all(), name
        scale = float(wanted[name].abs().max())
        found[name] = float((widened(value) - wanted[name]).abs().max()) / (scale or 1.0)
    return found


def assert_close(found: dict[str, float], bound: float) -> None:
    """All errors within ``bound``, naming those that are not."""
    assert not {name: error for name, error in found.items() if not error <= bound}, found
