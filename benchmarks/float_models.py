"""Training steps of the float language models on a GPU, eager and as CUDA graphs.

Forward, backward and fused AdamW in bfloat16 autocast. Run ``python -m benchmarks.float_models``; it prints
one JSON list.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from mamba_int.float_models.config import MambaConfig
from mamba_int.float_models.models import MambaForCausalLM

WORKLOADS = {
    "mamba, 6 x 512, d_state 16": (MambaConfig(vocab_size=10000, d_model=512, n_layer=6), 8, 1024),
    "mamba2, 6 x 512, d_state 16": (
        MambaConfig(mixer="mamba2", vocab_size=10000, d_model=512, n_layer=6),
        8,
        1024,
    ),
    "mamba2, 12 x 768, d_state 64": (
        MambaConfig(mixer="mamba2", vocab_size=10000, d_model=768, n_layer=12, d_state=64, headdim=64),
        4,
        2048,
    ),
}
"""Configuration, batch and length."""
WARM_UP = 5
REPEATS = 20


@dataclass(frozen=True)
class Row:
    """One workload; ``memory_gb`` is the peak of the eager steps, in 10^9 bytes."""

    name: str
    parameters: int
    tokens: int
    eager_ms: float
    graph_ms: float
    eager_tokens_per_second: float
    graph_tokens_per_second: float
    memory_gb: float
    loss: float


def milliseconds(step: Callable[[], object]) -> float:
    """Median over steps, each waited for."""
    times = []
    for i in range(WARM_UP + REPEATS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        if i >= WARM_UP:
            times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def measure(name: str, config: MambaConfig, batch: int, length: int) -> Row:
    """One row; the graph holds the whole step, optimizer included."""
    torch.manual_seed(0)
    model = MambaForCausalLM(config).cuda()
    ids = torch.randint(config.vocab_size, (batch, length), device="cuda")
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True, capturable=True)

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16):
            loss: Tensor = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        return loss.detach()

    torch.cuda.reset_peak_memory_stats()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        eager = milliseconds(step)
    torch.cuda.current_stream().wait_stream(stream)
    memory = torch.cuda.max_memory_allocated() / 1e9
    optimizer.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    replayed = milliseconds(graph.replay)
    tokens = batch * length
    return Row(
        name,
        sum(p.numel() for p in model.parameters()),
        tokens,
        eager,
        replayed,
        tokens / eager * 1e3,
        tokens / replayed * 1e3,
        memory,
        float(loss),
    )


if __name__ == "__main__":
    print(json.dumps([asdict(measure(name, *workload)) for name, workload in WORKLOADS.items()], indent=2))
