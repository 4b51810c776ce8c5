"""Progress of the stages and of the run: bars on a terminal, a few lines a stage in a log, or nothing."""

import collections
import contextlib
import datetime
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
# with show("denoise", 50, "steps", note) as advance: ...; advance(1). A total of None cannot be counted; bytes get
# prefixes; note() is what else is to be said.
Show = Callable[[str, int | None, str, Callable[[], str]], AbstractContextManager[Advance]]

EVERY = 60.0  # seconds between two lines of a stage in a log
SOON = 60.0  # seconds before its end in which the run's end is not told

# Bytes come by the second; steps and frames take seconds each.
_BYTES = "{desc}{percentage:3.0f}%|{bar:12}| {n_fmt}B/{total_fmt}B [{elapsed}<{remaining}, {rate_noinv_fmt}{postfix}]"
_ITEMS = "{desc}{percentage:3.0f}%|{bar:12}| {n_fmt}/{total_fmt} UNIT [{elapsed}<{remaining}, {rate_inv_fmt}{postfix}]"
_UNCOUNTED = "{desc}... {elapsed}"


class Outlook:
    """When the run will be done, by the seconds that each unit of its stages has taken so far."""

    def __init__(self, now: Callable[[], float] = time.time) -> None:
        """`now` returns seconds since 1970."""
        self._now = now
        self._left: collections.Counter[str] = collections.Counter()
        self._done: collections.Counter[str] = collections.Counter()
        self._seconds: dict[str, float] = collections.defaultdict(float)

    def expect(self, **units: int) -> None:
        """Adds units that the run has still to do, by stage: denoise=80, decode=162."""
        self._left.update(units)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[Advance]:
        """Counts units of a stage and their seconds."""
        since = self._now()

        def advance(count: int) -> None:
            nonlocal since
            now = self._now()
            self._left[name] -= count
            self._done[name] += count
            self._seconds[name] += now - since
            since = now

        yield advance

    def text(self) -> str:
        """`run done 14:32`, or `denoise done 14:32` where nothing tells yet how long the rest takes.

        Empty where nothing is known, nothing is left, or that is less than `SOON` away.
        """
        left = {name: count for name, count in self._left.items() if count > 0}
        known = [name for name in left if self._done[name]]
        now, seconds = self._now(), sum(left[name] * self._seconds[name] / self._done[name] for name in known)
        if not known or seconds < SOON:
            return ""
        today, then = (datetime.datetime.fromtimestamp(at) for at in (now, now + seconds))
        day = "" if then.date() == today.date() else f"{then:%a} "
        return f"{'run' if len(known) == len(left) else ' and '.join(known)} done {day}{then:%H:%M}"


def make(mode: str, stream: TextIO | None = None) -> Show:
    """The config's `progress`: "on" bars, "off" nothing, "auto" bars if `stream` (stderr) is a terminal, else lines."""
    stream = stream or sys.stderr
    if mode == "off":
        return lambda *stage: contextlib.nullcontext(_ignore)
    return functools.partial(_bar, stream) if mode == "on" or stream.isatty() else _lines


@contextlib.contextmanager
def _bar(stream: TextIO, name: str, total: int | None, unit: str, note: Callable[[], str] = str) -> Iterator[Advance]:
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

        def advance(count: int) -> None:
            bar.set_postfix_str(note(), refresh=False)
            bar.update(count)

        yield advance


def _columns(stream: TextIO) -> int:
    """The terminal's width; 80 where it has none (some containers give 0), for which tqdm would show nothing."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except OSError:
        return 80


@contextlib.contextmanager
def _lines(name: str, total: int | None, unit: str, note: Callable[[], str] = str) -> Iterator[Advance]:
    """Log the stage's begin, how far it is once a minute and, unless it raises, its end at INFO."""
    log.info("%s%s", name, "" if total is None else f" ({_size(total, unit)})")
    start = said = time.monotonic()
    done = 0

    def advance(count: int) -> None:
        nonlocal done, said
        done, now = done + count, time.monotonic()
        if total and now - said >= EVERY and done < total:
            said = now
            left = datetime.timedelta(seconds=round((now - start) / done * (total - done)))
            log.info("%s %s, %s left%s", name, _size(total, unit, done), left, _after(note()))

    yield advance
    log.info("%s done in %.1f s%s", name, time.monotonic() - start, _after(note()))


def _size(total: int, unit: str, done: int | None = None) -> str:
    """`1.0 of 2.0 MiB`, `2 of 40 steps`; without `done`, `40 steps`."""
    shown = [f"{count / 2**20:.1f}" if unit == "bytes" else str(count) for count in (done, total) if count is not None]
    return f"{' of '.join(shown)} {'MiB' if unit == 'bytes' else unit}"


def _after(note: str) -> str:
    return f"; {note}" if note else ""


def _ignore(count: int) -> None:
    pass
