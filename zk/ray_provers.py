"""Proving segments on the nodes of a Ray cluster.

A job is one Ray task: it takes the witness, and proves it in a child process on its node. What many jobs
share (circuit, keys, SRS) is one object each in Ray's store, which a node fetches once, if it has not got the
files. Tasks ask Ray for the memory and the cores of one proof, so no node has more provers than it holds.
Ray repeats nothing by itself: a job whose worker or node is lost raises :class:`zk.process.JobKilled`, and is
then begun again like that of a prover on this machine.
"""

from __future__ import annotations

import logging
import os
import pickle
import socket
import time
from collections.abc import Callable
from concurrent.futures import Future
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any, Self

import numpy as np

from circuits.circuit import Circuit, Witness
from mamba_int.errors import MambaintError
from zk.ezkl_calls import installed_version
from zk.keys import Keys
from zk.parcels import KeyParcels
from zk.process import JobKilled
from zk.ray_node import Order

LOCAL = "local"
"""The address of a cluster of this machine alone, which is started for the run and stopped with it."""
LOCAL_STORE_BYTES = 200_000_000
"""Of a local cluster's object store: witnesses and answers, but no keys."""
QUEUED = 8
"""For so many segments that are proved one more waits on the cluster, so that no prover waits for us."""
REACH_SECONDS = 10.0
"""After which an address that does not answer is given up."""
NODES_SECONDS = 5.0
"""For which a count of the nodes holds."""


class RayProvers:
    """:class:`zk.provers.Provers` on a Ray cluster.

    Args:
        address: of the cluster, as ``ray.init`` takes it, or ``local``.
        workers: most segments in flight; default: what the cluster's cores and memory hold.
    """

    def __init__(self, address: str, workers: int | None = None) -> None:
        self._address, self._workers = address, workers
        self._logs: TemporaryDirectory[str] | None = None
        self._flying: set[Any] = set()
        self._orders: dict[str, tuple[Any, dict[str, Any]]] = {}
        self._cores = 0
        self._room, self._counted = 0, -NODES_SECONDS

    def __enter__(self) -> Self:
        """Connect.

        Raises:
            MambaintError: if Ray is not installed, or there is no such cluster.
        """
        # Before the import, which reads it: a cluster that is started here reports its use to nobody.
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        try:
            import ray
        except ImportError as error:
            raise MambaintError("Ray is not installed", "run: pip install 'mambaint[ray]'") from error
        quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
        try:
            if self._address == LOCAL:
                # Short, since sockets lie in it; what Ray writes there goes with the cluster.
                self._logs = TemporaryDirectory(prefix="mambaint-", dir="/tmp", ignore_cleanup_errors=True)
                ray.init(
                    address=LOCAL,
                    include_dashboard=False,
                    object_store_memory=LOCAL_STORE_BYTES,
                    _temp_dir=self._logs.name,
                    **quiet,
                )
            else:
                _reach(self._address)
                ray.init(address=self._address, **quiet)
        except (OSError, RuntimeError, ValueError) as error:
            self._forget_logs()
            raise MambaintError(
                f"cannot use the Ray cluster '{self._address}': {_line(error)}",
                "check the address; 'ray start' on this machine joins a cluster, --ray local starts one",
            ) from error
        self._task = ray.remote(_task())
        self._versions = {"mambaint": _mambaint_version(), "ezkl": installed_version()}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop what runs, and disconnect; a local cluster is stopped."""
        import ray

        self.abandon()
        ray.shutdown()
        self._forget_logs()

    def _forget_logs(self) -> None:
        if self._logs is not None:
            self._logs.cleanup()

    def room(self, needed: int) -> int:
        """As of the protocol; nodes that come and go are noticed within seconds."""
        if time.monotonic() - self._counted < NODES_SECONDS:
            return self._room
        import ray

        nodes = [
            (int(node["Resources"].get("CPU", 0)), int(node["Resources"].get("memory", 0)) // needed)
            for node in ray.nodes()
            if node["Alive"]
        ]
        fit = [(cores, held) for cores, held in nodes if cores and held]
        if not fit:
            raise MambaintError(
                f"no node of the Ray cluster has a core and the {needed / 1e6:,.0f} MB that a proof takes",
                "add nodes with more memory, or prove shorter segments",
            )
        if not self._cores:
            self._cores = _cores_each(fit, self._workers)
        slots = sum(min(cores // self._cores, held) for cores, held in fit)
        queued = slots + 1 + slots // QUEUED
        self._room = queued if self._workers is None else max(1, min(self._workers, queued))
        self._counted = time.monotonic()
        return self._room

    def submit(
        self, circuit: Circuit, witness: Witness, keys: Keys, timeout: float | None
    ) -> Future[dict[str, Any]]:
        """As of the protocol."""
        self.room(keys.peak_bytes)
        order, files = self._order(circuit, keys)
        task = self._task.options(num_cpus=self._cores, memory=keys.peak_bytes, max_retries=0)
        ref = task.remote(
            self._versions, keys.circuit_id, [order], files, pickle.dumps(witness), timeout, self._cores
        )
        self._flying.add(ref)
        future: Future[dict[str, Any]] = Future()
        future.set_running_or_notify_cancel()

        def ended(answer: Future[dict[str, Any]]) -> None:
            self._flying.discard(ref)
            _settle(future, answer)

        ref.future().add_done_callback(ended)
        return future

    def _order(self, circuit: Circuit, keys: Keys) -> tuple[Any, dict[str, Any]]:
        """What all jobs of a circuit share, in Ray's store from the first of them on."""
        if keys.circuit_id not in self._orders:
            import ray

            parcels = KeyParcels.of(keys)
            order = ray.put(pickle.dumps(Order(circuit, keys, parcels)))
            # A local cluster sees the files themselves.
            sent = {} if self._address == LOCAL else parcels.files()
            files = {digest: ray.put(np.fromfile(path, np.uint8)) for digest, path in sent.items()}
            self._orders[keys.circuit_id] = order, files
        return self._orders[keys.circuit_id]

    def abandon(self) -> None:
        """As of the protocol: a worker that is killed takes its prover with it."""
        import ray

        for ref in list(self._flying):
            ray.cancel(ref, force=True)
        deadline = time.monotonic() + NODES_SECONDS
        while self._flying and time.monotonic() < deadline:
            time.sleep(0.05)


