"""Peers read from their source directories, never installed."""

from __future__ import annotations

import importlib
import sys
import types
from pathlib import Path
from typing import Any


def mamba_ssm_module(sources: Path, name: str) -> Any:
    """Module ``mamba_ssm.name``, past the package's ``__init__`` and without its CUDA extension.

    Args:
        sources: the directory that holds ``mamba_ssm``.
        name: of the module inside the package.
    """
    package = types.ModuleType("mamba_ssm")
    package.__path__ = [str(sources / "mamba_ssm")]
    sys.modules.setdefault("mamba_ssm", package)
    sys.modules.setdefault("selective_scan_cuda", types.ModuleType("selective_scan_cuda"))
    return importlib.import_module(f"mamba_ssm.{name}")


def minimamba_module(sources: Path, name: str) -> Any:
    """Module ``minimamba.name``; ``sources`` is the directory that holds ``minimamba``."""
    if str(sources) not in sys.path:
        sys.path.insert(0, str(sources))
    return importlib.import_module(f"minimamba.{name}")
