"""A chain of 32 segments whose provers and driver are killed at random, twenty times, and resumed each time.

``python -m benchmarks.killed_chain`` runs ``mambaint prove --segment-steps`` on a tiny model, sends SIGKILL
to the command or to one of its proving processes after a random time, and starts the command again; in the
end the chain has to verify, and no finished segment may have been proved again. Two minutes on two cores.
Results go to ``benchmarks/results/killed_chain.json``.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from benchmarks.chain import model
from benchmarks.hardware import hardware
from mamba_int.files import write_json
from mamba_int.interpreter import evaluate
from zk.prove_chain import PROOF, SECRET

RESULT = Path(__file__).parent / "results" / "killed_chain.json"
TINY = {
    "d_model": 24,
    "expand": 1.0,
    "headdim": 12,
    "n_layer": 1,
    "d_state": 4,
    "chunk_size": 4,
    "vocab_size": 11,
}
STEPS, SEGMENTS, KILLS = 8, 32, 20


def command(*arguments: str) -> list[str]:
    """The command line of ``mambaint``."""
    return [sys.executable, "-m", "cli.main", *arguments, "--json"]


def children(parent: int) -> list[int]:
    """Proving processes of a driver."""
    found = subprocess.run(["pgrep", "-P", str(parent)], capture_output=True, text=True)
    return [int(line) for line in found.stdout.split()]


def finished(folder: Path) -> dict[str, int]:
    """Segments on disk, and when each was written."""
    return {
        path.name: path.stat().st_mtime_ns
        for path in folder.glob("*.json")
        if path.name not in (SECRET, PROOF)
    }


def main() -> None:
    """Kill, resume, check, and write the result file."""
    chance = random.Random(0)
    graph = model(TINY, 64)
    tokens = np.random.default_rng(0).integers(0, 11, STEPS * SEGMENTS)
    with TemporaryDirectory(prefix="mambaint-bench-") as name:
        folder = Path(name)
        os.environ["MAMBAINT_CACHE"] = str(folder / "cache")
        graph.save(folder / "model.mint")
        (folder / "x.json").write_text(json.dumps({"input_data": [tokens.tolist()]}))
        paths = (
            "--model",
            f"{folder}/model.mint",
            "--input",
            f"{folder}/x.json",
            "--out",
            f"{folder}/proof.json",
        )
        prove = command("prove", *paths, "--segment-steps", str(STEPS), "--workers", "1")
        # Keys first, so that the kills meet the proving.
        first = subprocess.Popen(prove, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        segments = folder / "proof.segments"
        while not (segments / "chain.json").exists() and first.poll() is None:
            time.sleep(0.1)
        kept: dict[str, int] = {}
        killed = {"driver": 0, "worker": 0}
        running, proved_twice = first, 0
        for turn in range(KILLS):
            time.sleep(chance.uniform(0.5, 4.0))
            workers = children(running.pid)
            target = chance.choice(["driver", "worker"]) if workers else "driver"
            if running.poll() == 2:
                # The same segment was killed three times.
                running = subprocess.Popen(prove, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            elif running.poll() is not None:
                done = len(finished(segments))
                raise SystemExit(f"ended before kill {turn + 1}, {done} segments: {running.communicate()}")
            os.kill(chance.choice(workers) if target == "worker" else running.pid, signal.SIGKILL)
            killed[target] += 1
            if target == "driver":
                running.communicate()
            now = finished(segments)
            proved_twice += sum(now.get(name) != written for name, written in kept.items())
            kept = now
            if target == "driver":
                running = subprocess.Popen(prove, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        out, error = running.communicate()
        assert running.returncode == 0, error.decode()
        result = json.loads(out)
        checked = subprocess.run(command("verify", f"{folder}/proof.json"), capture_output=True, text=True)
        verdict = json.loads(checked.stdout)
    equal = result["outputs"] == evaluate(graph, tokens[None])[0].ravel().tolist()
    summary = {
        "hardware": hardware(),
        "segments": result["segments"],
        "kills": killed,
        "finished_segments_proved_again": proved_twice,
        "proved_in_the_last_run": result["proved_now"],
        "valid": verdict["valid"],
        "logits_are_the_interpreters": equal,
    }
    print(json.dumps(summary, indent=2))
    assert verdict["valid"] and equal and not proved_twice
    write_json(RESULT, summary)


if __name__ == "__main__":
    main()
