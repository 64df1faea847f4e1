"""What all tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

# Green today is green tomorrow: the same examples in every run. Others are looked for with
# HYPOTHESIS_PROFILE=explore.
settings.register_profile("repeat", derandomize=True)
settings.register_profile("explore")
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeat"))


PROVING = {"attacks", "circuits", "cli", "zk"}
"""Folders whose tests prove: one after the other, since each proof takes all the cores and much memory."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """For runs on several cores."""
    for item in items:
        if item.path.relative_to(Path(__file__).parent).parts[0] in PROVING:
            item.add_marker(pytest.mark.xdist_group("proving"))


@pytest.fixture
def references(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors on the CPU go to the PyTorch references even if Triton's interpreter is on.

    For tests of what stands above the kernels: interpreted, a step of a float model takes seconds.
    """
    # Imported late: there is no Triton but on Linux.
    from triton import knobs

    monkeypatch.setattr(knobs.runtime, "interpret", False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
