"""The log of a run for TensorBoard, beside ``metrics.jsonl``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mamba_int.errors import MambaintError

TENSORBOARD_FOLDER = "tensorboard"


class TensorBoardLog:
    """Writes every number of a row under its name.

    Args:
        folder: of the run; the log goes into ``tensorboard/`` in it.
        step: the last step that counts: what an earlier sitting logged after it is superseded.

    Raises:
        MambaintError: if TensorBoard is not installed, or the folder cannot be written.
    """

    def __init__(self, folder: Path, step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MambaintError(
                "--tensorboard needs TensorBoard", "pip install 'mambaint[tensorboard]'"
            ) from error
        path = folder / TENSORBOARD_FOLDER
        try:
            self._writer: Any = SummaryWriter(str(path), purge_step=step + 1)
        except OSError as error:
            raise MambaintError(
                f"cannot write {path}: {error.strerror or error}", "choose a writable folder"
            ) from error

    def add(self, row: dict[str, Any]) -> None:
        """Log one row of metrics under its step."""
        for name, value in row.items():
            if name != "step":
                self._writer.add_scalar(name, value, row["step"])

    def close(self) -> None:
        """Write what is still in memory."""
        self._writer.close()
