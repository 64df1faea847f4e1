"""The folder of a running job, which holds private values: removed when the job ends, however it ends."""

from __future__ import annotations

import fcntl
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PREFIX = "mambaint-job-"
LOCK = "lock"
YOUNG_SECONDS = 60.0
"""A folder that is no older may not have been locked yet."""


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A fresh folder among the system's temporary files.

    It is locked while the block runs. A process that is killed cannot remove its own: the next removes
    all that nobody holds any more.
    """
    _remove_abandoned(Path(tempfile.gettempdir()))
    with tempfile.TemporaryDirectory(prefix=PREFIX) as name, (Path(name) / LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield Path(name)


def _remove_abandoned(root: Path) -> None:
    for folder in root.glob(f"{PREFIX}*"):
        try:
            if time.time() - folder.stat().st_mtime < YOUNG_SECONDS:
                continue
            with (folder / LOCK).open("r+") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
        except OSError:
            # Held, gone meanwhile, or of another user.
            continue
