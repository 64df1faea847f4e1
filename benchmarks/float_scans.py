"""The float scans on a GPU beside their peers: milliseconds in one run, and errors against float64.

Peers are read from source directories, never installed: ``MAMBA_SSM_SOURCE`` holds a ``mamba_ssm`` package
(its Triton kernels need no CUDA extension, only einops), ``MINIMAMBA_SOURCE`` a ``minimamba`` package.
Without them the peer's columns are empty. Run ``python -m benchmarks.float_scans``; it prints one JSON list.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton.testing
from torch import Tensor

from benchmarks.peers import mamba_ssm_module, minimamba_module
from triton_kernels.associative_scan import associative_scan, associative_scan_reference
from triton_kernels.selective_scan import selective_scan, selective_scan_reference
from triton_kernels.state_space_duality import state_space_duality, state_space_duality_reference

Scan = Callable[..., Any]
Operands = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One scan at one shape; ``error`` is the largest of output, state and gradients, over each's peak.

    ``ratio`` is the peer's forward and backward over ours: above one, ours is faster.
    """

    name: str
    shape: str
    dtype: str
    forward_ms: float
    forward_backward_ms: float
    peer: str | None
    peer_forward_ms: float | None
    peer_forward_backward_ms: float | None
    ratio: float | None
    error: float


def mamba_ssm_scan() -> Scan | None:
    """``mamba_chunk_scan_combined``, past the __init__ of its package, which loads CUDA extensions."""
    source = os.environ.get("MAMBA_SSM_SOURCE")
    if source is None:
        return None
    scan: Scan = mamba_ssm_module(Path(source), "ops.triton.ssd_combined").mamba_chunk_scan_combined
    return scan


def minimamba_scan(channels: int, d_state: int) -> Scan | None:
    """MiniMamba's selective scan, which expects softplus and silu to have been applied."""
    source = os.environ.get("MINIMAMBA_SOURCE")
    if source is None:
        return None
    s6 = minimamba_module(Path(source), "s6").S6
    config = minimamba_module(Path(source), "config").MambaConfig(
        d_model=channels // 2, n_layer=1, vocab_size=16, d_state=d_state, expand=2
    )
    layer = s6(config).cuda()

    def scan(
        u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, **_: Any
    ) -> Tensor:
        y: Tensor = layer._selective_scan_forward(u, F.softplus(delta), A, B, C, D, F.silu(z))
        return y

    return scan


def random_operands(seed: int, **shapes: tuple[int, ...]) -> Operands:
    """Normally distributed float32 CUDA tensors by name."""
    generator = torch.Generator("cuda").manual_seed(seed)
    return {name: torch.randn(*shape, generator=generator, device="cuda") for name, shape in shapes.items()}


def leaves(operands: Operands) -> Operands:
    """Copies that gradients can be taken of."""
    return {
        name: value.detach().clone().requires_grad_() if isinstance(value, Tensor) else value
        for name, value in operands.items()
    }


def milliseconds(scan: Scan, operands: Operands, gradient: Tensor) -> tuple[float, float]:
    """Median forward, without and with backward to all operands."""
    inputs = leaves(operands)
    tensors = [value for value in inputs.values() if isinstance(value, Tensor)]

    def forward() -> Any:
        result = scan(**inputs)
        return result[0] if isinstance(result, tuple) else result

    def forward_backward() -> None:
        torch.autograd.grad(forward(), tensors, gradient)

    with torch.no_grad():
        alone = triton.testing.do_bench(forward, return_mode="median")
    both = triton.testing.do_bench(forward_backward, return_mode="median")
    return float(alone), float(both)


def largest_error(scan: Scan, reference: Scan, operands: Operands) -> float:
    """Over output, final state and all gradients: largest difference over largest value, against float64."""

    def results(function: Scan, values: Operands) -> list[Tensor]:
        inputs = leaves(values)
        outputs = function(**inputs)
        torch.manual_seed(0)
        gradients = [torch.randn(out.shape, dtype=torch.float64).to(out) for out in outputs]
        tensors = [value for value in inputs.values() if isinstance(value, Tensor)]
        return [*outputs, *torch.autograd.grad(outputs, tensors, gradients)]

    wide = {
        name: value.to(torch.complex128 if value.is_complex() else torch.float64)
        if isinstance(value, Tensor)
        else value
        for name, value in operands.items()
    }
    pairs = zip(results(scan, operands), results(reference, wide), strict=True)
    return max(float((got - want).abs().max() / want.abs().max()) for got, want in pairs)


