"""Proving and verifying keys: made once per circuit and SRS, kept in the cache, checked when loaded."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from circuits.circuit import Circuit, PublicTensor, Witness
from mamba_int.errors import MambaintError
from mamba_int.files import canonical_json, read_bytes, read_json
from zk import store
from zk.ezkl_calls import installed_version
from zk.identity import KEYS_VERSION, circuit_id
from zk.jobs import committed_inputs, pack_circuit, pack_witness
from zk.package import Package
from zk.process import run_job
from zk.srs import Srs

_HASHED = ("circuit.onnx", "settings.json", "model.ezkl", "vk.key")


@dataclass(frozen=True)
class Keys:
    """A complete key folder that was checked when this object was made.

    Attributes:
        folder: holds ``circuit.onnx``, ``settings.json``, ``model.ezkl``, ``vk.key`` and ``pk.key``.
        circuit_id: see :func:`zk.identity.circuit_id`.
        model_id: of the circuit.
        ezkl_version: that made the keys.
        logrows: of the circuit.
        public: the circuit's outputs, in order.
        committed: names and sizes of the inputs a proof commits to, in order.
        srs: the SRS the keys belong to.
        proof_bytes: exact length of every proof of this circuit.
        keygen_seconds: time spent making the keys; 0.0 if they were in the cache.
        peak_bytes: largest memory of the process that made the keys and tried them, in bytes, whenever
            it was.
        sizes: size in bytes of each file in ``folder``.
    """

    folder: Path
    circuit_id: str
    model_id: str
    ezkl_version: str
    logrows: int
    public: tuple[PublicTensor, ...]
    committed: tuple[tuple[str, int], ...]
    srs: Srs
    proof_bytes: int
    keygen_seconds: float
    peak_bytes: int
    sizes: dict[str, int]

    def package(self, statement: dict[str, Any]) -> Package:
        """The verifier package of these keys.

        Args:
            statement: what a proof says, for people: task, classes, meaning of inputs; any JSON object.
        """
        return Package(
            model_id=self.model_id,
            circuit_id=self.circuit_id,
            mambaint_version=version("mambaint"),
            ezkl_version=self.ezkl_version,
            logrows=self.logrows,
            proof_bytes=self.proof_bytes,
            public=self.public,
            committed=self.committed,
            statement=statement,
            srs_kind=self.srs.kind,
            srs_sha256=self.srs.sha256,
            settings=read_bytes(self.folder / "settings.json"),
            vk=read_bytes(self.folder / "vk.key"),
            verifying_srs=self.srs.verifying(),
        )


def job_timeout(logrows: int) -> float:
    """Seconds after which setup or proving is given up: about 30 times what two slow cores need."""
    return max(300.0, 30 * 5.0 * 2.0 ** (logrows - 14))


def keys_folder(circuit: Circuit, srs: Srs, cache: Path | None = None) -> Path:
    """Where the keys of a circuit are or will be kept; its name is the circuit's id.

    Raises:
        MambaintError: if EZKL is not installed.
    """
    return store.cache_folder(cache) / "keys" / circuit_id(circuit, srs.sha256, installed_version())


def make_keys(
    circuit: Circuit, sample: Witness, srs: Srs, cache: Path | None = None, timeout: float | None = None
) -> Keys:
    """The keys of a circuit, from the cache or made now.

    Making them measures the lookup table's edges, runs the settings guard, and proves ``sample`` once:
    that finds a circuit that cannot be proved before anyone relies on it, and the proof's exact length.

    Args:
        circuit: to be proved later, with any witness.
        sample: any honest witness of it; nothing of it is kept.
        srs: for the same logrows.
        cache: see :func:`zk.store.cache_folder`.
        timeout: seconds before giving up; default :func:`job_timeout`.

    Raises:
        MambaintError: if the settings guard, EZKL or the sample refuses, memory or disk runs out, or the
            cached folder is damaged.
    """
    if srs.logrows != circuit.logrows:
        raise MambaintError(
            f"the SRS is for 2^{srs.logrows} rows and the circuit has 2^{circuit.logrows}",
            f"give the SRS file for 2^{circuit.logrows} rows",
        )
    folder = keys_folder(circuit, srs, cache)
    identity = folder.name
    seconds = 0.0
    with store.building(folder) as fresh:
        if fresh is not None:
            seconds = _generate(fresh, circuit, sample, srs, identity, timeout)
    manifest, sizes = _check_folder(folder, identity)
    return Keys(
        folder=folder,
        circuit_id=identity,
        model_id=circuit.model_id,
        ezkl_version=installed_version(),
        logrows=circuit.logrows,
        public=circuit.public,
        committed=committed_inputs(circuit),
        srs=srs,
        proof_bytes=manifest["proof_bytes"],
        keygen_seconds=seconds,
        peak_bytes=manifest["peak_bytes"],
        sizes=sizes,
    )


def _generate(
    folder: Path, circuit: Circuit, sample: Witness, srs: Srs, identity: str, timeout: float | None
) -> float:
    (folder / "circuit.onnx").write_bytes(circuit.onnx)
    job = {
        "folder": str(folder),
        "circuit": {**pack_circuit(circuit), "circuit_id": identity},
        "sample": pack_witness(circuit, sample),
        "srs": str(srs.path),
    }
    limit = job_timeout(circuit.logrows) if timeout is None else timeout
    answer = run_job("setup", job, what="key generation", timeout=limit)
    manifest = {
        "format": "mambaint-keys",
        "version": KEYS_VERSION,
        "circuit_id": identity,
        "proof_bytes": answer["proof_bytes"],
        "peak_bytes": answer["peak_bytes"],
        "sha256": {name: store.sha256_file(folder / name) for name in _HASHED},
        # The proving key may have gigabytes; if it is damaged, no proof it makes passes its own check.
        "pk_bytes": (folder / "pk.key").stat().st_size,
    }
    (folder / "manifest.json").write_bytes(canonical_json(manifest))
    seconds: float = answer["keygen_seconds"]
    return seconds


def _check_folder(folder: Path, identity: str) -> tuple[dict[str, Any], dict[str, int]]:
    remedy = f"delete the folder {folder}; the keys are then made again"
    manifest = read_json(folder / "manifest.json", remedy)
    keys = {"format", "version", "circuit_id", "proof_bytes", "peak_bytes", "sha256", "pk_bytes"}
    if not isinstance(manifest, dict) or set(manifest) != keys or manifest["circuit_id"] != identity:
        raise MambaintError(f"the keys in {folder} are damaged: wrong manifest", remedy)
    try:
        sizes = {name: (folder / name).stat().st_size for name in (*_HASHED, "pk.key")}
    except OSError as error:
        raise MambaintError(
            f"the keys in {folder} are damaged: {error.filename} is missing", remedy
        ) from error
    if sizes["pk.key"] != manifest["pk_bytes"]:
        raise MambaintError(f"the keys in {folder} are damaged: pk.key has the wrong size", remedy)
    hashes = manifest["sha256"]
    for name in _HASHED:
        if not isinstance(hashes, dict) or store.sha256_file(folder / name) != hashes.get(name):
            raise MambaintError(f"the keys in {folder} are damaged: {name} was changed", remedy)
    return manifest, sizes
