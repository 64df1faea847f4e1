"""The cache: what is half-made, damaged, missing or made twice must never be used."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from circuits.circuit import Witness
from mamba_int.errors import MambaintError
from tests.zk.conftest import LOGROWS, Honest, tiny_circuit, tiny_witness
from zk import keys as keys_module
from zk import store
from zk.identity import circuit_id
from zk.keys import Keys, make_keys
from zk.prove import prove
from zk.srs import Srs, ceremony_srs, development_srs
from zk.srs_format import VERIFYING_BYTES, srs_bytes


@pytest.fixture
def damaged(honest: Honest, tmp_path: Path) -> Path:
    """A copy of the cache that a test may damage; returns the key folder."""
    shutil.copytree(honest.keys.folder.parent.parent, tmp_path / "cache")
    return tmp_path / "cache" / "keys" / honest.keys.circuit_id


def keys_again(honest: Honest, folder: Path) -> Keys:
    return make_keys(honest.circuit, honest.witness, honest.srs, folder.parent.parent)


def test_undamaged_copy_is_used(honest: Honest, damaged: Path) -> None:
    assert keys_again(honest, damaged).keygen_seconds == 0.0


@pytest.mark.parametrize("name", ["circuit.onnx", "settings.json", "model.ezkl", "vk.key"])
def test_bit_flip_in_a_cached_file(honest: Honest, damaged: Path, name: str) -> None:
    content = bytearray((damaged / name).read_bytes())
    content[len(content) // 2] ^= 1
    (damaged / name).write_bytes(content)
    with pytest.raises(MambaintError, match=f"{name} was changed; delete the folder"):
        keys_again(honest, damaged)


def test_truncated_proving_key(honest: Honest, damaged: Path) -> None:
    with (damaged / "pk.key").open("r+b") as stream:
        stream.truncate(1000)
    with pytest.raises(MambaintError, match=r"pk\.key has the wrong size"):
        keys_again(honest, damaged)


@pytest.mark.parametrize("name", ["vk.key", "pk.key", "manifest.json"])
def test_missing_cached_file(honest: Honest, damaged: Path, name: str) -> None:
    (damaged / name).unlink()
    with pytest.raises(MambaintError, match="delete the folder"):
        keys_again(honest, damaged)


@pytest.mark.parametrize("manifest", ["{}", "[]", "{", '{"circuit_id": 1}'])
def test_damaged_manifest(honest: Honest, damaged: Path, manifest: str) -> None:
    (damaged / "manifest.json").write_text(manifest)
    with pytest.raises(MambaintError):
        keys_again(honest, damaged)


def test_key_folder_of_another_circuit(honest: Honest, damaged: Path, other: Honest) -> None:
    shutil.rmtree(damaged)
    shutil.copytree(other.keys.folder, damaged)
    with pytest.raises(MambaintError, match="wrong manifest"):
        keys_again(honest, damaged)


def test_damaged_proving_key_of_the_right_size_yields_no_proof(honest: Honest, damaged: Path) -> None:
    content = bytearray((damaged / "pk.key").read_bytes())
    content[200000:201000] = bytes(1000)
    (damaged / "pk.key").write_bytes(content)
    keys = keys_again(honest, damaged)
    with pytest.raises(MambaintError):
        prove(honest.circuit, honest.witness, keys, honest.package_bytes, timeout=30)


def test_interrupted_key_generation_leaves_nothing(
    honest: Honest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(keys_module, "run_job", interrupt)
    with pytest.raises(KeyboardInterrupt):
        make_keys(honest.circuit, honest.witness, honest.srs, tmp_path)
    assert [path.name for path in (tmp_path / "keys").iterdir()] == [f".{honest.keys.circuit_id}.lock"]


def test_killed_process_leaves_nothing_that_is_used(tmp_path: Path) -> None:
    folder = tmp_path / "made"
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom zk.store import building\n"
        "with building(Path(sys.argv[1])) as fresh:\n"
        "    (fresh / 'half').write_text('x')\n    print('ready', flush=True)\n    time.sleep(60)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE)
    with child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        assert not folder.exists()
        child.send_signal(signal.SIGKILL)
    assert len(list(tmp_path.glob(".made.*.part"))) == 1
    with store.building(folder) as fresh:
        assert fresh is not None
        assert list(tmp_path.glob(".made.*.part")) == [fresh]
    assert list(folder.iterdir()) == []


def test_two_processes_make_a_folder_once(tmp_path: Path) -> None:
    code = (
        "import os, sys, time\nfrom pathlib import Path\nfrom zk.store import building\n"
        "with building(Path(sys.argv[1])) as fresh:\n"
        "    if fresh is not None:\n"
        "        time.sleep(0.3)\n        (fresh / str(os.getpid())).write_text('x')\n        print('made')\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "made")]
    children = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(3)]
    printed = [child.communicate(timeout=30)[0] for child in children]
    assert sorted(printed) == [b"", b"", b"made\n"]
    assert len(list((tmp_path / "made").iterdir())) == 1


def test_unwritable_cache(honest: Honest, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(MambaintError, match="MAMBAINT_CACHE"):
        make_keys(honest.circuit, honest.witness, honest.srs, tmp_path / "file")


def test_cache_folder_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MAMBAINT_CACHE", str(tmp_path))
    assert store.cache_folder() == tmp_path
    assert store.cache_folder(tmp_path / "chosen") == tmp_path / "chosen"
    monkeypatch.delenv("MAMBAINT_CACHE")
    assert store.cache_folder() == Path.home() / ".cache" / "mambaint"


@pytest.mark.parametrize(
    "witness",
    [
        Witness({"x": [1, -7, 4]}, {"logits": [2, -21, 20], "anchor": [0]}),
        Witness({"x": [1, -7], "spare": [-1]}, {"logits": [2, -21, 20], "anchor": [0]}),
        Witness({"x": [1, -7, 4], "spare": [-1]}, {"logits": [2, -21, 20]}),
        Witness({"x": [1, -7, 4], "spare": [-1]}, {"logits": [2, -21], "anchor": [0]}),
        Witness({"x": [1, -7, 4], "spare": [5]}, {"logits": [2, -21, 20], "anchor": [5]}),
    ],
)
def test_witness_that_does_not_fit_the_circuit(honest: Honest, witness: Witness) -> None:
    with pytest.raises(MambaintError, match="does not fit the circuit"):
        prove(honest.circuit, witness, honest.keys, honest.package_bytes)


def test_interpreter_and_circuit_disagree(honest: Honest) -> None:
    wrong = dataclasses.replace(honest.witness, public={"logits": [2, -21, 21], "anchor": [0]})
    with pytest.raises(MambaintError, match="the circuit and the interpreter disagree"):
        prove(honest.circuit, wrong, honest.keys, honest.package_bytes)


def test_sample_that_disagrees_makes_no_keys(honest: Honest, tmp_path: Path) -> None:
    with pytest.raises(MambaintError, match="the circuit and the interpreter disagree"):
        make_keys(honest.circuit, tiny_witness(weights=(9, 9, 9)), honest.srs, tmp_path)
    assert not list((tmp_path / "keys").glob("[!.]*"))


def test_sample_that_breaks_a_range_check_is_refused_and_not_proved_forever(
    honest: Honest, tmp_path: Path
) -> None:
    with pytest.raises(MambaintError, match="constraints refuse its sample"):
        make_keys(honest.circuit, tiny_witness((1 << 20, 1, 1)), honest.srs, tmp_path)
    assert not list((tmp_path / "keys").glob("[!.]*"))


def test_keys_and_package_of_different_circuits(honest: Honest, other: Honest) -> None:
    with pytest.raises(MambaintError, match="do not belong together"):
        prove(honest.circuit, honest.witness, honest.keys, other.package_bytes)
    with pytest.raises(MambaintError, match="do not belong together"):
        prove(other.circuit, other.witness, honest.keys, honest.package_bytes)


def test_circuit_id_depends_on_everything_the_key_depends_on(honest: Honest) -> None:
    circuit, srs = honest.circuit, honest.srs.sha256
    variants = [
        circuit_id(circuit, srs, "23.0.5"),
        circuit_id(circuit, srs, "23.0.6"),
        circuit_id(circuit, "0" * 64, "23.0.5"),
        circuit_id(dataclasses.replace(circuit, onnx=circuit.onnx + b"\0"), srs, "23.0.5"),
        circuit_id(dataclasses.replace(circuit, model_id="0" * 64), srs, "23.0.5"),
        circuit_id(dataclasses.replace(circuit, logrows=9), srs, "23.0.5"),
        circuit_id(dataclasses.replace(circuit, rows=10), srs, "23.0.5"),
        circuit_id(dataclasses.replace(circuit, public=circuit.public[:1]), srs, "23.0.5"),
        circuit_id(dataclasses.replace(circuit, inputs=circuit.inputs[:1]), srs, "23.0.5"),
    ]
    assert variants[0] == honest.keys.circuit_id
    assert len(set(variants)) == len(variants)


def test_development_srs_is_made_once_and_marked(honest: Honest) -> None:
    cache = honest.keys.folder.parent.parent
    assert development_srs(LOGROWS, cache) == honest.srs
    about = json.loads((honest.srs.path.parent / "about.json").read_text())
    assert about == {"kind": "development", "logrows": LOGROWS, "sha256": honest.srs.sha256}
    assert len(honest.srs.verifying()) == VERIFYING_BYTES


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "missing", "other size", "no about"])
def test_damaged_development_srs(damaged: Path, damage: str) -> None:
    cache = damaged.parent.parent
    path = cache / "srs" / f"development-{LOGROWS}" / "srs"
    content = bytearray(path.read_bytes())
    content[5000] ^= 1
    if damage == "flip":
        path.write_bytes(content)
    elif damage == "truncate":
        path.write_bytes(content[:-1])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "missing":
        path.unlink()
    elif damage == "other size":
        path.write_bytes(b"\x09" + content[1:])
    else:
        (path.parent / "about.json").unlink()
    with pytest.raises(MambaintError, match="delete the folder"):
        development_srs(LOGROWS, cache)


def test_ceremony_srs_is_used_only_if_it_is_the_published_file(honest: Honest, tmp_path: Path) -> None:
    path, digest = honest.srs.path, honest.srs.sha256
    ceremony = ceremony_srs(path, digest.upper(), LOGROWS)
    assert ceremony == Srs(path, "ceremony", digest, LOGROWS)
    with pytest.raises(MambaintError, match="has SHA-256"):
        ceremony_srs(path, "0" * 64, LOGROWS)
    with pytest.raises(MambaintError, match="and must have"):
        ceremony_srs(path, digest, LOGROWS + 1)
    with pytest.raises(MambaintError, match="cannot read the SRS"):
        ceremony_srs(tmp_path / "none.srs", digest, LOGROWS)
    assert path.stat().st_size == srs_bytes(LOGROWS)


def test_package_says_ceremony_when_it_was_one(honest: Honest, tmp_path: Path) -> None:
    ceremony = ceremony_srs(honest.srs.path, honest.srs.sha256, LOGROWS)
    keys = make_keys(honest.circuit, honest.witness, ceremony, tmp_path)
    assert keys.package({}).srs_kind == "ceremony"
    shutil.rmtree(keys.folder)


def test_srs_for_another_number_of_rows(honest: Honest, tmp_path: Path) -> None:
    wrong = dataclasses.replace(honest.srs, logrows=9)
    with pytest.raises(MambaintError, match=r"is for 2\^9 rows and the circuit has 2\^8"):
        make_keys(tiny_circuit(), tiny_witness(), wrong, tmp_path)


def test_keys_folder_is_readable_by_others_only_after_it_is_whole(honest: Honest) -> None:
    assert honest.keys.folder.stat().st_mode & 0o777 == 0o755
    assert not list(honest.keys.folder.parent.glob(".*.part"))
    assert time.time() - os.path.getmtime(honest.keys.folder) < 3600
