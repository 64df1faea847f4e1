"""What numbers were measured on and with."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from typing import Any

import torch

from zk.processor import processor_name

PACKAGES = ("torch", "triton", "numpy", "ezkl", "onnx", "onnxruntime")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def hardware() -> dict[str, Any]:
    """Processor, cores, GPU, versions and commit, as JSON values.

    Where the sources are no repository, the variable ``COMMIT`` says what they are.
    """
    commit = (
        os.environ.get("COMMIT")
        or subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
    )
    gpu = {}
    if torch.cuda.is_available():
        gpu = {
            "gpu": torch.cuda.get_device_name(),
            "gpus": torch.cuda.device_count(),
            "cuda": torch.version.cuda,
        }
    return {
        "cpu": processor_name(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **gpu,
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
        "commit": commit,
    }
