"""Chains proved on a Ray cluster: what is sent, what is refused, what a kill loses."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from circuits.circuit import Witness
from cli.main import main
from mamba_int.errors import MambaintError
from mamba_int.graph import IntArray
from tests.circuits_runtime.models import random_graph
from tests.zk.test_chain import TEXT
from zk import ray_node, ray_provers
from zk.parcels import KeyParcels, Parcel
from zk.prove_chain import PROOF, SECRET, ProvableChain, prepare_chain, prove_chain
from zk.ray_provers import RayProvers
from zk.verify import Verdict
from zk.verify_chain import verify_chain

pytest.importorskip("ray", reason="the cluster is optional: pip install 'mambaint[ray]'")
STEPS = 4


def tokens(segments: int) -> IntArray:
    return np.random.default_rng(0).integers(0, 11, STEPS * segments)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """With ``cache``, which is that of this process and all it starts."""
    made = tmp_path_factory.mktemp("ray")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MAMBAINT_CACHE", str(made / "cache"))
        yield made


@pytest.fixture(scope="module")
def chain(folder: Path) -> ProvableChain:
    graph, _ = random_graph(0, **TEXT)
    graph.save(folder / "model.mint")
    return prepare_chain(graph, STEPS)


@pytest.fixture(scope="module")
def cluster(folder: Path) -> Iterator[Any]:
    """Two nodes of one core, whose cache is another folder than ours."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("MAMBAINT_CACHE", str(folder / "nodes"))
        made = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 1, "include_dashboard": False, "object_store_memory": 100_000_000},
        )
        made.add_node(num_cpus=1, object_store_memory=100_000_000)
    yield made
    made.shutdown()


def provers_in(cache: Path) -> list[int]:
    """Processes that prove with this cache folder: nobody else's."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
            variables = (process / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"zk.worker" in words and f"MAMBAINT_CACHE={cache}".encode() in variables:
            found.append(int(process.name))
    return found


def eventually(condition: Callable[[], Any], seconds: float = 20) -> Any:
    """The first true value."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)
    return value


def parent(process: int) -> int:
    return int(Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[1])


def verdict_on(file: Path, chain: ProvableChain, folder: Path) -> Verdict:
    """As who has nothing but the two files."""
    (folder / "verifier.zip").write_bytes(chain.package)
    return verify_chain(file, folder / "verifier.zip")


