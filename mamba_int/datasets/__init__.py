"""Data sets as integers: embedded ones, and files in CSV, NPZ, .ts (UEA/UCR) or plain text."""

from mamba_int.datasets.augmentation import jitter_values, shift_sequences
from mamba_int.datasets.load import DataSource, load_data, source_from_path
from mamba_int.datasets.records import ClassificationData, TextData, quantize_features

__all__ = [
    "ClassificationData",
    "DataSource",
    "TextData",
    "jitter_values",
    "load_data",
    "quantize_features",
    "shift_sequences",
    "source_from_path",
]
