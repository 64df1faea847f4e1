"""The same chain proved by the local pool and by Ray on one machine, and what a segment costs whom.

``python -m benchmarks.ray_pool`` proves a chain of 32 segments by two local workers and by a local Ray
cluster with two, in turn, and verifies all. Then it measures what ``benchmarks.cluster`` needs: of this model
and of a larger one the seconds of proofs with one thread, of the driver, of verifying, and the bytes of the
keys. Five minutes on two cores. Results go to ``benchmarks/results/ray_pool.json``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from benchmarks.chain import SMALL, SMALL_STEPS, model
from benchmarks.hardware import hardware
from benchmarks.killed_chain import STEPS, TINY
from mamba_int.files import canonical_json, write_bytes, write_json
from mamba_int.graph import IntArray
from zk.chain_package import decode_chain_package
from zk.local_provers import LocalProvers
from zk.parcels import KeyParcels
from zk.prove_chain import ChainResult, ChainSecret, ProvableChain, jobs_of, prepare_chain, prove_chain
from zk.provers import Provers
from zk.ray_provers import LOCAL, RayProvers
from zk.verify_chain import check_chain

RESULT = Path(__file__).parent / "results" / "ray_pool.json"
SEGMENTS, WORKERS = 32, 2
LARGER_SEGMENTS = 8
BAR = 1.10


def tokens(chain: ProvableChain, segments: int) -> IntArray:
    """Random ones."""
    vocabulary = chain.graph.input.integer("high") + 1
    return np.random.default_rng(0).integers(0, vocabulary, chain.steps * segments)


def run(
    chain: ProvableChain, segments: int, provers: Provers, folder: Path
) -> tuple[ChainResult, dict[str, float | list[float]]]:
    """Prove in a folder; with the seconds that each part took."""
    begun = time.perf_counter()
    with provers:
        started = time.perf_counter()
        proof = prove_chain(chain, [tokens(chain, segments)], folder, provers=provers)
        proved = time.perf_counter()
    stopped = time.perf_counter()
    return proof, {
        "start_seconds": round(started - begun, 3),
        "wall_seconds": round(proof.wall_seconds, 3),
        "check_seconds": round(proved - started - proof.wall_seconds, 3),
        "stop_seconds": round(stopped - proved, 3),
        "job_seconds": [round(seconds, 3) for seconds in proof.job_seconds],
    }


def witness_seconds(chain: ProvableChain, segments: int) -> float:
    """Of one segment on the driver, median: its witness, compared with the interpreter, ready for the way."""
    found = []
    last = time.perf_counter()
    for job in jobs_of(chain, [tokens(chain, segments)], ChainSecret(bytes(32))):
        pickle.dumps(job.witness)
        found.append(time.perf_counter() - last)
        last = time.perf_counter()
    return float(np.median(found))


def collect_seconds(size: int, repeats: int = 50) -> float:
    """Of one answer on the driver: the file of a proof of so many bytes, written and renamed."""
    with TemporaryDirectory(prefix="mambaint-bench-") as folder:
        started = time.perf_counter()
        for i in range(repeats):
            write_bytes(Path(folder) / f"{i}.json", canonical_json({"proof": "00" * size}))
        return (time.perf_counter() - started) / repeats


def task_seconds(witness: bytes, repeats: int = 200) -> float:
    """Of one task on the driver: given to Ray, and its answer taken, many in flight."""
    import ray

    def nothing(content: bytes) -> dict[str, Any]:
        return {}

    with RayProvers(LOCAL, WORKERS):
        task = ray.remote(nothing)
        ray.get([task.remote(witness) for _ in range(repeats)])
        started = time.process_time()
        for future in [task.remote(witness).future() for _ in range(repeats)]:
            future.result()
        return (time.process_time() - started) / repeats


def worker_start_seconds() -> float:
    """Until a fresh process has imported what proves; Ray's own part comes on top."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import ray, zk.ray_node"], check=True)
    return time.perf_counter() - started


