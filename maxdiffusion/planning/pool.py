"""Runs functions in processes of their own, a few at a time, in the environment of a target. Imports no jax."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import multiprocessing
import multiprocessing.process
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TypeVar

from maxdiffusion.errors import UserError

K = TypeVar("K")
T = TypeVar("T")

GIB_EACH = 3.0  # memory of this machine that a worker may take: 1 to 3 measured


class Pool:
    """Runs each function in a fresh process, with a temporary folder of its own; neither outlives it."""

    def __init__(self, environment: Mapping[str, str], deadline: float, workers: int | None = None) -> None:
        """Adds the variables to this process's before a function's module is imported.

        Args:
          environment: the variables.
          deadline: of `time.monotonic`.
          workers: processes at a time; None is one per processor of this machine, as memory allows.
        """
        self._environment, self._deadline = {**os.environ, **environment}, deadline
        processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self._workers = workers or max(1, int(min(processors, available() / GIB_EACH)))

    def map(self, jobs: Mapping[K, Callable[[], T]]) -> Iterator[tuple[K, T | UserError | None]]:
        """Starts the jobs in order and yields (key, result) as they end.

        Where a job fails or its process dies the result is a sentence; where the deadline came first it is None.
        """
        with contextlib.ExitStack() as everything:
            waiting, running = list(jobs.items())[::-1], dict[Future[T], tuple[K, _Worker, contextlib.ExitStack]]()
            while waiting or running:
                while waiting and len(running) < self._workers:
                    key, job = waiting.pop()
                    if time.monotonic() > self._deadline:
                        yield key, None
                        continue
                    own = everything.enter_context(contextlib.ExitStack())
                    worker = own.enter_context(_worker(self._environment, self._deadline))
                    running[worker.executor.submit(job)] = key, worker, own
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    key, worker, own = running.pop(future)
                    answer = self._answer(future, worker)
                    own.close()
                    yield key, answer

    def do(self, job: Callable[[], T]) -> T | None:
        """The job's result; None where the deadline came first.

        Raises:
          UserError: it failed, or its process died.
        """
        ((_, answer),) = self.map({0: job})
        if isinstance(answer, UserError):
            raise answer
        return answer

    def _answer(self, future: Future[T], worker: _Worker) -> T | UserError | None:
        try:
            return future.result()
        except BrokenProcessPool:
            if time.monotonic() > self._deadline:
                return None
            worker.process.join()
            while worker.process.exitcode is None:  # the executor's thread reaped it and has yet to store the code
                time.sleep(0.01)
            said = worker.log.read_text(errors="replace") if worker.log.exists() else ""
            return UserError(_reason(said, worker.process.exitcode))
        except UserError as error:
            return error
        except Exception as error:
            return UserError(_reason(f"{type(error).__name__}: {error}"))


@dataclasses.dataclass(frozen=True)
class _Worker:
    executor: ProcessPoolExecutor
    process: multiprocessing.process.BaseProcess
    log: Path  # standard output and error of it and its libraries


@contextlib.contextmanager
def _worker(environment: Mapping[str, str], deadline: float) -> Iterator[_Worker]:
    """An executor of one process, which ends with the block."""
    with tempfile.TemporaryDirectory(prefix="plan-", ignore_cleanup_errors=True) as folder:
        log, others = Path(folder, "log"), set(multiprocessing.active_children())
        given = dict(environment) | {"TMPDIR": folder}
        executor = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _begin, (given, log, deadline))
        executor.submit(os.getpid)  # starts it
        (process,) = set(multiprocessing.active_children()) - others
        try:
            yield _Worker(executor, process, log)
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid or 0, signal.SIGKILL)
            process.kill()  # it may not lead a group yet
            executor.shutdown()


def _begin(environment: Mapping[str, str], log: Path, deadline: float) -> None:
    """Prepares a worker, before it imports its job's module."""
    os.environ.clear()
    os.environ.update(environment)
    os.setsid()  # Ctrl-C reaches the parent alone, and all processes started here end with this group
    said = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(said, 1)
    os.dup2(said, 2)
    threading.Thread(target=_end, args=(log.parent, deadline), daemon=True).start()


def _end(folder: Path, deadline: float) -> None:
    """Ends this group of processes with its parent, or at the deadline."""
    parent = multiprocessing.parent_process()
    assert parent
    parent.join(max(0.0, deadline - time.monotonic()))
    for _ in range(1000):  # while another thread still writes to it
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            break
    os.killpg(0, signal.SIGKILL)


def libtpu() -> bool:
    """Whether the compiler for TPUs is installed."""
    return importlib.util.find_spec("libtpu") is not None


def available() -> float:
    """GiB of this machine's memory that are free."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) / 2**20
    return float("inf")


def _reason(log: str, code: int | None = None) -> str:
    """One sentence for a worker that ended without an answer."""
    if "lockfile" in log or "already in use" in log:
        return (
            "libtpu is locked by another process on this machine; end that process, or remove /tmp/libtpu_lockfile if "
            "there is none, and run again."
        )
    if "No space left on device" in log:
        return "Compiling found the disk of temporary files full; free some space or set TMPDIR to another folder."
    if code == -signal.SIGKILL or "MemoryError" in log or "std::bad_alloc" in log:
        return (
            f"Compiling was killed, most likely as this machine's memory is full ({available():.1f} GiB are free, a "
            f"compilation takes up to {GIB_EACH:g}); end other programs and run again."
        )
    lines = [line.strip() for line in log.splitlines() if line.strip()] or ["it said nothing"]
    shown = next((line for line in reversed(lines) if "Error" in line), lines[-1])
    return f"Compiling failed{f' with exit code {code}' if code else ''}: {shown[:600]}."
