"""Where the commands draw what moves."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def live_console(to_stderr: bool) -> Console | None:
    """What to draw progress on: the terminal, or None where there is none.

    Args:
        to_stderr: whether stdout is for the result alone, as with ``--json``.
    """
    if not (sys.stderr if to_stderr else sys.stdout).isatty():
        return None
    # Imported late: most commands end before they have anything to draw.
    from rich.console import Console

    return Console(stderr=to_stderr)
