"""What all tests share."""

from __future__ import annotations

import os

from hypothesis import settings

# Green today is green tomorrow: the same examples in every run. Others are looked for with
# HYPOTHESIS_PROFILE=explore.
settings.register_profile("repeat", derandomize=True)
settings.register_profile("explore")
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeat"))
