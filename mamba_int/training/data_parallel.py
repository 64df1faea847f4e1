"""Several processes train one model: started by ``torchrun``, each takes its share of every batch."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from mamba_int.device import resolve_device
from mamba_int.errors import MambaintError

BUCKET = 1 << 24
"""Elements of the gradients that are summed in one call."""


@dataclass(frozen=True)
class Ranks:
    """The processes of a training, as one of them sees them; by default it is the only one.

    All of them call the same methods in the same order.

    Attributes:
        rank: number of this process, from 0; process 0 alone writes files and speaks.
        count: number of processes.
    """

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this is process 0."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> None:
        """Replace a tensor by its sum over the processes: the same bits in each."""
        if self.count > 1:
            with _collective():
                torch.distributed.all_reduce(tensor)

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Replace the gradients by their sums over the processes, in flat buckets."""
        if self.count == 1:
            return
        bucket: list[Tensor] = []
        filled = 0
        for gradient in [p.grad for p in parameters if p.grad is not None]:
            if bucket and (filled + gradient.numel() > BUCKET or gradient.dtype != bucket[0].dtype):
                self._sum_bucket(bucket)
                bucket, filled = [], 0
            bucket.append(gradient)
            filled += gradient.numel()
        if bucket:
            self._sum_bucket(bucket)

    def _sum_bucket(self, gradients: Sequence[Tensor]) -> None:
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        self.sum(flat)
        parts = torch.split(flat, [gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))

    def share(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite tensors with those of process 0."""
        if self.count > 1:
            with _collective(), torch.no_grad():
                for tensor in tensors:
                    # Not every backend knows booleans.
                    sent = tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor
                    torch.distributed.broadcast(sent, 0)

    def require_equal(self, tensors: Iterable[Tensor]) -> None:
        """Check that all processes hold the same bits.

        Raises:
            MambaintError: if they do not: a machine computes something else than the others.
        """
        if self.count == 1:
            return
        mine = torch.stack([_checksum(tensor) for tensor in tensors])
        theirs = mine.clone()
        self.share([theirs])
        differing = (mine != theirs).any().to(torch.int64)
        self.sum(differing)
        if int(differing):
            raise MambaintError(
                "the processes of this training no longer hold the same weights",
                "use machines of one kind with the same versions, and run the command again to resume",
            )

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """Run the block in every process, wait for all, and fail in all if it fails in one.

        Raises:
            MambaintError: that of the first process that had one.
        """
        fault: MambaintError | None = None
        try:
            yield
        except MambaintError as error:
            if self.count == 1:
                raise
            fault = error
        if self.count == 1:
            return
        faults: list[MambaintError | None] = [None] * self.count
        with _collective():
            torch.distributed.all_gather_object(faults, fault)
        for found in faults:
            if found is not None:
                raise found from fault


ALONE = Ranks()


def _checksum(tensor: Tensor) -> Tensor:
    """int64 scalar that a change of any one element changes."""
    content = tensor.detach().contiguous().view(-1)
    return content.view(torch.uint8 if content.element_size() % 4 else torch.int32).sum(dtype=torch.int64)


@contextmanager
def _collective() -> Iterator[None]:
    """Say in one line that another process has gone."""
    try:
        yield
    except RuntimeError as error:
        raise MambaintError(
            f"another process of this training has stopped ({str(error).splitlines()[0][:200]})",
            "see its message, mend its cause, and run the command again to resume",
        ) from error


@contextmanager
def joined(device: str) -> Iterator[tuple[Ranks, torch.device]]:
    """Join the other processes if ``torchrun`` started this one.

    Args:
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``; under ``torchrun``, ``auto`` and ``cuda`` are the
            GPU of the process's local rank.

    Yields:
        The processes, and this one's device.

    Raises:
        MambaintError: if the device does not exist, or the others cannot be reached.
    """
    launched = torch.distributed.is_available() and torch.distributed.is_torchelastic_launched()
    count = int(os.environ["WORLD_SIZE"]) if launched else 1
    chosen = resolve_device(device)
    if count == 1:
        yield ALONE, chosen
        return
    if chosen.type == "cuda" and chosen.index is None:
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            raise MambaintError(
                f"there are {torch.cuda.device_count()} GPUs for {local + 1} processes",
                "lower --nproc-per-node, or use --device cpu",
            )
        chosen = torch.device("cuda", local)
        torch.cuda.set_device(chosen)
    backend = "nccl" if chosen.type == "cuda" else "gloo"
    with _collective():
        torch.distributed.init_process_group(backend)
    try:
        yield Ranks(torch.distributed.get_rank(), torch.distributed.get_world_size()), chosen
    finally:
        torch.distributed.destroy_process_group()
