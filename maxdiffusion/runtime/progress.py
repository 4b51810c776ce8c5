"""Progress of the stages: bars on a terminal, two lines a stage in a log, or nothing."""

import contextlib
import functools
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TextIO

from tqdm import tqdm

log = logging.getLogger(__name__)

Advance = Callable[[int], object]
# with show("denoise", 50, "steps") as advance: ...; advance(1). A total of None cannot be counted; bytes get prefixes.
Show = Callable[[str, int | None, str], AbstractContextManager[Advance]]

# Bytes come by the second; steps and frames take seconds each.
_BYTES = "{desc}{percentage:3.0f}%|{bar:20}| {n_fmt}B/{total_fmt}B [{elapsed}<{remaining}, {rate_noinv_fmt}]"
_ITEMS = "{desc}{percentage:3.0f}%|{bar:20}| {n_fmt}/{total_fmt} UNIT [{elapsed}<{remaining}, {rate_inv_fmt}]"
_UNCOUNTED = "{desc}... {elapsed}"


def make(mode: str, stream: TextIO | None = None) -> Show:
    """The config's `progress`: "on" bars, "off" nothing, "auto" bars if `stream` (stderr) is a terminal, else lines."""
    stream = stream or sys.stderr
    if mode == "off":
        return lambda name, total, unit: contextlib.nullcontext(_ignore)
    return functools.partial(_bar, stream) if mode == "on" or stream.isatty() else _lines


@contextlib.contextmanager
def _bar(stream: TextIO, name: str, total: int | None, unit: str) -> Iterator[Advance]:
    """A bar with rate and time left, or a line with the seconds, which stays when the stage has ended."""
    in_bytes = unit == "bytes"
    shape = _UNCOUNTED if total is None else _BYTES if in_bytes else _ITEMS.replace("UNIT", unit)
    with tqdm(
        desc=name.ljust(8),
        total=total,
        file=stream,
        ncols=_columns(stream),
        nrows=24,
        bar_format=shape,
        unit="B" if in_bytes else "it",
        unit_scale=in_bytes,
        unit_divisor=1024,
    ) as bar:
        bar.refresh()
        yield bar.update


def _columns(stream: TextIO) -> int:
    """The terminal's width; 80 where it has none (some containers give 0), for which tqdm would show nothing."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except OSError:
        return 80


@contextlib.contextmanager
def _lines(name: str, total: int | None, unit: str) -> Iterator[Advance]:
    """Log the stage's begin and, unless it raises, its end at INFO."""
    size = "" if total is None else f" ({total / 2**20:.1f} MiB)" if unit == "bytes" else f" ({total} {unit})"
    log.info("%s%s", name, size)
    start = time.perf_counter()
    yield _ignore
    log.info("%s done in %.1f s", name, time.perf_counter() - start)


def _ignore(count: int) -> None:
    pass
