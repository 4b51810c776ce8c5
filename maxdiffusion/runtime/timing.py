"""Seconds of each phase and peak memory of a run."""

import contextlib
import re
import resource
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax


class Clock:
    """Seconds by phase (load, text, compile, denoise, decode, encode, ...), in the order in which they first began.

    Phases may nest: each second counts for the innermost phase only, so that the phases add up to the total. A phase
    entered again continues. Block on results inside the block: what a device computes after it is counted elsewhere.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        """`now` returns seconds."""
        self._now = now
        self._seconds: dict[str, float] = {}
        self._steps: dict[str, list[float]] = {}
        self._open: list[str] = []
        self._since = 0.0

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the block's seconds under `name`, also where it raises."""
        self._switch()
        self._seconds.setdefault(name, 0.0)
        self._open.append(name)
        try:
            yield
        finally:
            self._switch()
            self._open.pop()

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Count the block as one step of the open phase, without the seconds of phases inside the block."""
        name = self._open[-1]
        self._switch()
        before = self._seconds[name]
        yield
        self._switch()
        self._steps.setdefault(name, []).append(self._seconds[name] - before)

    @contextlib.contextmanager
    def compilation(self, name: str = "compile") -> Iterator[None]:
        """Within the block, count XLA's compilations and reads of the compile cache by this thread under `name`.

        Tracing counts for the open phase. Source: jax.monitoring's event of `jax._src.dispatch.BACKEND_COMPILE_EVENT`.
        """
        thread = threading.get_ident()

        def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
            if event != "/jax/core/compile/backend_compile_duration" or threading.get_ident() != thread:
                return
            if self._open and self._open[-1] != name:
                self._switch()
                self._seconds[self._open[-1]] -= duration_secs
                self._seconds[name] = self._seconds.get(name, 0.0) + duration_secs

        jax.monitoring.register_event_duration_secs_listener(listen)
        try:
            yield
        finally:
            jax.monitoring.unregister_event_duration_listener(listen)

    def _switch(self) -> None:
        """Give the seconds since the last call to the phase that is open."""
        now = self._now()
        if self._open:
            self._seconds[self._open[-1]] += now - self._since
        self._since = now

    def as_dict(self) -> dict[str, Any]:
        """JSON types: `seconds` by phase and in total, `steps` (seconds each) by phase, `peak_memory` in bytes."""
        seconds = {name: round(value, 3) for name, value in self._seconds.items()}
        steps = {name: [round(value, 4) for value in values] for name, values in self._steps.items()}
        total = round(sum(self._seconds.values()), 3)
        return {"seconds": seconds, "total_seconds": total, "steps": steps, "peak_memory": peak_memory()}

    def table(self) -> str:
        """The closing table: phase, seconds, share; then peak memory."""
        total = sum(self._seconds.values())
        lines = [f"{'phase':<10}{'seconds':>10}{'share':>8}"]
        for name, seconds in self._seconds.items():
            line = f"{name:<10}{seconds:>10.2f}{seconds / total if total else 0:>8.0%}"
            if steps := self._steps.get(name):
                line += f"   {len(steps)} steps, median {statistics.median(steps):.3g} s"
            lines.append(line)
        lines.append(f"{'total':<10}{total:>10.2f}")
        peaks = {name: f"{size / 2**30:.2f} GiB" if size else "not reported" for name, size in peak_memory().items()}
        lines.append(f"peak memory: host {peaks['host']}, device {peaks['device']}")
        return "\n".join(lines)


def peak_memory() -> dict[str, int | None]:
    """Bytes: `host`, the peak resident set of this process; `device`, the largest peak of its devices.

    None where the device does not report it (CPU).
    """
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    device = max((stat["peak_bytes_in_use"] for stat in stats if "peak_bytes_in_use" in stat), default=None)
    return {"host": host_peak(), "device": device}


def host_peak() -> int:
    """Peak resident set in bytes, by Linux's VmHWM where there is one: getrusage's is inherited from the parent."""
    status = Path("/proc/self/status")
    if status.exists() and (found := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
        return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