def test_nodes_without_the_keys_are_sent_them_once_and_the_chain_verifies(
    chain: ProvableChain, cluster: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nowhere = tmp_path / "another machine"

    def elsewhere(circuit: Any, keys: Any, parcels: KeyParcels) -> ray_node.Order:
        """Its nodes see none of our files."""
        keys = replace(keys, folder=nowhere, srs=replace(keys.srs, path=nowhere))
        moved = [replace(parcel, origin=nowhere) for parcel in (parcels.keys, parcels.srs)]
        return ray_node.Order(circuit, keys, KeyParcels(*moved, parcels.srs_file))

    monkeypatch.setattr(ray_provers, "Order", elsewhere)
    with RayProvers(cluster.address) as provers:
        result = prove_chain(chain, [tokens(4)], tmp_path / "c", provers=provers)
        sent = folder / "nodes" / "keys" / chain.stages[0].keys.circuit_id
        first = sent.stat().st_mtime_ns
        again = prove_chain(chain, [tokens(3)], tmp_path / "d", provers=provers)
    assert (result.segments, result.proved, again.proved) == (4, 4, 3)
    assert verdict_on(result.file, chain, tmp_path).valid
    assert sent.stat().st_mtime_ns == first
    assert {p.name for p in sent.iterdir()} == {p.name for p in chain.stages[0].keys.folder.iterdir()}


def test_killed_prover_worker_and_node_lose_only_what_they_were_proving(
    chain: ProvableChain, cluster: Any, folder: Path, tmp_path: Path
) -> None:
    lost = cluster.add_node(num_cpus=1, object_store_memory=100_000_000)
    nodes, killed = folder / "nodes", []

    def kill(proved: int, found: int) -> None:
        if len(killed) >= 3 or proved == 7:
            return
        if len(killed) == 2:
            cluster.remove_node(lost, allow_graceful=False)
            killed.append(0)
            return
        prover = eventually(lambda: provers_in(nodes))[0]
        try:
            killed.append(parent(prover) if killed else prover)
            os.kill(killed[-1], signal.SIGKILL)
        except OSError:
            killed.pop()

    with RayProvers(cluster.address) as provers:
        result = prove_chain(chain, [tokens(7)], tmp_path / "c", provers=provers, tell=kill)
    assert len(killed) == 3 and result.segments == 7
    assert verdict_on(result.file, chain, tmp_path).valid


def test_node_of_another_version_is_refused(
    chain: ProvableChain, cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_provers, "installed_version", lambda: "23.0.4")
    with (
        RayProvers(cluster.address) as provers,
        pytest.raises(MambaintError, match=r"node .* has ezkl 23\.0\.5, and this machine ezkl 23\.0\.4"),
    ):
        prove_chain(chain, [tokens(1)], tmp_path / "c", provers=provers)


def test_proof_that_no_node_can_hold_does_not_wait_for_ever(cluster: Any) -> None:
    with RayProvers(cluster.address, workers=1) as provers:
        with pytest.raises(MambaintError, match="no node"):
            provers.room(1 << 50)
        assert provers.room(1 << 20) == 1


def command(folder: Path, out: str, segments: int) -> list[str]:
    path = folder / f"{segments}.json"
    path.write_text(json.dumps({"input_data": [tokens(segments).tolist()]}))
    return [
        *(sys.executable, "-m", "cli.main", "prove", "--model", f"{folder}/model.mint", "--input", str(path)),
        *("--segment-steps", str(STEPS), "--ray", "local", "--out", f"{folder}/{out}/proof.json", "--json"),
    ]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_interrupted_command_leaves_no_process_and_goes_on(
    chain: ProvableChain, folder: Path, how: signal.Signals
) -> None:
    out = f"run{how}"
    cache, segments = folder / "cache", folder / out / "proof.segments"
    begun = subprocess.Popen(
        command(folder, out, 5), stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )

    def finished() -> set[str]:
        return {path.name for path in segments.glob("*.json")} - {SECRET, PROOF}

    with begun:
        eventually(lambda: finished() or begun.poll() is not None, 60)
        begun.send_signal(how)
        _, error = begun.communicate(timeout=60)
    kept = finished()
    assert kept and begun.returncode == (2 if how == signal.SIGINT else -how), error.decode()
    if how == signal.SIGINT:
        assert error.decode().strip().splitlines()[-1].startswith("mambaint: interrupted")
    eventually(lambda: not provers_in(cache))
    if how == signal.SIGINT:
        eventually(lambda: not session(begun.pid))
    for process in session(begun.pid):
        # Agents of a Ray that was killed, which look for it for minutes.
        os.kill(process, signal.SIGKILL)
    ended = subprocess.run(command(folder, out, 5), capture_output=True, check=True)
    result = json.loads(ended.stdout)
    assert (result["segments"], result["proved_now"]) == (5, 5 - len(kept))
    checked = [sys.executable, "-m", "cli.main", "verify", f"{folder}/{out}/proof.json"]
    assert b"VALID" in subprocess.run(checked, capture_output=True, check=True).stdout


def session(leader: int) -> list[int]:
    found = subprocess.run(["pgrep", "-s", str(leader)], capture_output=True, text=True)
    return [int(line) for line in found.stdout.split()]


def test_ray_that_is_not_installed_is_one_line(
    chain: ProvableChain, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setattr(sys, "argv", ["mambaint", *command(folder, "missing", 1)[3:]])
    with pytest.raises(SystemExit) as stop:
        main()
    line = "mambaint: Ray is not installed; run: pip install 'mambaint[ray]'\n"
    assert (stop.value.code, capsys.readouterr().err) == (2, line)


@pytest.mark.parametrize("address", ["127.0.0.1:9", "ray://127.0.0.1:9", "127.0.0.1:port", "nobody"])
def test_cluster_that_is_not_there_is_one_line(address: str) -> None:
    with (
        pytest.raises(MambaintError, match="cannot use the Ray cluster") as caught,
        RayProvers(address),
    ):
        pass
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("nodes", "workers", "cores"),
    [
        ([(2, 9)], None, 1),
        ([(2, 9)], 1, 2),
        ([(64, 8), (64, 8)], None, 8),
        ([(64, 8), (2, 9)], None, 2),
        ([(4, 4), (4, 4)], 1, 4),
        ([(3, 2)], 2, 1),
    ],
)
def test_all_cores_of_a_node_are_used_and_none_is_left_out(
    nodes: list[tuple[int, int]], workers: int | None, cores: int
) -> None:
    assert ray_provers._cores_each(nodes, workers) == cores


def parcel(origin: Path) -> Parcel:
    content = {"a": b"one", "b": b"two" * 1000}
    origin.mkdir()
    for name, value in content.items():
        (origin / name).write_bytes(value)
    return Parcel("keys/x", origin, {n: hashlib.sha256(v).hexdigest() for n, v in content.items()})


def test_files_that_arrive_changed_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAMBAINT_CACHE", str(tmp_path / "node"))
    here = parcel(tmp_path / "driver")
    assert here.unpack(lambda _: b"never asked for") == tmp_path / "driver"
    content = {digest: (here.origin / name).read_bytes() for name, digest in here.sha256.items()}
    there = replace(here, origin=tmp_path / "nowhere")
    with pytest.raises(MambaintError, match="damaged"):
        there.unpack(lambda digest: content[digest][:-1])
    assert not (tmp_path / "node/keys/x").exists()
    assert there.unpack(content.__getitem__) == tmp_path / "node/keys/x"
    (tmp_path / "node/keys/x/a").write_bytes(b"ONE")
    with pytest.raises(MambaintError, match="delete the folder"):
        there.unpack(content.__getitem__)


def test_fault_on_a_node_is_no_reason_to_try_again_but_a_kill_is(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray import exceptions

    def settled(answer: Any, error: Exception | None = None) -> BaseException | None:
        raw: Future[dict[str, Any]] = Future()
        future: Future[dict[str, Any]] = Future()
        raw.set_exception(error) if error else raw.set_result(answer)
        ray_provers._settle(future, raw)
        return future.exception()

    fault = {"cause": "c", "remedy": "r", "killed": False}
    assert type(settled(fault)) is MambaintError
    assert type(settled(fault | {"killed": True})) is ray_provers.JobKilled
    assert type(settled(None, exceptions.WorkerCrashedError())) is ray_provers.JobKilled
    assert type(settled(None, exceptions.RuntimeEnvSetupError())) is MambaintError
    assert settled({"proof": "00"}) is None


def test_witness_is_kept_to_the_integer_on_its_way(
    chain: ProvableChain, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Salts and a chain's number are far beyond 64 bits."""
    seen: list[Witness] = []
    keys = chain.stages[0].keys
    monkeypatch.setattr(ray_node, "prove_witness", lambda circuit, witness, *rest: seen.append(witness) or {})
    witness = Witness({"x": [-1, 2**62]}, {"chain": [2**127, 0, 1]}, {"state_in": [2**253] * 8})
    order = pickle.dumps(ray_node.Order(chain.stages[0].lowered.circuit, keys, KeyParcels.of(keys)))
    ray_node.prove_here(keys.circuit_id, lambda _: order, lambda _: b"", pickle.dumps(witness), None, 1)
    assert seen == [witness]
