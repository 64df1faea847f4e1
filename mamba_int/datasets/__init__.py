"""Data sets as integers: embedded, generated, and files in CSV, NPZ, .ts (UEA/UCR), plain text or tokens."""

from mamba_int.datasets.augmentation import jitter_values, shift_sequences
from mamba_int.datasets.load import TEXT_KINDS, DataSource, load_data, source_from_path
from mamba_int.datasets.records import ClassificationData, TextData, quantize_features
from mamba_int.datasets.token_file import TokenFileSummary, load_token_file, write_token_file
from mamba_int.datasets.tokenizer import BYTES, Tokenizer, find_tokenizer, save_tokenizer

__all__ = [
    "BYTES",
    "TEXT_KINDS",
    "ClassificationData",
    "DataSource",
    "TextData",
    "TokenFileSummary",
    "Tokenizer",
    "find_tokenizer",
    "jitter_values",
    "load_data",
    "load_token_file",
    "quantize_features",
    "save_tokenizer",
    "shift_sequences",
    "source_from_path",
    "write_token_file",
]
