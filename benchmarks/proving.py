"""The proving table of the README: our circuits beside the naive EZKL export of a float model of that shape.

``make bench-proving`` measures ours (two minutes) and takes the naive export's record from the result file;
with ``--naive SCRIPT`` it measures that too, which needs 20 GB of memory and half an hour. Results go to
``benchmarks/results/proving.json`` with hardware and versions.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.estimate import random_model
from benchmarks.hardware import hardware
from circuits.breakdown import breakdown, totals
from circuits.lowering import LoweredCircuit, build_circuit
from mamba_int.config import MambaIntConfig
from mamba_int.experiment import read_preset
from mamba_int.graph import Graph
from zk.calibration import measure

RESULT = Path(__file__).parent / "results" / "proving.json"
SEEDS = (0, 1, 2)
REPEATS = 3
LONG = "digits-large"
LONG_STEPS = 32
CHUNKS = (8, 32)
"""The longer shape (d_model 64, two layers) at the chunk sizes its bit budget allows; untrained."""


def forms(graph: Graph) -> dict[str, LoweredCircuit]:
    """Both forms of a model's circuit, each at the fewest rows that hold it."""
    return {
        name: build_circuit(graph, challenged=challenged)
        for name, challenged in (("packed", False), ("claimed", True))
    }


def size(lowered: LoweredCircuit, graph: Graph) -> dict[str, Any]:
    """Rows, and cells per token and layer."""
    layers = len({node.name.split(".")[0] for node in graph.nodes if node.name.startswith("layer")})
    circuit = lowered.circuit
    cells = 2 * circuit.rows / (graph.seq_len * layers)
    return {"rows": circuit.rows, "logrows": circuit.logrows, "cells_per_token_and_layer": round(cells)}


def naive(script: Path) -> dict[str, Any]:
    """The peer, in a process of its own; its last line is its result."""
    with TemporaryDirectory(prefix="mambaint-naive-") as folder:
        command = [sys.executable, str(script.resolve()), "--prove", "--dir", folder]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def main() -> None:
    """Measure, print and write the result file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("runs", type=Path, help="folder with digits-0, digits-1, ... of make bench-digits")
    parser.add_argument("--naive", type=Path, metavar="SCRIPT", help="also measure this script")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    old = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    result: dict[str, Any] = {"hardware": hardware(), "naive": old.get("naive"), "ours": []}
    with TemporaryDirectory(prefix="mambaint-bench-") as folder:
        for seed in SEEDS:
            graph = Graph.load(quantized(arguments.runs / f"digits-{seed}", Path(folder)))
            line: dict[str, Any] = {"seed": seed}
            for name, lowered in forms(graph).items():
                line[name] = size(lowered, graph)
                if seed == SEEDS[0]:
                    line[name]["measured"] = asdict(measure(graph, lowered, REPEATS, Path(folder)))
                    shares = [(share.operation, share.rows) for share in breakdown(graph, lowered)]
                    line[name]["rows_by_operation"] = totals(shares)
            result["ours"].append(line)
            print(seed, {name: line[name]["rows"] for name in line if name != "seed"}, flush=True)
    result["long"] = {}
    for chunk in CHUNKS:
        config = MambaIntConfig(**{**read_preset(LONG)["model"], "seq_len": LONG_STEPS, "chunk_size": chunk})
        graph = random_model(config)
        result["long"][str(chunk)] = {name: size(lowered, graph) for name, lowered in forms(graph).items()}
        print(chunk, result["long"][str(chunk)], flush=True)
    if arguments.naive is not None:
        result["naive"] = naive(arguments.naive)
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written to {RESULT}; load {os.getloadavg()[0]:.1f}")


def quantized(run: Path, folder: Path) -> Path:
    """The integer graph of a run."""
    out = folder / run.name
    command = [sys.executable, "-m", "cli.main", "quantize", str(run), "--out", str(out), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return Path(json.loads(done.stdout)["model"])


if __name__ == "__main__":
    main()
