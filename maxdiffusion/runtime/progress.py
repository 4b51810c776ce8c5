"""Progress of the phases: bars on a terminal, one line a phase in a log, or nothing."""

import contextlib
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Protocol, TextIO, runtime_checkable

from tqdm import tqdm

log = logging.getLogger(__name__)

Advance = Callable[[int], object]

# Bytes come by the second; steps and frames take seconds each.
_BYTES = "{desc}{percentage:3.0f}%|{bar:20}| {n_fmt}B/{total_fmt}B [{elapsed}<{remaining}, {rate_noinv_fmt}]"
_ITEMS = "{desc}{percentage:3.0f}%|{bar:20}| {n_fmt}/{total_fmt} UNIT [{elapsed}<{remaining}, {rate_inv_fmt}]"
_UNCOUNTED = "{desc}... {elapsed}"


@runtime_checkable
class Progress(Protocol):
    """`with progress.phase("denoise", total=50, unit="steps") as advance: ...; advance(1)`."""

    def phase(self, name: str, total: int | None = None, unit: str = "steps") -> AbstractContextManager[Advance]:
        """Show the block as a phase of `total` units ("bytes" get prefixes); None: one that cannot be counted."""
        ...


class Bars:
    """One bar for each phase; it stays when the phase has ended."""

    def __init__(self, stream: TextIO) -> None:
        """`stream` is a terminal."""
        self._stream = stream

    @contextlib.contextmanager
    def phase(self, name: str, total: int | None = None, unit: str = "steps") -> Iterator[Advance]:
        """A bar with rate and time left; for a phase that cannot be counted a line with its seconds at the end."""
        in_bytes = unit == "bytes"
        shape = _UNCOUNTED if total is None else _BYTES if in_bytes else _ITEMS.replace("UNIT", unit)
        with tqdm(
            desc=name.ljust(8),
            total=total,
            file=self._stream,
            ncols=_columns(self._stream),
            nrows=24,
            bar_format=shape,
            unit="B" if in_bytes else "it",
            unit_scale=in_bytes,
            unit_divisor=1024,
        ) as bar:
            bar.refresh()
            yield bar.update


def _columns(stream: TextIO) -> int:
    """A terminal may have no size (some containers give 0); tqdm, which then shows nothing, is told both numbers."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except OSError:
        return 80


class Lines:
    """Two log lines for each phase: when it begins and when it has ended."""

    @contextlib.contextmanager
    def phase(self, name: str, total: int | None = None, unit: str = "steps") -> Iterator[Advance]:
        """Log at INFO; a phase that raises has no second line."""
        size = "" if total is None else f" ({total / 2**20:.1f} MiB)" if unit == "bytes" else f" ({total} {unit})"
        log.info("%s%s", name, size)
        start = time.perf_counter()
        yield _ignore
        log.info("%s done in %.1f s", name, time.perf_counter() - start)


class Quiet:
    """Nothing."""

    @contextlib.contextmanager
    def phase(self, name: str, total: int | None = None, unit: str = "steps") -> Iterator[Advance]:
        """Show nothing."""
        yield _ignore


def _ignore(count: int) -> None:
    pass


def make(mode: str, stream: TextIO | None = None) -> Progress:
    """The config's `progress`: "on" bars, "off" nothing, "auto" bars if `stream` (stderr) is a terminal, else lines."""
    stream = stream or sys.stderr
    if mode == "off":
        return Quiet()
    return Bars(stream) if mode == "on" or stream.isatty() else Lines()