def _cores_each(nodes: list[tuple[int, int]], workers: int | None) -> int:
    """Cores of a prover: all are used, and every node takes part, however little memory it has.

    Args:
        nodes: of each, its cores, and the proofs that its memory holds.
        workers: proofs that are made at a time, or None for as many as possible.
    """
    most = sum(min(cores, held) for cores, held in nodes)
    at_once = most if workers is None else min(most, workers)
    return max(1, min(sum(cores for cores, _ in nodes) // at_once, *(cores for cores, _ in nodes)))


def _task() -> Callable[..., dict[str, Any]]:
    """The function that nodes run.

    It is defined in here so that Ray sends its code instead of its name: a node without mambaint, or with
    another version, can then say so.
    """

    def prove_segment(
        versions: dict[str, str],
        circuit_id: str,
        order: list[Any],
        files: dict[str, Any],
        witness: bytes,
        timeout: float | None,
        threads: int,
    ) -> dict[str, Any]:
        from importlib.metadata import PackageNotFoundError, version
        from socket import gethostname

        import ray

        for package, wanted in versions.items():
            try:
                found = f"{package} {version(package)}"
            except PackageNotFoundError:
                found = f"no {package}"
            if found != f"{package} {wanted}":
                return {
                    "cause": f"node {gethostname()} has {found}, and this machine {package} {wanted}",
                    "remedy": f"install {package} {wanted} on all nodes",
                    "killed": False,
                }
        from zk.ray_node import prove_here

        return prove_here(
            circuit_id,
            lambda _: ray.get(order[0]),
            lambda digest: ray.get(files[digest]).data,
            witness,
            timeout,
            threads,
        )

    return prove_segment


def _settle(future: Future[dict[str, Any]], answer: Future[dict[str, Any]]) -> None:
    """Pass on what a task gave, or its fault in our words."""
    from ray import exceptions

    lost = (
        exceptions.WorkerCrashedError,
        exceptions.NodeDiedError,
        exceptions.LocalRayletDiedError,
        exceptions.OutOfMemoryError,
        exceptions.ObjectLostError,
    )
    error = answer.exception()
    if error is None:
        result = answer.result()
        if "cause" not in result:
            future.set_result(result)
            return
        fault = JobKilled if result["killed"] else MambaintError
        future.set_exception(fault(result["cause"], result["remedy"]))
    elif isinstance(error, lost):
        future.set_exception(
            JobKilled(
                f"a worker of the Ray cluster was lost while it proved: {_line(error)}",
                "give the command again, which goes on; if it persists, look for lack of memory",
            )
        )
    else:
        future.set_exception(
            MambaintError(
                f"a worker of the Ray cluster failed: {_line(error)}",
                "check that the cluster has the same Ray, Python and mambaint as this machine",
            )
        )


def _reach(address: str) -> None:
    """Raise OSError or ValueError where nobody listens: Ray itself would go on asking for minutes."""
    if address != "auto":
        host, _, port = address.removeprefix("ray://").rpartition(":")
        socket.create_connection((host, int(port)), timeout=REACH_SECONDS).close()


def _line(error: BaseException) -> str:
    """The last line of an error that may have many."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[-1][:300]


def _mambaint_version() -> str:
    from importlib.metadata import version

    return version("mambaint")
