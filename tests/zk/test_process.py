"""The child process: crashes, hangs and kills become one clear error and leave nothing running."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from circuits.circuit import table_high
from mamba_int.errors import MambaintError
from tests.zk.conftest import tiny_circuit, tiny_witness
from zk import ezkl_calls, process, table
from zk.process import run_job
from zk.prove import mock
from zk.scratch import scratch_folder


def fake_worker(monkeypatch: pytest.MonkeyPatch, folder: Path, body: str) -> None:
    """Replace ``zk.worker`` by a script; the job still travels as usual."""
    (folder / "zk").mkdir()
    (folder / "zk" / "__init__.py").touch()
    (folder / "zk" / "worker.py").write_text(f"import os, signal, sys, time\nsys.stdin.read()\n{body}\n")
    monkeypatch.setattr(process, "_SOURCE_ROOT", folder)


def test_hang_is_stopped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    fake_worker(monkeypatch, tmp_path, f"open({str(pid)!r}, 'w').write(str(os.getpid()))\ntime.sleep(60)")
    started = time.perf_counter()
    with pytest.raises(MambaintError, match="proving took longer than 1 s"):
        run_job("prove", {}, what="proving", timeout=1)
    assert time.perf_counter() - started < 10
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_kill_for_lack_of_memory_is_said_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_worker(monkeypatch, tmp_path, "os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(MambaintError, match="lack of memory"):
        run_job("prove", {}, what="proving", timeout=30)


def test_failed_allocation_is_said_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    body = "print('memory allocation of 9 bytes failed', file=sys.stderr, flush=True)\nos.abort()"
    fake_worker(monkeypatch, tmp_path, body)
    with pytest.raises(MambaintError, match="lack of memory"):
        run_job("prove", {}, what="proving", timeout=30)


def test_crash_shows_its_last_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_worker(monkeypatch, tmp_path, "sys.exit('first\\nthe reason\\n')")
    with pytest.raises(MambaintError, match=r"proving crashed \(exit 1\): the reason"):
        run_job("prove", {}, what="proving", timeout=30)


def test_interrupt_kills_the_prover(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    fake_worker(monkeypatch, tmp_path, f"open({str(pid)!r}, 'w').write(str(os.getpid()))\ntime.sleep(60)")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 1.0)
    try:
        with pytest.raises(KeyboardInterrupt):
            run_job("prove", {}, what="proving", timeout=30)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


@pytest.mark.skipif(sys.platform != "linux", reason="the parent-death signal is Linux's")
def test_prover_dies_with_a_killed_caller() -> None:
    code = (
        "import ctypes, subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', "
        "'from zk.worker import _die_with_parent; import time; _die_with_parent();'"
        "'print(1, flush=True); time.sleep(60)'], stdout=subprocess.PIPE)\n"
        "child.stdout.readline()\nprint(child.pid, flush=True)\nimport time; time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    with parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        parent.kill()
    for _ in range(100):
        state = Path(f"/proc/{pid}/stat")
        if not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return
        time.sleep(0.05)
    os.kill(pid, signal.SIGKILL)
    pytest.fail("the prover outlived its caller")


def test_scratch_folder_with_the_private_input_is_removed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    mock(tiny_circuit(), [tiny_witness()])
    assert list(tmp_path.iterdir()) == []


def test_scratch_folder_of_a_killed_process_is_removed_by_the_next_job(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    code = "from zk.scratch import scratch_folder\nimport os\nwith scratch_folder():\n    os._exit(1)"
    held = "with scratch_folder() as folder:\n    print(folder, flush=True)\n    input()"
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=False)
    (left,) = tmp_path.iterdir()
    with subprocess.Popen(
        [sys.executable, "-c", f"from zk.scratch import scratch_folder\n{held}"],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as holder:
        assert holder.stdout is not None
        running = Path(holder.stdout.readline().decode().strip())
        with scratch_folder():
            assert left.exists() and running.exists()
        for folder in (left, running):
            os.utime(folder, (1, 1))
        with scratch_folder():
            assert not left.exists() and running.exists()
        holder.communicate(b"\n")
    assert not running.exists()


def test_ezkl_environment_variables_do_not_reach_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EZKL_KEY_FORMAT", "processed")
    monkeypatch.setenv("LOOKUP_CACHE", "/tmp/poisoned")
    assert not {"EZKL_KEY_FORMAT", "LOOKUP_CACHE"} & set(process._environment(None))


def test_ezkl_fault_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "circuit.onnx").write_bytes(b"not onnx")
    with pytest.raises(ezkl_calls.EzklError) as caught:
        ezkl_calls.gen_settings(tmp_path / "circuit.onnx", tmp_path / "settings.json", 8, False)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("committed", [False, True])
@pytest.mark.parametrize("logrows", [8, 9, 12])
def test_table_edges_are_where_the_gadgets_assume(tmp_path: Path, logrows: int, committed: bool) -> None:
    table.check_edges(tmp_path / "edges", logrows, committed)


@pytest.mark.parametrize("shift", [-1, 1])
def test_table_that_ends_elsewhere_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shift: int
) -> None:
    monkeypatch.setattr(table, "table_high", lambda logrows: table_high(logrows) + shift)
    with pytest.raises(MambaintError, match="lookup table for"):
        table.check_edges(tmp_path / "edges", 8, False)
