"""What numbers were measured on and with."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from typing import Any

from zk.calibration import machine


def hardware() -> dict[str, Any]:
    """Processor, cores, versions and commit, as JSON values."""
    packages = ("torch", "numpy", "ezkl", "onnx", "onnxruntime")
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    return {
        "cpu": machine()["cpu"],
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "commit": commit,
    }
