"""What many machines would do with a chain: a simulation of 8 to 1,024 provers from measured times.

``python -m benchmarks.cluster`` reads what ``benchmarks.ray_pool`` has measured on one machine and simulates
the driver and the provers event by event; ``docs/distributed.md`` states the method and shows the table. A
minute on one core. Results go to ``benchmarks/results/cluster.json``.
"""

from __future__ import annotations

import heapq
import json
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from benchmarks import ray_pool
from mamba_int.files import write_json
from zk.ray_provers import QUEUED

RESULT = ray_pool.RESULT.with_name("cluster.json")
PROVERS = (1, 8, 16, 32, 64, 128, 256, 512, 1024)
FIXED_SEGMENTS, SEGMENTS_EACH = 1024, 64
REPEATS = 10


@dataclass(frozen=True)
class Cluster:
    """What is assumed, since one machine cannot measure it.

    Attributes:
        node_provers: provers of a node. bits_per_second: of the driver's network, which all keys leave by.
        slow_share, slow_factor: so many segments take so many times as long.
        lost_share: so many segments are lost half-way, with their prover, and begun again.
    """

    node_provers: int = 8
    bits_per_second: float = 10e9
    slow_share: float = 0.01
    slow_factor: float = 3.0
    lost_share: float = 0.001


@dataclass(frozen=True)
class Costs:
    """Seconds and bytes, as measured; see ``benchmarks.ray_pool``.

    Attributes:
        job_seconds: of proofs, from which those of the simulation are drawn.
        driver_seconds: of the driver before a segment can be proved. collect_seconds: after it was.
        start_seconds: of a prover's process. key_bytes: sent to a node. unpack_seconds: until they lie there.
        witness_bytes: sent with a segment.
    """

    job_seconds: tuple[float, ...]
    driver_seconds: float
    collect_seconds: float
    start_seconds: float
    key_bytes: int
    unpack_seconds: float
    witness_bytes: int

    @classmethod
    def of(cls, measured: dict[str, Any]) -> Costs:
        """Of an entry of ``costs`` in the result of ``benchmarks.ray_pool``."""
        return cls(
            job_seconds=tuple(measured["job_seconds"]),
            driver_seconds=measured["witness_seconds"] + measured["task_seconds"],
            collect_seconds=measured["collect_seconds"],
            start_seconds=measured["worker_start_seconds"],
            key_bytes=measured["key_bytes"],
            unpack_seconds=measured["unpack_seconds"],
            witness_bytes=measured["witness_bytes"],
        )


def simulate(
    costs: Costs, cluster: Cluster, provers: int, segments: int, random: np.random.Generator
) -> float:
    """Seconds until all segments are proved, by the events of one run.

    The driver is one thread, as in ``zk.prove_chain``: it makes a witness, waits while as many segments are
    in flight as ``RayProvers.room`` allows, takes finished ones, and gives the segment to the cluster, where
    the prover that is free first begins it.
    """
    sending = 8 / cluster.bits_per_second
    free = []
    for prover in range(provers):
        node = prover // cluster.node_provers
        # Keys leave the driver one node after the other; a node's provers share them.
        keys = (node + 1) * costs.key_bytes * sending + costs.unpack_seconds
        free.append(costs.start_seconds + keys)
    heapq.heapify(free)
    room = provers + 1 + provers // QUEUED
    seconds = random.choice(costs.job_seconds, segments)
    seconds[random.random(segments) < cluster.slow_share] *= cluster.slow_factor
    seconds[random.random(segments) < cluster.lost_share] *= 1.5
    flying: list[float] = []
    now = 0.0
    for needed in seconds.tolist():
        now += costs.driver_seconds
        while len(flying) >= room:
            now = max(now, heapq.heappop(flying)) + costs.collect_seconds
        begun = max(heapq.heappop(free), now + costs.witness_bytes * sending)
        heapq.heappush(free, begun + needed)
        heapq.heappush(flying, begun + needed)
    while flying:
        now = max(now, heapq.heappop(flying)) + costs.collect_seconds
    return now


def table(costs: Costs, cluster: Cluster, fixed: int | None) -> list[dict[str, float]]:
    """A row for each number of provers: of a chain of so many segments, or of ``SEGMENTS_EACH`` a prover.

    Speedup is over one prover with the same segments: its mean time for all of them, simulated likewise.
    """
    rows = []
    for provers in PROVERS:
        segments = fixed or provers * SEGMENTS_EACH
        runs = [
            simulate(costs, cluster, provers, segments, np.random.default_rng((provers, i)))
            for i in range(REPEATS)
        ]
        alone = np.mean(
            [
                simulate(costs, cluster, 1, segments, np.random.default_rng((provers, i)))
                for i in range(REPEATS)
            ]
        )
        seconds = float(np.mean(runs))
        rows.append(
            {
                "provers": provers,
                "segments": segments,
                "seconds": round(seconds, 1),
                "spread": round(float(np.std(runs)), 1),
                "speedup": round(alone / seconds, 1),
                "efficiency": round(alone / seconds / provers, 3),
                "driver_busy": round(segments * (costs.driver_seconds + costs.collect_seconds) / seconds, 3),
            }
        )
    return rows


def markdown(tables: dict[str, list[dict[str, float]]]) -> str:
    """The rows of both tables side by side, as in the document."""
    each, fixed = tables["each"], tables["fixed"]
    lines = [
        f"| provers | {SEGMENTS_EACH} segments each: seconds | speedup | efficiency | driver busy | "
        f"{FIXED_SEGMENTS:,} segments: seconds | speedup | efficiency | driver busy |",
        "|" + "---|" * 9,
    ]
    for a, b in zip(each, fixed, strict=True):
        cells = [f"{a['provers']:,}"]
        for row in (a, b):
            cells += [
                f"{row['seconds']:,.0f}",
                f"{row['speedup']:,.1f}",
                f"{100 * row['efficiency']:.0f} %",
                f"{100 * row['driver_busy']:.0f} %",
            ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Simulate, print the tables and write the result file."""
    measured = json.loads(ray_pool.RESULT.read_text())
    cluster = Cluster()
    result: dict[str, Any] = {"measured_on": measured["hardware"], "assumed": asdict(cluster), "circuits": []}
    for entry in measured["costs"]:
        costs = Costs.of(entry)
        tables = {"each": table(costs, cluster, None), "fixed": table(costs, cluster, FIXED_SEGMENTS)}
        mean = float(np.mean(costs.job_seconds))
        serial = costs.driver_seconds + costs.collect_seconds
        print(
            f"\n{entry['rows']:,} rows of 2^{entry['logrows']}: proof {mean:.2f} s "
            f"(deviation {np.std(costs.job_seconds):.2f}), driver {serial * 1e3:.1f} ms a segment: "
            f"full at {mean / serial:,.0f} provers\n"
        )
        print(markdown(tables))
        result["circuits"].append(
            {
                "logrows": entry["logrows"],
                "rows": entry["rows"],
                "mean_job_seconds": round(mean, 3),
                "driver_seconds": round(serial, 5),
                "driver_is_full_at": round(mean / serial),
                **tables,
            }
        )
    write_json(RESULT, result)


if __name__ == "__main__":
    main()