def duality_operands(batch: int, length: int, heads: int, headdim: int, d_state: int) -> Operands:
    """bfloat16 operands of Mamba-2 with one group, of the sizes its initialization gives."""
    random = random_operands(
        0,
        x=(batch, length, heads, headdim),
        dt=(batch, length, heads),
        B=(batch, length, 1, d_state),
        C=(batch, length, 1, d_state),
        D=(heads,),
    )
    low = {name: random[name].bfloat16() for name in ("x", "dt", "B", "C")}
    A = -torch.linspace(1.0, 16.0, heads, device="cuda")
    dt_bias = torch.full((heads,), -4.0, device="cuda")
    return low | {"A": A, "D": random["D"], "dt_bias": dt_bias, "dt_softplus": True}


def state_space_duality_row(batch: int, length: int, heads: int, headdim: int, d_state: int) -> Row:
    """Mamba-2's scan in bfloat16 beside ``mamba_ssm`` with chunks of 256, its default."""
    operands = duality_operands(batch, length, heads, headdim, d_state)
    gradient = torch.randn_like(operands["x"])
    ours = milliseconds(state_space_duality, operands, gradient)
    peer = mamba_ssm_scan()
    alone, both = (
        (None, None) if peer is None else milliseconds(peer, operands | {"chunk_size": 256}, gradient)
    )
    small = duality_operands(1, 512, min(heads, 8), headdim, d_state)
    return Row(
        "state_space_duality",
        f"B {batch} T {length} H {heads} P {headdim} N {d_state}",
        "bfloat16",
        *ours,
        None if peer is None else "mamba_ssm",
        alone,
        both,
        None if both is None else both / ours[1],
        largest_error(state_space_duality, state_space_duality_reference, small),
    )


def selective_operands(batch: int, length: int, channels: int, d_state: int) -> Operands:
    """float32 operands of Mamba-1, of the sizes its initialization gives."""
    random = random_operands(
        0,
        u=(batch, length, channels),
        delta=(batch, length, channels),
        B=(batch, length, d_state),
        C=(batch, length, d_state),
        D=(channels,),
        z=(batch, length, channels),
    )
    A = -torch.arange(1.0, d_state + 1, device="cuda").repeat(channels, 1)
    return random | {"delta": random["delta"] - 4.0, "A": A, "delta_softplus": True}


def selective_scan_row(batch: int, length: int, channels: int, d_state: int) -> Row:
    """Mamba-1's scan in float32 beside MiniMamba's."""
    operands = selective_operands(batch, length, channels, d_state)
    gradient = torch.randn_like(operands["u"])
    ours = milliseconds(selective_scan, operands, gradient)
    peer = minimamba_scan(channels, d_state)
    alone, both = (None, None) if peer is None else milliseconds(peer, operands, gradient)
    return Row(
        "selective_scan",
        f"B {batch} L {length} D {channels} N {d_state}",
        "float32",
        *ours,
        None if peer is None else "minimamba",
        alone,
        both,
        None if both is None else both / ours[1],
        largest_error(selective_scan, selective_scan_reference, selective_operands(1, 256, 64, d_state)),
    )


def associative_scan_row(batch: int, length: int, channels: int, dtype: torch.dtype) -> Row:
    """The plain recurrence; there is no peer for it."""

    def operands(*shape: int) -> Operands:
        generator = torch.Generator("cuda").manual_seed(0)
        a, b = (torch.randn(*shape, generator=generator, device="cuda", dtype=dtype) for _ in range(2))
        return {"a": a * 0.6, "b": b}

    values = operands(batch, length, channels)
    ours = milliseconds(associative_scan, values, torch.randn_like(values["b"]))
    error = largest_error(associative_scan, associative_scan_reference, operands(1, 512, 64))
    shape, name = f"B {batch} T {length} D {channels}", str(dtype).removeprefix("torch.")
    return Row("associative_scan", shape, name, *ours, None, None, None, None, error)


def rows() -> list[Row]:
    """All measurements, one after the other."""
    return [
        state_space_duality_row(8, 4096, 32, 64, 128),
        state_space_duality_row(4, 2048, 24, 64, 64),
        selective_scan_row(8, 1024, 1024, 16),
        associative_scan_row(8, 1024, 1024, torch.float32),
        associative_scan_row(8, 1024, 1024, torch.complex64),
    ]


def main() -> None:
    """Print all rows as JSON."""
    print(json.dumps([asdict(row) for row in rows()], indent=1))


if __name__ == "__main__":
    main()
