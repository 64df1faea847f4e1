"""Running one EZKL job in a child process, so that its panics, hangs, memory and output stay there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mamba_int.errors import MambaintError
from zk.scratch import scratch_folder

_SOURCE_ROOT = Path(__file__).resolve().parent.parent


class JobKilled(MambaintError):
    """The process of a job was killed, by somebody or for lack of memory: trying once more may help."""


def _environment(threads: int | None) -> dict[str, str]:
    # EZKL changes its behaviour by variables of its own (key format, lookup cache); none may leak in.
    kept = {k: v for k, v in os.environ.items() if not k.startswith("EZKL_") and k != "LOOKUP_CACHE"}
    if threads is not None:
        kept["RAYON_NUM_THREADS"] = str(threads)
    kept["PYTHONPATH"] = os.pathsep.join(filter(None, [str(_SOURCE_ROOT), kept.get("PYTHONPATH")]))
    return kept


def run_job(
    kind: str,
    job: dict[str, Any],
    *,
    what: str,
    timeout: float,
    threads: int | None = None,
    started: Callable[[subprocess.Popen[bytes]], None] = lambda child: None,
) -> dict[str, Any]:
    """Run one job of ``zk.worker`` in a child process and return its answer.

    Args:
        kind: name of the job, a key of ``zk.worker.JOBS``.
        job: its arguments, JSON-able.
        what: what the job does, for messages ("proving").
        timeout: seconds after which the child is killed.
        threads: of EZKL; default: one for every core.
        started: told of the child, so that another thread can kill it.

    Returns:
        The job's answer; two are added: ``peak_bytes``, the child's largest resident memory, and
        ``job_seconds``, from its start to its end.

    Raises:
        JobKilled: if the child was killed.
        MambaintError: the job's own fault, a crash, lack of memory, or the timeout.
    """
    begun = time.perf_counter()
    with scratch_folder() as scratch:
        request = json.dumps({"kind": kind, "scratch": str(scratch), "job": job})
        try:
            child = subprocess.Popen(
                [sys.executable, "-P", "-m", "zk.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=_environment(threads),
                start_new_session=True,
            )
        except OSError as error:
            raise MambaintError(
                f"cannot start a process for {what}: {error.strerror or error}", "free some memory"
            ) from error
        with child:
            try:
                started(child)
                answer, log = child.communicate(request.encode(), timeout=timeout)
            except subprocess.TimeoutExpired as error:
                raise MambaintError(
                    f"{what} took longer than {timeout:.0f} s and was stopped",
                    "try again on a less busy machine, or give more time",
                ) from error
            finally:
                # Also the way out of a KeyboardInterrupt: the child is in a session of its own.
                if child.poll() is None:
                    os.killpg(child.pid, signal.SIGKILL)
                    child.wait()
    return _answer(answer, log, child.returncode, what) | {"job_seconds": time.perf_counter() - begun}


def _answer(answer: bytes, log: bytes, code: int, what: str) -> dict[str, Any]:
    remedy = "free some memory, or build the circuit with a smaller logrows or shorter segments"
    if code == -signal.SIGKILL:
        raise JobKilled(f"{what} was killed, most likely for lack of memory", remedy)
    if code == -signal.SIGABRT and b"memory allocation" in log:
        raise MambaintError(f"{what} ended for lack of memory", remedy)
    if code != 0:
        lines = log.decode(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "no message")
        raise MambaintError(f"{what} crashed (exit {code}): {last[:300]}", "report it with the model")
    result: dict[str, Any] = json.loads(answer)
    if "cause" in result:
        raise MambaintError(result["cause"], result["remedy"])
    return result
