"""SIGTERM and SIGINT: the first one ends a run at its next safe point, the second one at once.

Exit codes: 75 (EX_TEMPFAIL of sysexits.h: try again later) after SIGTERM, 130 after SIGINT.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from types import FrameType

from maxdiffusion.runtime import peers

PATIENCE = 5  # seconds that compiled code has to return to Python, before the first signal ends the process for it
EXIT_CODES = {signal.SIGTERM: 75, signal.SIGINT: 130}


class Stopped(BaseException):
    """Ends a run after a signal; no `except Exception` on its way takes it for a failure."""

    def __init__(self, number: int, what: str = "stopped") -> None:
        """`what` says how far the run came."""
        self.signal = signal.Signals(number)
        super().__init__(f"{self.signal.name}: {what}; the same command goes on from there")

    @property
    def exit_code(self) -> int:
        return EXIT_CODES[self.signal]


_heard = 0
_deferred = False


def heard() -> int:
    """The first signal of this process; 0 before."""
    return _heard


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Turns the first signal into `Stopped`, raised at once or, within `deferred`, left to its block.

    Python hears a signal only between two calls of compiled code, so a thread counts them and ends the process at the
    second one.
    """
    global _heard
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _heard = 0
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    watcher = threading.Thread(target=_watch, args=(ours,), daemon=True)
    watcher.start()
    wakeup = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    handlers = {number: signal.signal(number, _hear) for number in EXIT_CODES}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(wakeup)
        theirs.close()
        watcher.join()
        ours.close()
        _heard = 0  # a later run of this process has not heard it


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """A block that asks `heard` itself, to stop where its work is whole; else it stops at its end.

    Raises:
      Stopped: at the end, after a signal within.
    """
    global _deferred
    _deferred = True
    try:
        yield
    finally:
        _deferred = False
    if _heard:
        raise Stopped(_heard)


@contextlib.contextmanager
def immediate() -> Iterator[None]:
    """A block within `deferred` in which a signal ends the run at once: nothing is lost while weights are loaded.

    Raises:
      Stopped: a signal came before it.
    """
    global _deferred
    outer, _deferred = _deferred, False
    try:
        if _heard:
            raise Stopped(_heard)
        yield
    finally:
        _deferred = outer


def _hear(number: int, frame: FrameType | None) -> None:
    global _heard
    first, _heard = not _heard, _heard or number
    if first and not _deferred:
        raise Stopped(number)


def _watch(ours: socket.socket) -> None:
    first = 0
    while number := _received(ours, first):
        if number in EXIT_CODES:
            last, first = bool(first), first or number
            text = "stopped at once" if last else "stops after the step in work; once more: at once"
            if last:
                _end(number, text)
            print(f"{signal.Signals(number).name}: {text}", file=sys.stderr, flush=True)


def _received(ours: socket.socket, first: int) -> int:
    """The number of the next signal; 0 at the end. Ends the process where nothing in Python answers the first one."""
    while True:
        ours.settimeout(PATIENCE if first and not _heard else None)
        try:
            return next(iter(ours.recv(1)), 0)
        except TimeoutError:
            if not _heard and not _deferred:
                _end(first, "stopped at once")


def _end(number: int, text: str) -> None:
    os._exit(peers.end(EXIT_CODES[signal.Signals(number)], f"{signal.Signals(number).name}: {text}"))
