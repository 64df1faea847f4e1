"""Every kernel and training configuration beside its peer on one GPU, in one run.

``python -m benchmarks.gpu [--peers DIR]`` prints a table and writes ``benchmarks/results/gpu.json``. DIR has
the source directories ``mamba_ssm`` and ``minimamba`` of those packages; their Triton and PyTorch code runs
without their CUDA extensions. Without DIR the peers' columns are empty.
"""

from __future__ import annotations

import argparse
import gc
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import triton.testing
from torch import Tensor, nn
from torch.nn import functional

from benchmarks import float_scans
from benchmarks.hardware import hardware
from benchmarks.peers import mamba_ssm_module, minimamba_module
from mamba_int.config import MambaIntConfig
from mamba_int.files import write_json
from mamba_int.float_models.config import MambaConfig
from mamba_int.float_models.models import MambaForCausalLM
from mamba_int.model import MambaInt
from mamba_int.training.captured import CapturedBackward
from triton_kernels.chunked_ssd import ssd_requantize
from triton_kernels.conv import Activation, conv_requantize
from triton_kernels.gate import HardSilu, hard_silu_gate
from triton_kernels.linear import Rounding, linear_requantize, linear_residual
from triton_kernels.norm import Ladder, norm_requantize
from triton_kernels.packed_ternary import pack_ternary, ternary_gemv
from triton_kernels.rotate import rotate
from triton_kernels.ssd import SsdScales
from triton_kernels.ternarize_rows import ternarize_rows

RESULTS = Path(__file__).parent / "results" / "gpu.json"
ROWS = 64 * 512
"""Tokens of the kernels' inputs: 64 sequences of 512."""


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        name: what. ours, peer: value of each. unit: ``ms``, ``us`` or ``tokens/s``.
        peer_name: whose value. ratio: how many times better ours is.
        detail: other numbers by name, such as gigabytes or shares of a ceiling.
    """

    name: str
    unit: str
    ours: float
    peer_name: str | None = None
    peer: float | None = None
    detail: dict[str, float] | None = None

    @property
    def ratio(self) -> float | None:
        if self.peer is None:
            return None
        return self.ours / self.peer if self.unit == "tokens/s" else self.peer / self.ours


def median_ms(run: Callable[[], Any]) -> float:
    """Median milliseconds of a launch."""
    return float(triton.testing.do_bench(run, warmup=20, rep=100, return_mode="median"))


def replayed_us(runs: Sequence[Callable[[], Any]]) -> float:
    """Microseconds of one of ``runs``, replayed one after the other as a CUDA graph."""
    for run in runs:
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for run in runs:
            run()
    return median_ms(graph.replay) / len(runs) * 1e3


def integers(low: int, high: int, *shape: int) -> Tensor:
    """Random narrow integers."""
    return torch.randint(low, high + 1, shape, device="cuda").bfloat16()


def differentiated(run: Callable[..., Any], *inputs: Tensor) -> tuple[float, float]:
    """Milliseconds forward, and forward and backward to all inputs."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]

    def forward() -> Any:
        result = run(*leaves)
        return result if isinstance(result, tuple) else (result,)

    gradients = [torch.randn_like(y) for y in forward()]
    with torch.no_grad():
        alone = median_ms(forward)
    return alone, median_ms(lambda: torch.autograd.grad(forward(), leaves, gradients, allow_unused=True))


