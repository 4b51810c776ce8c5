"""Jobs for `worker`, each in a process of its own, a few at a time. Imports no jax."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, TypeVar

import pydantic

import maxdiffusion
from maxdiffusion.errors import UserError
from maxdiffusion.planning.results import Stage

K = TypeVar("K")

_GIB_EACH = 3.0  # memory of this machine that a worker may take: 1 to 3 measured
_ROOT = str(Path(maxdiffusion.__file__).parents[1])


class Job(pydantic.BaseModel):
    """What is to be compiled.

    Attributes:
      config: a `Config`, as JSON.
      stage: text, denoise or decode.
      slice: the name of a TPU slice; None is this machine's own devices.
      gib: memory of a device, in GiB.
    """

    config: dict[str, Any]
    stage: str
    slice: str | None
    gib: float


class Answer(pydantic.BaseModel):
    """One of: the stage, the sentence that refuses it, what this machine's devices are."""

    stage: Stage | None = None
    refused: str | None = None
    devices: dict[str, Any] | None = None


class Pool:
    """Runs jobs; none outlives it."""

    def __init__(self, environment: Mapping[str, str], deadline: float, command: tuple[str, ...] = ()):
        """The variables are added to ours; `deadline` is one of `time.monotonic`; `command` is for tests."""
        self._environment = {**os.environ, **environment}
        path = [_ROOT, self._environment.get("PYTHONPATH", "")]
        self._environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
        self._deadline = deadline
        self._command = command or (sys.executable, "-m", "maxdiffusion.planning.worker")
        self._running: set[subprocess.Popen[bytes]] = set()
        self._closed = False
        self._lock = threading.Lock()

    def map(self, jobs: Mapping[K, Job], on_answer: Callable[[K, Answer | None], None]) -> None:
        """Does the jobs, in order, and hands on answers as they come; None where the deadline came first.

        Raises:
          UserError: a job cannot be done: libtpu does not start, this machine has no memory for it.
        """
        with ThreadPoolExecutor(workers()) as threads:
            waiting = {threads.submit(self.do, job): key for key, job in jobs.items()}
            try:
                left = set(waiting)
                while left:
                    done, left = wait(left, return_when=FIRST_COMPLETED)
                    for future in done:
                        on_answer(waiting[future], future.result())
            except BaseException:
                for future in waiting:
                    future.cancel()
                self.close()
                raise

    def do(self, job: Job | None) -> Answer | None:
        """The answer to one job; None where the deadline came first. No job asks what this machine's devices are."""
        with tempfile.TemporaryDirectory(prefix="plan-") as folder:
            environment = self._environment | {"TMPDIR": folder}
            with self._lock:
                if self._closed or time.monotonic() > self._deadline:
                    return None
                process = subprocess.Popen(
                    self._command,
                    env=environment,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    start_new_session=True,  # Ctrl-C reaches us alone, and all that a worker starts ends with it
                )
                self._running.add(process)
            try:
                return self._answer(process, job)
            finally:
                _kill(process)
                with self._lock:
                    self._running.discard(process)
                shutil.rmtree(folder, ignore_errors=True)

    def _answer(self, process: subprocess.Popen[bytes], job: Job | None) -> Answer | None:
        assert process.stdin and process.stdout and process.stderr
        errors = process.stderr
        # Its stdin stays open as long as it runs: its end tells the worker that we are gone.
        logs: list[bytes] = []
        reader = threading.Thread(target=lambda: logs.append(errors.read()), daemon=True)
        reader.start()
        timer = threading.Timer(max(0.0, self._deadline - time.monotonic()), _kill, [process])
        timer.start()
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write((job.model_dump_json() if job else "").encode() + b"\n")
            process.stdin.flush()
        text = process.stdout.read()
        code = process.wait()
        timer.cancel()
        reader.join()
        if code == 0:
            return Answer.model_validate_json(text)
        if self._closed or time.monotonic() > self._deadline:
            return None
        raise UserError(_reason(code, b"".join(logs).decode(errors="replace")))

    def close(self) -> None:
        """Ends what runs."""
        with self._lock:
            self._closed = True
            for process in self._running:
                _kill(process)


def workers() -> int:
    """How many at a time: one for each processor of ours, as far as memory goes."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min(processors, _available() / _GIB_EACH)))


def libtpu() -> bool:
    """Whether the compiler for TPUs is installed."""
    return importlib.util.find_spec("libtpu") is not None


def _available() -> float:
    """GiB of memory that nobody uses."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) / 2**20
    return float("inf")


def _kill(process: subprocess.Popen[bytes]) -> None:
    """And all that it started."""
    if process.poll() is None:  # once it was waited for, the number may be another's
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _reason(code: int, log: str) -> str:
    """One sentence for a worker that ended without an answer."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    if code == -signal.SIGKILL or "MemoryError" in log or "std::bad_alloc" in log:
        return (
            f"Compiling was killed, most likely as this machine's memory is full ({_available():.1f} GiB are free, a "
            f"compilation takes up to {_GIB_EACH:g}); end other programs and run again: what was compiled is kept."
        )
    if "lockfile" in log or "already in use" in log:
        return (
            "libtpu is locked by another process on this machine; end that process, or remove /tmp/libtpu_lockfile if "
            "there is none, and run again."
        )
    if "No space left on device" in log:
        return "Compiling found the disk of temporary files full; free some space or set TMPDIR to another folder."
    shown = next((line for line in reversed(lines) if "Error" in line), (lines or ["it said nothing"])[-1])
    return f"Compiling failed with exit code {code}: {shown[:600]}."
