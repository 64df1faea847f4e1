"""What an importer is: one source of checkpoints, recognised and mapped onto a float model."""

from __future__ import annotations

from typing import Protocol

from quantize.importers.plan import Plan
from quantize.importers.source import SourceCheckpoint


class Importer(Protocol):
    """Knows one source.

    Attributes:
        name: what ``--format`` takes.
        title: the source in words.
    """

    name: str
    title: str

    def recognises(self, source: SourceCheckpoint) -> bool:
        """Whether the settings and keys are those of this source; cheap, and never raises."""
        ...

    def plan(self, source: SourceCheckpoint) -> Plan:
        """The configuration, and where each parameter is.

        Raises:
            MambaintError: for settings that are missing or that no float model has.
        """
        ...
