"""Proofs of long sequences in linked segments: time and memory by length, and a model of nanoGPT's size.

``python -m benchmarks.chain`` proves 64, 256 and 1,024 tokens through a small character model, then 64 tokens
through one of a quarter of a million parameters in four layers, and verifies all. The weights are random:
what a token costs hardly depends on them. Ten minutes on two cores. Results go to
``benchmarks/results/chain.json`` with hardware and versions.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from benchmarks.hardware import hardware
from circuits.lowering import build_circuit
from circuits.segment import Segment
from mamba_int.config import MambaIntConfig
from mamba_int.experiment import read_preset
from mamba_int.files import write_json
from mamba_int.graph import Graph
from mamba_int.model import MambaInt
from mamba_int.native import build_nodes
from mamba_int.passes import optimize
from zk.chain_package import decode_chain_package
from zk.local_provers import LocalProvers
from zk.prove_chain import ProvableChain, prepare_chain, prove_chain
from zk.verify_chain import check_chain

RESULT = Path(__file__).parent / "results" / "chain.json"
SMALL = {"d_model": 32, "expand": 1.5, "n_layer": 1, "d_state": 4, "chunk_size": 8, "vocab_size": 52}
SMALL_STEPS = 32
LENGTHS = (64, 256, 1024)
NANO = {
    "d_model": 128,
    "expand": 1.125,
    "n_layer": 4,
    "d_state": 8,
    "chunk_size": 8,
    "d_conv": 3,
    "vocab_size": 56,
}
NANO_STEPS, NANO_LENGTH = 8, 64
PEER = {"keygen_seconds": 404, "prove_seconds": 237, "parameters": 250_000, "tokens": 64}
"""EZKL's published nanoGPT of that size, on its authors' machine."""


def model(changes: dict[str, Any], length: int) -> Graph:
    """The integer graph of an untrained character model whose scales were observed on random tokens."""
    forms = {
        key: value
        for key, value in read_preset("digits-large")["model"].items()
        if key not in ("pooling", "n_features", "n_classes")
    }
    config = MambaIntConfig(**(forms | changes | {"task": "language_model", "seq_len": length}))
    torch.manual_seed(0)
    untrained = MambaInt(config, 0)
    untrained.observe(torch.randint(0, config.vocab_size, (4, length)))
    untrained.freeze_scales()
    integers = untrained.eval().frozen_integers()
    built = build_nodes(config, untrained.scales(), lambda name, frac: integers[name].numpy())
    card = {"task": "language_model"}
    return optimize(Graph(tuple(built.nodes), built.output, length, card))


def parameters(graph: Graph) -> int:
    """Entries of its matrices."""
    return sum(
        int(node.constants[key].size)
        for node in graph.nodes
        for key in ("weight", "table", "taps")
        if key in node.constants and node.op in ("linear", "embedding", "conv")
    )


def run(chain: ProvableChain, length: int, workers: int) -> dict[str, Any]:
    """Prove and verify so many random tokens."""
    vocabulary = chain.graph.input.integer("high") + 1
    tokens = np.random.default_rng(length).integers(0, vocabulary, length)
    with TemporaryDirectory(prefix="mambaint-bench-") as folder:
        with LocalProvers(workers) as provers:
            proof = prove_chain(chain, [tokens], Path(folder), provers=provers)
        package = decode_chain_package(chain.package, "measured")
        digest = hashlib.sha256(chain.package).hexdigest()
        started = time.perf_counter()
        with proof.file.open("rb") as stream:
            verdict = check_chain(stream, package, digest)
        verify_seconds, size = time.perf_counter() - started, proof.file.stat().st_size
    assert verdict.valid
    return {
        "tokens": length,
        "segments": proof.segments,
        "wall_seconds": round(proof.wall_seconds, 2),
        "prove_seconds": round(proof.prove_seconds, 2),
        "prover_peak_bytes": proof.peak_bytes,
        "driver_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "verify_seconds": round(verify_seconds, 3),
        "file_bytes": size,
    }


def described(chain: ProvableChain) -> dict[str, Any]:
    """Size, keys, and what the links cost: rows beside those of the same segment without any."""
    lowered, keys = chain.stages[0].lowered, chain.stages[0].keys
    assert lowered.carried is not None
    state = sum(int(np.prod(shape)) for shape in lowered.carried.shapes.values())
    shown = build_circuit(
        chain.graph, logrows=lowered.circuit.logrows + 1, challenged=True, segment=Segment(chain.steps)
    )
    return {
        "parameters": parameters(chain.graph),
        "segment_steps": chain.steps,
        "rows": lowered.circuit.rows,
        "logrows": lowered.circuit.logrows,
        "state": state,
        "link_cells": state + 2 * (lowered.circuit.rows - shown.circuit.rows) + 2 * state,
        "cells": 2 * lowered.circuit.rows,
        "keygen_seconds": round(keys.keygen_seconds, 2),
        "keygen_peak_bytes": keys.peak_bytes,
    }


def main() -> None:
    """Measure, print and write the result file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--workers", type=int, default=1, help="segments proved at a time")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {"hardware": hardware(), "workers": arguments.workers, "peer": PEER}
    with TemporaryDirectory(prefix="mambaint-bench-") as cache:
        os.environ["MAMBAINT_CACHE"] = cache
        small = prepare_chain(model(SMALL, max(LENGTHS)), SMALL_STEPS)
        result["small"] = described(small)
        print(result["small"], flush=True)
        runs = [run(small, length, arguments.workers) for length in LENGTHS]
        times = np.array([entry["wall_seconds"] for entry in runs])
        fit = np.polyval(np.polyfit(LENGTHS, times, 1), LENGTHS)
        result["small"] |= {
            "runs": runs,
            "linear_r2": float(1 - np.square(times - fit).sum() / np.square(times - times.mean()).sum()),
        }
        print(json.dumps(result["small"], indent=1), flush=True)
        write_json(RESULT, result)
        nano = prepare_chain(model(NANO, NANO_LENGTH), NANO_STEPS)
        result["nano"] = described(nano)
        print(result["nano"], flush=True)
        result["nano"] |= {"run": run(nano, NANO_LENGTH, arguments.workers)}
        print(json.dumps(result["nano"], indent=1), flush=True)
    write_json(RESULT, result)
    print(f"written to {RESULT}; load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
