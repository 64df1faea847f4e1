"""The honest run that every attack on a file starts from."""

from __future__ import annotations

from tests.zk.conftest import cache, honest, other

__all__ = ["cache", "honest", "other"]
