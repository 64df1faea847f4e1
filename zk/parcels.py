"""Keys and SRS on their way to another machine: files known by their hashes, sent once to each.

A machine that has them already (it shares a disk, or is the one that made them) is sent nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from mamba_int.errors import MambaintError
from zk import store
from zk.keys import Keys

Fetch = Callable[[str], "bytes | memoryview"]
"""From the SHA-256 of a file to its content."""


@dataclass(frozen=True)
class Parcel:
    """The files of a folder.

    Attributes:
        name: of the folder in a cache (:func:`zk.store.cache_folder`).
        origin: where they are on the machine that sends them.
        sha256: hash of every file by its name.
    """

    name: str
    origin: Path
    sha256: dict[str, str]

    def unpack(self, fetch: Fetch) -> Path:
        """The folder with these files on this machine: found, or made now, whole or not at all.

        Raises:
            MambaintError: if the cache has another folder of that name, cannot be written, or what was
                fetched is not what was sent.
        """
        if self._lies_in(self.origin):
            return self.origin
        folder = store.cache_folder() / self.name
        with store.building(folder) as fresh:
            if fresh is not None:
                for file, digest in self.sha256.items():
                    with (fresh / file).open("wb") as stream:
                        stream.write(fetch(digest))
                if not self._lies_in(fresh):
                    raise MambaintError(
                        f"{folder} arrived damaged", "try again; check the memory and disk of this machine"
                    )
        if not self._lies_in(folder):
            raise MambaintError(f"{folder} is damaged, or of another machine", f"delete the folder {folder}")
        return folder

    def _lies_in(self, folder: Path) -> bool:
        return all(
            (folder / file).is_file() and store.sha256_file(folder / file) == digest
            for file, digest in self.sha256.items()
        )


@dataclass(frozen=True)
class KeyParcels:
    """A key folder and the SRS its proofs are made with.

    Attributes:
        keys: the folder, named by the circuit's id. srs: the folder of the file ``srs_file``.
    """

    keys: Parcel
    srs: Parcel
    srs_file: str

    @classmethod
    def of(cls, keys: Keys) -> KeyParcels:
        """Those of keys on this machine. Takes the time to hash them: about a second for each gigabyte."""
        files = [*keys.sizes, "manifest.json"]
        folder = Parcel(
            f"keys/{keys.circuit_id}", keys.folder, {f: store.sha256_file(keys.folder / f) for f in files}
        )
        path = keys.srs.path
        srs = Parcel(f"srs/{keys.srs.sha256}", path.parent, {path.name: keys.srs.sha256})
        return cls(folder, srs, path.name)

    def files(self) -> dict[str, Path]:
        """Where the files are on the machine that sends them, by hash."""
        return {
            digest: parcel.origin / file
            for parcel in (self.keys, self.srs)
            for file, digest in parcel.sha256.items()
        }

    def unpack(self, keys: Keys, fetch: Fetch) -> Keys:
        """The same keys where they are on this machine; errors as of :meth:`Parcel.unpack`."""
        srs = replace(keys.srs, path=self.srs.unpack(fetch) / self.srs_file)
        return replace(keys, folder=self.keys.unpack(fetch), srs=srs)
