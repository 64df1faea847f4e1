"""Our own float models, as ``save_pretrained`` writes them."""

from __future__ import annotations

from mamba_int.errors import MambaintError
from mamba_int.float_models.checkpoint import FORMAT, read_config
from quantize.importers.plan import ARCHITECTURES, Plan
from quantize.importers.source import SourceCheckpoint


class Mambaint:
    """Any model of ``mamba_int.float_models.models``."""

    name = "mambaint"
    title = "mambaint float model"

    def recognises(self, source: SourceCheckpoint) -> bool:
        return source.settings.values.get("format") == FORMAT

    def plan(self, source: SourceCheckpoint) -> Plan:
        architecture, config = read_config(source.path if source.path.is_dir() else source.path.parent)
        if architecture not in ARCHITECTURES:
            raise MambaintError(
                f"{source.settings.source} names the architecture {architecture!r}",
                f"known are {', '.join(ARCHITECTURES)}",
            )
        return Plan(architecture, config)
