"""What all tests share."""

from __future__ import annotations

import os

import pytest
from hypothesis import settings

# Green today is green tomorrow: the same examples in every run. Others are looked for with
# HYPOTHESIS_PROFILE=explore.
settings.register_profile("repeat", derandomize=True)
settings.register_profile("explore")
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeat"))


@pytest.fixture
def references(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors on the CPU go to the PyTorch references even if Triton's interpreter is on.

    For tests of what stands above the kernels: interpreted, a step of a float model takes seconds.
    """
    # Imported late: there is no Triton but on Linux.
    from triton import knobs

    monkeypatch.setattr(knobs.runtime, "interpret", False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
