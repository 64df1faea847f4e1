"""Tokens per second of decoding: batch 1, 16 and 128, CUDA graph replays beside eager steps.

``python -m benchmarks.decode [cpu|cuda]`` prints a table and writes ``results/decode-DEVICE.json`` beside it.
The weights are random: what a token costs does not depend on them.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.hardware import hardware
from mamba_int.config import MambaIntConfig
from mamba_int.decoder import Decoder
from mamba_int.files import write_json
from mamba_int.graph import Graph
from mamba_int.model import MambaInt
from mamba_int.native import build_nodes
from mamba_int.passes import optimize

RESULTS = Path(__file__).parent / "results"
BATCHES = (1, 16, 128)
SECONDS = 2.0
"""About as long is measured, after a warm-up of whole chunks."""
CHAR = MambaIntConfig(
    task="language_model",
    seq_len=128,
    d_model=64,
    n_layer=2,
    headdim=16,
    d_state=16,
    chunk_size=16,
)
"""The model of the ``char`` preset."""
LARGE = MambaIntConfig(
    task="language_model",
    vocab_size=4096,
    seq_len=512,
    d_model=768,
    n_layer=24,
    headdim=64,
    d_state=64,
    chunk_size=32,
    # 768 squares of 9 bits are beyond 24 bits, and so beyond float32.
    norm_input_bits=7,
    norm_shift=6,
)
"""The shape of the public integer Mamba's training benchmark, within 24 bits."""
CONFIGS = {"char": CHAR, "large": LARGE}


@dataclass(frozen=True)
class DecodeRow:
    """One measurement.

    Attributes:
        device: where. mode: ``eager`` or ``graph``. batch: sequences decoded together.
        steps: how many were measured. milliseconds: of one step, the greedy choice of the token included.
        tokens_per_second: of all sequences together.
        state_bytes: per sequence; independent of its length.
    """

    device: str
    mode: str
    batch: int
    steps: int
    milliseconds: float
    tokens_per_second: float
    state_bytes: int


def random_language_model(config: MambaIntConfig, seed: int = 0) -> Graph:
    """The graph of a model with random weights, scales as one batch of random tokens sets them."""
    random = torch.Generator().manual_seed(seed)
    model = MambaInt(config, seed)
    model.observe(torch.randint(config.vocab_size, (1, 2 * config.chunk_size), generator=random))
    model.freeze_scales()
    integers = model.frozen_integers()
    built = build_nodes(config, model.scales(), lambda name, frac: integers[name].numpy())
    return optimize(Graph(tuple(built.nodes), built.output, config.seq_len))


def measure_decode(
    graph: Graph, device: str, batches: Sequence[int] = BATCHES, seconds: float = SECONDS
) -> list[DecodeRow]:
    """Rows for every batch size: eager, and on CUDA the graph replay beside it.

    Args:
        graph: a language model.
        device: ``cpu`` or ``cuda``.
        batches: numbers of sequences.
        seconds: about how long to measure each.
    """
    modes = ("eager", "graph") if device.startswith("cuda") else ("eager",)
    return [_measure(graph, device, batch, mode, seconds) for batch in batches for mode in modes]


def _measure(graph: Graph, device: str, batch: int, mode: str, seconds: float) -> DecodeRow:
    decoder = Decoder(graph, batch, device, cuda_graph=mode == "graph")
    tokens = decoder.prefill([[i % 7 + 1, 2, 3] for i in range(batch)]).argmax(-1)

    def steps(count: int) -> float:
        nonlocal tokens
        _wait(device)
        start = time.perf_counter()
        for _ in range(count):
            tokens = decoder.step(tokens).argmax(-1)
        _wait(device)
        return time.perf_counter() - start

    # Whole chunks, so that their ends weigh what they weigh in a long text.
    chunk = max([node.integer("chunk_size") for node in graph.nodes if node.op == "ssd"], default=1)
    steps(chunk)
    once = steps(chunk)
    count = chunk * max(1, round(seconds / once))
    taken = steps(count)
    return DecodeRow(
        torch.cuda.get_device_name() if device.startswith("cuda") else "cpu",
        mode,
        batch,
        count,
        1000 * taken / count,
        batch * count / taken,
        decoder.state.nbytes // batch,
    )


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def main() -> None:
    """Measure both models on one device."""
    device = sys.argv[1] if len(sys.argv) > 1 else "cpu"
    torch.set_num_threads(1)
    measured = {}
    for name, config in CONFIGS.items():
        measured[name] = [asdict(row) for row in measure_decode(random_language_model(config), device)]
        for row in measured[name]:
            print(
                f"{name:<6} {row['mode']:<6} batch {row['batch']:<4} {row['milliseconds']:>9.3f} ms "
                f"{row['tokens_per_second']:>11,.0f} tokens/s",
                flush=True,
            )
        write_json(RESULTS / f"decode-{device}.json", {"hardware": hardware(), "models": measured})


if __name__ == "__main__":
    main()
