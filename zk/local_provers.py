"""Proving segments in child processes of this one."""

from __future__ import annotations

import os
import signal
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from subprocess import Popen
from types import TracebackType
from typing import Any, Self

from circuits.circuit import Circuit, Witness
from zk.estimate import available_memory
from zk.keys import Keys
from zk.prove import prove_witness


class LocalProvers:
    """:class:`zk.provers.Provers` on this machine.

    Args:
        workers: segments that are proved at a time, fewer if they would not fit the memory.
    """

    def __init__(self, workers: int = 1) -> None:
        self._workers = workers
        self._pool: ThreadPoolExecutor | None = None
        self._children: set[Popen[bytes]] = set()
        self._lock = threading.Lock()
        self._stopping = False

    def room(self, needed: int) -> int:
        """One more than are proved at a time; what the memory holds is decided once, before it is used."""
        if self._pool is None:
            free = available_memory()
            if free is not None:
                self._workers = max(1, min(self._workers, free // needed))
            self._pool = ThreadPoolExecutor(self._workers)
        return self._workers + 1

    def submit(
        self, circuit: Circuit, witness: Witness, keys: Keys, timeout: float | None
    ) -> Future[dict[str, Any]]:
        """As of the protocol."""
        self.room(keys.peak_bytes)
        assert self._pool is not None
        return self._pool.submit(self._prove, circuit, witness, keys, timeout)

    def _prove(self, circuit: Circuit, witness: Witness, keys: Keys, timeout: float | None) -> dict[str, Any]:
        started: list[Popen[bytes]] = []

        def keep(child: Popen[bytes]) -> None:
            started.append(child)
            with self._lock:
                self._children.add(child)
                if self._stopping:
                    _kill(child)

        try:
            return prove_witness(circuit, witness, keys, timeout, started=keep)
        finally:
            with self._lock:
                self._children.difference_update(started)

    def abandon(self) -> None:
        """As of the protocol: the children are killed, and waited for."""
        with self._lock:
            self._stopping = True
            for child in self._children:
                _kill(child)
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        self._pool, self._stopping = None, False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abandon()


def _kill(child: Popen[bytes]) -> None:
    # A child that was waited for has no group any more.
    if child.poll() is None:
        os.killpg(child.pid, signal.SIGKILL)
