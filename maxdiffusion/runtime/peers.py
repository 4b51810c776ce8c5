"""Links between the processes of a run: one that fails, is stopped or dies ends all of them. Imports no jax.

Each process keeps a TCP connection to process 0, which passes on what it hears. A message is a line of JSON,
[exit code, sentence]. A connection that closes without one is that of a process that was killed, since the kernel
closes it at once; a machine that vanishes is noticed by TCP's keep-alive within half a minute. jax itself would wait
for its heartbeat (100 s) and the barrier of its shutdown, then abort; so a failed process leaves by os._exit.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Mapping

EX_TEMPFAIL = 75  # of sysexits.h: where another process was killed, the same command may go on
GRACE = 2.0  # seconds that the main thread has to end by itself after another process failed
LAST = 7.0  # seconds that process 0, whose end aborts the others' jax, waits for them to end
_KEEPALIVE = {"TCP_KEEPIDLE": 15, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}  # seconds, seconds, probes


class _Peers:
    """The other processes, each with a thread that listens to its link."""

    def __init__(self, index: int, links: Mapping[int, socket.socket]) -> None:
        self.index, self.links = index, links
        self.agreed = False
        self.left: set[int] = set()
        self._ended = {number: threading.Event() for number in links}
        self.heard: tuple[int, str] | None = None
        self.news = threading.Event()
        self._once, self._ending = threading.Lock(), threading.Lock()
        for each in links.items():
            threading.Thread(target=self._listen, args=each, daemon=True).start()

    def _listen(self, number: int, link: socket.socket) -> None:
        code, sentence = message = _message(link) or _killed(number)
        self._ended[number].set()
        if code == 0:
            self.left.add(number)
            return
        with self._once:
            if self.heard:
                return
            self.heard = message
        self.news.set()
        if self.index == 0:
            self.tell(code, sentence)
        if message != _killed(0):  # without process 0, jax aborts this one as soon as it notices
            time.sleep(GRACE)
        if not self.agreed:
            self.end(code, f"error: {sentence}")

    def tell(self, code: int, sentence: str) -> None:
        for link in self.links.values():
            with contextlib.suppress(OSError):  # it has ended
                link.sendall(f"{json.dumps([code, sentence])}\n".encode())

    def end(self, code: int, text: str) -> None:
        if not self._ending.acquire(blocking=False):
            threading.Event().wait()  # another thread ends the process
        print(text, file=sys.stderr, flush=True)
        if self.heard is None:
            what = "failed" if code in (1, 2) else "was stopped"
            self.tell(code, f"process {self.index} of this run {what}: {text.removeprefix('error: ')}")
        if self.index == 0:
            deadline = time.monotonic() + LAST
            for ended in self._ended.values():
                ended.wait(max(deadline - time.monotonic(), 0))
        sys.stdout.flush()
        os._exit(code)


_peers: _Peers | None = None


def watch(index: int, links: Mapping[int, socket.socket]) -> None:
    """Listen to the other processes until this one ends.

    Args:
      index: of this process.
      links: by the number of the process at their other end: on process 0 all others, elsewhere process 0 alone.
    """
    global _peers
    for link in links.values():
        link.settimeout(None)
        link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEPALIVE.items():
            if option := getattr(socket, name, None):  # macOS lacks one
                link.setsockopt(socket.IPPROTO_TCP, option, value)
    if links:
        _peers = _Peers(index, links)
        atexit.register(_leave)


def end(code: int, text: str) -> int:
    """Print `text` on stderr and return `code`; one of several processes tells the others and exits."""
    if _peers:
        _peers.end(code, text)
    print(text, file=sys.stderr)
    return code


def crashed() -> None:
    """End one of several processes in an `except` block; another's failure may have caused the exception."""
    if not _peers:
        return
    if _peers.news.wait(GRACE) and _peers.heard:
        code, sentence = _peers.heard
        _peers.end(code, f"error: {sentence}")
    traceback.print_exc()
    what = traceback.format_exception_only(sys.exc_info()[1])
    _peers.end(1, f"error: {' '.join(''.join(what).split())}")


def agreed() -> None:
    """Say that all processes know of the end that follows, so that each takes its time to clean up."""
    if _peers:
        _peers.agreed = True


def has_left(number: int) -> bool:
    """Whether that process has ended without a failure."""
    return _peers is not None and number in _peers.left


def _leave() -> None:
    if _peers:
        _peers.agreed = True
        _peers.tell(0, "")


def _message(link: socket.socket) -> tuple[int, str] | None:
    """What a process says before it ends; None where it says nothing."""
    try:
        line = link.makefile(encoding="utf-8").readline()
    except OSError:
        return None
    if not line.endswith("\n"):
        return None
    code, sentence = json.loads(line)
    return code, sentence


def _killed(number: int) -> tuple[int, str]:
    return EX_TEMPFAIL, f"process {number} of this run ended without a word: it was killed, or its machine is gone"