def ceilings() -> Iterator[Row]:
    """What the card can do."""
    source = torch.empty(1 << 31, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    copy = 2 * source.numel() / median_ms(lambda: target.copy_(source)) / 1e6
    yield Row("copy, read and written", "GB/s", copy)
    a, b = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    yield Row("bf16 product 8192^3", "TFLOP/s", 2 * 8192**3 / median_ms(lambda: a @ b) / 1e9)


def kernel_rows(copy: float) -> Iterator[Row]:
    """The kernels of a block of 768, expand 2, d_state 64, on 32,768 tokens; ``copy`` in GB/s."""

    def row(name: str, moved: float, run: Callable[..., Any], *inputs: Tensor) -> Row:
        forward, both = differentiated(run, *inputs)
        share = moved / forward / 1e6 / copy
        return Row(name, "ms", forward, detail={"forward and backward": both, "share of copy": share})

    d, inner, state, heads = 768, 1536, 64, 24
    x, v = integers(-127, 127, ROWS, d), integers(-127, 127, ROWS, inner)
    w_in, w_out = integers(-1, 1, 2 * inner + 2 * state + heads, d), integers(-1, 1, d, inner)
    residual = torch.randint(-9999, 9999, (ROWS, d), device="cuda").float()
    ends = (0, inner, 2 * inner, 2 * inner + 2 * state, 2 * inner + 2 * state + heads)
    ranges = [Rounding(a, b, 6, -127, 127) for a, b in pairwise(ends)]
    for name, weight, run, inputs in (
        ("in_proj", w_in, lambda x, w: linear_requantize(x, w, None, ranges), (x, w_in)),
        (
            "out_proj",
            w_out,
            lambda v, w, r: linear_residual(v, w, None, r, 4, -32767, 32767),
            (v, w_out, residual),
        ),
    ):
        forward, both = differentiated(run, *inputs)
        peer = median_ms(lambda x=inputs[0], w=weight: x @ w.t())
        flops = 2 * ROWS * weight.numel() / forward / 1e9
        detail = {"forward and backward": both, "TFLOP/s": flops}
        yield Row(
            f"ternary linear {name}, requantized", "ms", forward, "cuBLAS bf16, not requantized", peer, detail
        )
    ladder = Ladder(
        6, 127, tuple(d * 4**i for i in range(8)), tuple(1 << i for i in range(8, -1, -1)), 9, -127, 127
    )
    yield row("BitShiftNorm and clamp", ROWS * d * 6, lambda x: norm_requantize(x, ladder), residual)
    batched = v.view(64, 512, inner)
    taps, bias = torch.randint(-40, 80, (inner, 4), device="cuda").float(), torch.zeros(inner, device="cuda")
    relu = Activation(7, 0, 127, True, False, 5)
    yield row(
        "conv, relu and requantize",
        ROWS * inner * 4,
        lambda x, t, b: conv_requantize(x, t, b, relu),
        batched,
        taps,
        bias,
    )
    plus = Activation(7, -127, 127, False, True, 5)
    yield row(
        "conv, squareplus and requantize",
        ROWS * inner * 4,
        lambda x, t, b: conv_requantize(x, t, b, plus),
        batched,
        taps,
        bias,
    )
    gate = HardSilu(64, 128, 6, 127, 7, 127)
    yield row("hard-SiLU gate", ROWS * inner * 6, lambda y, z: hard_silu_gate(y, z, gate), v, v)
    B = integers(-127, 127, 64, 512, state)
    table = [torch.randint(-1000, 1000, (32, state // 2), device="cuda").float() for _ in range(2)]
    yield row("rotation, table", ROWS * state * 4, lambda x, c, s: rotate(x, c, s, None, 10), B, *table)
    sign = torch.ones(32, state // 2, device="cuda")
    yield row(
        "rotation, three shears", ROWS * state * 4, lambda x, c, s: rotate(x, c, s, sign, 10), B, *table
    )
    latent = torch.randn(3224, d, device="cuda")
    yield row("ternarize", latent.numel() * 6, lambda w: ternarize_rows(w, 5), latent)
    scales = SsdScales(
        chunk_size=32, headdim=64, decay_bits=8, A_bits=12, G_shift=4, G_limit=4095, M_shift=16, A_u_bits=10,
        u_shift=17, beta_shift=9, H_align=5, rotation_frac=10, M_align=0, u_align=0, D_align=4,
    )  # fmt: skip
    n, D = integers(120, 250, 64, 512, heads), torch.full((heads,), 64.0, device="cuda")
    turn = [torch.full((state // 2,), value, device="cuda") for value in (900.0, 400.0)]
    for batch, length in ((64, 512), (4, 2048)):
        small = [t[:, :length].repeat(1, length // 512 or 1, 1)[:batch] for t in (batched, B, B, n)]
        x_s, B_s, C_s, n_s = (t.contiguous() for t in small)
        # x, y, B, C, B' and n once each.
        moved = batch * length * (4 * inner + 6 * state + 2 * heads)

        def scan(x: Tensor, B: Tensor, C: Tensor, n: Tensor, B_next: Tensor) -> Tensor:
            return ssd_requantize(x, B, C, n, D, scales, 8, -127, 127, B_next, *turn)

        yield row(f"integer scan, {batch} x {length}", moved, scan, x_s, B_s, C_s, n_s, B_s)


def gemv_rows() -> Iterator[Row]:
    """Packed ternary products, rotating among weight sets so that the cache does not serve them."""
    for N, K in ((2560, 2560), (13824, 2560)):
        x = torch.randint(-128, 128, (K,), device="cuda").to(torch.int8)
        wide = [integers(-1, 1, N, K) for _ in range(max(4, 400_000_000 // (2 * N * K)))]
        packed = [pack_ternary(w) for w in wide[:8]]
        while len(packed) * N * K / 4 < 200e6:
            packed += [type(p)(p.words.clone(), p.rows, p.columns) for p in packed[:8]]
        narrow = x.bfloat16()
        peer = replayed_us([partial(torch.mv, w, narrow) for w in wide])
        ours = replayed_us([partial(ternary_gemv, p, x) for p in packed])
        yield Row(f"ternary GEMV {N} x {K}", "us", ours, "cuBLAS bf16", peer)


def scan_rows() -> Iterator[Row]:
    """The float scans; forward and backward."""
    for r in float_scans.rows():
        detail = {"forward": r.forward_ms, "error": r.error}
        if r.peer_forward_ms is not None:
            detail["peer forward"] = r.peer_forward_ms
        yield Row(
            f"{r.name} {r.shape} {r.dtype}",
            "ms",
            r.forward_backward_ms,
            r.peer,
            r.peer_forward_backward_ms,
            detail,
        )


def training_speed(
    model: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    shape: tuple[int, int],
    vocabulary: int,
    graph: bool,
) -> tuple[float, dict[str, float]]:
    """Tokens a second of whole steps: forward, backward, clipping and AdamW, the loss read every step."""
    batch, length = shape
    tokens = torch.randint(0, vocabulary, (batch, length + 1), device="cuda")
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)

    def backward(inputs: Tensor, targets: Tensor, share: float) -> tuple[Tensor, Tensor]:
        value = share * loss(inputs, targets)
        value.backward()  # type: ignore[no-untyped-call]
        return value.detach(), targets.new_zeros(())

    captured = CapturedBackward(backward, parameters)

    def step() -> None:
        optimizer.zero_grad(set_to_none=not graph)
        value, _ = captured(inputs, targets, 1.0, ()) if graph else backward(inputs, targets, 1.0)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        value.item()
        optimizer.step()

    for _ in range(3):
        step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    steps, began = 0, time.perf_counter()
    while steps < 3 or time.perf_counter() - began < 3.0:
        step()
        steps += 1
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - began) / steps
    detail = {
        "seconds a step": seconds,
        "peak GB": torch.cuda.max_memory_allocated() / 1e9,
        "reserved GB": torch.cuda.max_memory_reserved() / 1e9,
    }
    return batch * length / seconds, detail


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy, in float32."""
    return functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def integer_model(n_layer: int, length: int, vocabulary: int) -> MambaInt:
    """A ternary model of width 768 whose scales are set, within 24 bits."""
    config = MambaIntConfig(
        task="language_model",
        vocab_size=vocabulary,
        seq_len=length,
        d_model=768,
        n_layer=n_layer,
        headdim=64,
        d_state=64,
        chunk_size=32,
        norm_input_bits=7,
        norm_shift=6,
    )
    model = MambaInt(config, 0).cuda().train()
    model.observe(torch.randint(0, vocabulary, (1, 512), device="cuda"))
    model.freeze_scales()
    return model


def mamba_ssm_model(peers: Path, vocabulary: int) -> nn.Module:
    """Mamba-2, 12 x 768, of ``mamba_ssm``; its convolution is PyTorch's, for want of the CUDA extension."""
    config = mamba_ssm_module(peers, "models.config_mamba").MambaConfig(
        d_model=768,
        n_layer=12,
        vocab_size=vocabulary,
        tie_embeddings=False,
        ssm_cfg={"layer": "Mamba2", "d_state": 64, "headdim": 64, "use_mem_eff_path": False},
    )
    model: nn.Module = mamba_ssm_module(peers, "models.mixer_seq_simple").MambaLMHeadModel(
        config, device="cuda"
    )
    return model


def minimamba_speed(peers: Path, shape: tuple[int, int], vocabulary: int) -> float:
    """Mamba-1, 6 x 512, of MiniMamba, in float32 as it comes: tokens a second."""
    config = minimamba_module(peers, "config").MambaLMConfig(
        d_model=512, n_layer=6, vocab_size=vocabulary, d_state=16
    )
    model: nn.Module = minimamba_module(peers, "models").MambaForCausalLM(config).cuda()
    speed, _ = training_speed(model, lambda x, y: cross_entropy(model(x), y), shape, vocabulary, graph=False)
    return speed


def autocast_loss(model: nn.Module, read: Callable[[Any], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """Loss of a float model in bf16 mixed precision."""

    def loss(inputs: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            logits = read(model(inputs))
        return cross_entropy(logits, targets)

    return loss


def training_rows(peers: Path | None) -> Iterator[Row]:
    """Whole training steps."""

    def ours(n_layer: int, batch: int, length: int, vocabulary: int) -> tuple[float, dict[str, float]]:
        model = integer_model(n_layer, length, vocabulary)
        shape = batch, length
        return training_speed(model, lambda x, y: cross_entropy(model(x), y), shape, vocabulary, graph=True)

    speed, detail = ours(24, 64, 512, 4096)
    yield Row("train integer 24 x 768, 64 x 512, vocabulary 4096", "tokens/s", speed, detail=detail)
    clean()
    speed, detail = ours(12, 4, 2048, 10000)
    name = "train integer 12 x 768, 4 x 2048, vocabulary 10000"
    if peers is None:
        yield Row(name, "tokens/s", speed, detail=detail)
        return
    clean()
    model = mamba_ssm_model(peers, 10000)
    loss = autocast_loss(model, lambda result: result.logits)
    mamba_ssm = {}
    for graph, mode in ((False, "eager"), (True, "as a CUDA graph")):
        clean()
        mamba_ssm[mode], _ = training_speed(model, loss, (4, 2048), 10000, graph)
        yield Row(name, "tokens/s", speed, f"mamba_ssm Mamba-2, {mode}", mamba_ssm[mode], detail)
    del model, loss
    clean()
    config = MambaConfig(mixer="mamba2", vocab_size=10000, d_model=768, n_layer=12, d_state=64, headdim=64)
    for graph, mode in ((False, "eager"), (True, "as a CUDA graph")):
        speed, detail = float_speed(config, (4, 2048), graph)
        name = f"train float Mamba-2 12 x 768, 4 x 2048, vocabulary 10000, {mode}"
        yield Row(name, "tokens/s", speed, f"mamba_ssm Mamba-2, {mode}", mamba_ssm[mode], detail)
    config = MambaConfig(mixer="mamba", vocab_size=10000, d_model=512, n_layer=6, d_state=16)
    theirs = minimamba_speed(peers, (8, 1024), 10000)
    for graph, mode in ((False, "eager"), (True, "as a CUDA graph")):
        speed, detail = float_speed(config, (8, 1024), graph)
        name = f"train float Mamba-1 6 x 512, 8 x 1024, vocabulary 10000, {mode}"
        yield Row(name, "tokens/s", speed, "MiniMamba", theirs, detail)


def float_speed(config: MambaConfig, shape: tuple[int, int], graph: bool) -> tuple[float, dict[str, float]]:
    """Our float model in bf16 mixed precision."""
    model = MambaForCausalLM(config).cuda()
    loss = autocast_loss(model, lambda result: result.logits)
    result = training_speed(model, loss, shape, config.vocab_size, graph)
    del model, loss
    clean()
    return result


def clean() -> None:
    """Give memory back before the next model."""
    gc.collect()
    torch.cuda.empty_cache()


def main() -> None:
    """Measure everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers", type=Path)
    peers: Path | None = parser.parse_args().peers
    if peers is not None:
        os.environ["MAMBA_SSM_SOURCE"] = os.environ["MINIMAMBA_SOURCE"] = str(peers)
    rows: list[Row] = []

    def add(new: Iterator[Row]) -> None:
        for row in new:
            rows.append(row)
            ratio = f"{row.ratio:6.2f} x {row.peer_name} ({row.peer:.4g})" if row.ratio else ""
            print(f"{row.name:58} {row.ours:10.4g} {row.unit:9} {ratio} {row.detail or ''}", flush=True)
            document = [asdict(r) | {"ratio": r.ratio} for r in rows]
            write_json(RESULTS, {"hardware": hardware(), "rows": document})

    add(ceilings())
    add(kernel_rows(rows[0].ours))
    add(gemv_rows())
    add(training_rows(peers))
    add(scan_rows())


if __name__ == "__main__":
    main()
