"""Who proves the segments of a chain: processes on this machine, or the nodes of a cluster."""

from __future__ import annotations

from concurrent.futures import Future
from types import TracebackType
from typing import Any, Protocol, Self

from circuits.circuit import Circuit, Witness
from zk.keys import Keys


class Provers(Protocol):
    """Takes independent jobs, each the witness of one segment, and proves them in any order.

    A context: what runs when it is left is stopped, and leaves no process behind.
    """

    def room(self, needed: int) -> int:
        """How many jobs may be in flight now: those that are proved, and some that wait for their turn.

        Args:
            needed: bytes of memory that one proof takes.

        Raises:
            MambaintError: if there is nowhere that a proof could be made.
        """
        ...

    def submit(
        self, circuit: Circuit, witness: Witness, keys: Keys, timeout: float | None
    ) -> Future[dict[str, Any]]:
        """Begin a proof; arguments and answer as of :func:`zk.prove.prove_witness`.

        The future raises :class:`zk.process.JobKilled` where trying once more may help.
        """
        ...

    def abandon(self) -> None:
        """Stop all jobs: nobody waits for them any more."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
