"""Importers of float checkpoints, one file for each source.

>>> model, description = load_float_model(Path("mamba-130m-hf"))  # doctest: +SKIP

A new source is a class with the methods of ``importer.Importer`` and a line in ``registry.IMPORTERS``.
"""

from quantize.importers.plan import FloatModel
from quantize.importers.registry import IMPORTERS, FloatModelDescription, load_float_model

__all__ = ["IMPORTERS", "FloatModel", "FloatModelDescription", "load_float_model"]