def costs(chain: ProvableChain, proof: ChainResult, measured: dict[str, Any]) -> dict[str, Any]:
    """What a segment of this chain costs whom; ``measured`` is of a run by Ray."""
    package = decode_chain_package(chain.package, "measured")
    digest = hashlib.sha256(chain.package).hexdigest()
    started = time.perf_counter()
    with proof.file.open("rb") as stream:
        assert check_chain(stream, package, digest).valid
    verify = (time.perf_counter() - started) / proof.segments
    parcels = KeyParcels.of(chain.stages[0].keys)
    sent = {d: path.read_bytes() for d, path in parcels.files().items()}
    with TemporaryDirectory(prefix="mambaint-bench-") as folder:
        kept = os.environ["MAMBAINT_CACHE"]
        os.environ["MAMBAINT_CACHE"] = folder
        started = time.perf_counter()
        for parcel in (parcels.keys, parcels.srs):
            elsewhere = type(parcel)(parcel.name, Path(folder) / "nowhere", parcel.sha256)
            elsewhere.unpack(sent.__getitem__)
        unpack = time.perf_counter() - started
        os.environ["MAMBAINT_CACHE"] = kept
    (job,) = jobs_of(chain, [tokens(chain, 1)], ChainSecret(bytes(32)))
    witness = pickle.dumps(job.witness)
    return {
        "logrows": chain.stages[0].lowered.circuit.logrows,
        "rows": chain.stages[0].lowered.circuit.rows,
        "job_seconds": measured["job_seconds"],
        "witness_seconds": witness_seconds(chain, LARGER_SEGMENTS),
        "task_seconds": task_seconds(witness),
        "collect_seconds": collect_seconds(chain.stages[0].keys.proof_bytes),
        "verify_seconds": verify,
        "worker_start_seconds": worker_start_seconds(),
        "witness_bytes": len(witness),
        "key_bytes": sum(map(len, sent.values())),
        "unpack_seconds": unpack,
        "prover_peak_bytes": proof.peak_bytes,
    }


def main() -> None:
    """Measure, print and write the result file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=2, help="runs of each, in turn")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with TemporaryDirectory(prefix="mambaint-bench-") as name:
        folder = Path(name)
        os.environ["MAMBAINT_CACHE"] = str(folder / "cache")
        chain = prepare_chain(model(TINY, 64), STEPS)
        runs: dict[str, list[dict[str, Any]]] = {"local": [], "ray": []}
        for turn in range(arguments.rounds):
            for who, provers in (("local", LocalProvers(WORKERS)), ("ray", RayProvers(LOCAL, WORKERS))):
                proof, measured = run(chain, SEGMENTS, provers, folder / f"{who}{turn}")
                runs[who].append(measured)
                print(
                    name, {key: value for key, value in measured.items() if key != "job_seconds"}, flush=True
                )
        wall = {who: float(np.median([r["wall_seconds"] for r in found])) for who, found in runs.items()}
        whole = {
            who: float(np.median([r["start_seconds"] + r["wall_seconds"] + r["stop_seconds"] for r in found]))
            for who, found in runs.items()
        }
        result: dict[str, Any] = {
            "hardware": hardware(),
            "load": os.getloadavg()[0],
            "segments": SEGMENTS,
            "workers": WORKERS,
            "runs": runs,
            "ratio": round(wall["ray"] / wall["local"], 3),
            "ratio_with_start_and_stop": round(whole["ray"] / whole["local"], 3),
            "bar": BAR,
            "costs": [costs(chain, proof, runs["ray"][-1])],
        }
        larger = prepare_chain(model(SMALL, SMALL_STEPS * LARGER_SEGMENTS), SMALL_STEPS)
        proof, measured = run(larger, LARGER_SEGMENTS, RayProvers(LOCAL, WORKERS), folder / "larger")
        result["costs"].append(costs(larger, proof, measured))
    print(json.dumps({key: value for key, value in result.items() if key != "runs"}, indent=1))
    write_json(RESULT, result)
    print(f"written to {RESULT}; ratio {result['ratio']} (bar {BAR}); load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
