"""One door to every data set: a small description that can be stored and loaded again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from mamba_int.config import dataclass_from_dict
from mamba_int.datasets.csv_file import load_csv
from mamba_int.datasets.embedded import load_digits, load_moby_dick
from mamba_int.datasets.gestures import load_gestures
from mamba_int.datasets.npz_file import load_npz
from mamba_int.datasets.records import ClassificationData, TextData
from mamba_int.datasets.rotations import load_rotations
from mamba_int.datasets.text_file import load_text
from mamba_int.datasets.token_file import load_token_file
from mamba_int.datasets.ts_file import load_ts
from mamba_int.errors import MambaintError

Kind = Literal["digits", "moby-dick", "rotations", "gestures", "csv", "npz", "ts", "text", "tokens"]
_EMBEDDED = ("digits", "moby-dick", "rotations", "gestures")
TEXT_KINDS = ("moby-dick", "text", "tokens")
"""Kinds that load as :class:`TextData`."""
_KIND_OF_SUFFIX: dict[str, Kind] = {".csv": "csv", ".npz": "npz", ".ts": "ts", ".tokens": "tokens"}


@dataclass(frozen=True)
class DataSource:
    """Where a data set comes from; enough to load the same splits again.

    Attributes:
        kind: an embedded or generated data set, or the format of ``path``.
        path: the file; empty for an embedded or generated data set.
        label_column: CSV: header name or index of the label; empty for the last column.
        seq_len: CSV: steps to fold the columns into; .ts: steps to pad or truncate to; 0: as found;
            rotations and gestures: steps to generate, 0 for 12 and 16.
        n_features: CSV: channels to fold the columns into; 0: as found.
        split_seed: seed of the splits the file lacks, or of what is generated.
    """

    kind: Kind = "digits"
    path: str = ""
    label_column: str = ""
    seq_len: int = 0
    n_features: int = 0
    split_seed: int = 0

    def __post_init__(self) -> None:
        if (self.kind in _EMBEDDED) == bool(self.path):
            raise MambaintError(
                f"[data] kind = {self.kind} with path = '{self.path}'",
                "give a path for a file, and none for embedded data",
            )
        allowed = {
            "csv": ("label_column", "seq_len", "n_features"),
            "ts": ("seq_len",),
            "rotations": ("seq_len",),
            "gestures": ("seq_len",),
        }.get(self.kind, ())
        for key in ("label_column", "seq_len", "n_features"):
            if getattr(self, key) and key not in allowed:
                raise MambaintError(f"[data] {key} means nothing for kind = {self.kind}", f"remove {key}")
        for key in ("seq_len", "n_features", "split_seed"):
            if getattr(self, key) < 0:
                raise MambaintError(f"[data] {key} = {getattr(self, key)}", "give 0 or more")

    @property
    def is_text(self) -> bool:
        """Whether this loads a :class:`TextData`."""
        return self.kind in TEXT_KINDS

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON-able values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Inverse of :meth:`to_dict`; raises MambaintError on unknown keys or wrong values."""
        return dataclass_from_dict(cls, values, "[data]")


def kind_of_path(path: str | Path) -> Kind:
    """The format a file name announces: .csv, .npz, .ts, .tokens; anything else is text."""
    return _KIND_OF_SUFFIX.get(Path(path).suffix.lower(), "text")


def source_from_path(path: str | Path) -> DataSource:
    """Describe a file by its name's suffix, with an absolute path so that it can be found again."""
    return DataSource(kind=kind_of_path(path), path=str(Path(path).resolve()))


def load_data(source: DataSource) -> ClassificationData | TextData:
    """Load a data set.

    Raises:
        MambaintError: if the file is missing or its content unusable; the message says where and why.
    """
    path = Path(source.path)
    loaders: dict[Kind, Callable[[], ClassificationData | TextData]] = {
        "digits": load_digits,
        "moby-dick": load_moby_dick,
        "rotations": lambda: load_rotations(source.seq_len, source.split_seed),
        "gestures": lambda: load_gestures(source.seq_len, source.split_seed),
        "csv": lambda: load_csv(
            path, source.label_column, source.seq_len, source.n_features, source.split_seed
        ),
        "npz": lambda: load_npz(path, source.split_seed),
        "ts": lambda: load_ts(path, source.seq_len, source.split_seed),
        "text": lambda: load_text(path),
        "tokens": lambda: load_token_file(path),
    }
    return loaders[source.kind]()
