"""Locks: a small file that says which run uses a name, made exclusively and removed at the end.

The file of a killed run is taken over. A local file is held by flock as long as its owner runs, on network file
systems by their server's locks; process numbers could not tell, because containers share host names but not processes.
An object in a store is renewed by its owner, and free when it has not been renewed for EXPIRY seconds.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import socket
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from upath import UPath

from maxdiffusion.runtime import paths
from maxdiffusion.runtime.paths import AnyPath

RENEWAL, EXPIRY = 15.0, 90.0  # seconds; the clocks of two hosts must not differ by more than the rest
_OURS = b"maxdiffusion"


def try_lock(path: AnyPath) -> AbstractContextManager[bool]:
    """Hold the lock file `path` until the block ends, then remove it; False if another holds it. Makes its folder.

    A live run's or thread's file, a link, a folder, and a file of other content count as held and stay as they are.

    Raises:
      OSError: the file cannot be made.
    """
    paths.make_folder(path.parent)
    return _locked(path) if isinstance(path, Path) else _leased(path)


@contextlib.contextmanager
def lock_of_living(path: AnyPath) -> Iterator[bool]:
    """As `try_lock`, but an object in a store is waited for as long as that of a killed run takes to expire.

    Its owner may have been killed just now: the run that goes on would else be refused.
    """
    deadline = time.monotonic() + (0 if isinstance(path, Path) else EXPIRY + 2 * RENEWAL)
    with contextlib.ExitStack() as stack:
        while not (mine := stack.enter_context(try_lock(path))) and time.monotonic() < deadline:
            time.sleep(1)
        yield mine


def _owner() -> bytes:
    return b"%s %s %d %s" % (_OURS, socket.gethostname().encode(), os.getpid(), secrets.token_hex(4).encode())


def _stamped(owner: bytes) -> bytes:
    return b"%s %d\n" % (owner, time.time())


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[bool]:
    owner, mine = _owner(), False
    with contextlib.ExitStack() as stack:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except OSError:
            if not os.path.lexists(path):
                raise
        else:
            stack.callback(os.close, descriptor)
            mine = _flock(descriptor, path)
        if mine:
            stack.callback(_remove, path, owner)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, _stamped(owner), 0)
        yield mine


def _flock(descriptor: int, path: Path) -> bool:
    free = [b"", _OURS]
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks: the first that writes into the file holds it, until it is deleted
        free = [b""]
    found = os.fstat(descriptor)
    with contextlib.suppress(FileNotFoundError):  # its owner has just removed it
        same = stat.S_ISREG(found.st_mode) and os.path.samestat(found, os.lstat(path))
        return same and os.pread(descriptor, len(_OURS), 0) in free
    return False


@contextlib.contextmanager
def _leased(path: UPath) -> Iterator[bool]:
    owner, ended = _owner(), threading.Event()
    with paths.as_oserror(path):
        mine = paths.create(path, _stamped(owner)) or _take_over(path, owner)
    renewal = threading.Thread(target=_renew, args=(path, owner, ended), daemon=True)
    if mine:
        renewal.start()
    try:
        yield mine
    finally:
        ended.set()
        if mine:
            renewal.join()


def _take_over(path: UPath, owner: bytes) -> bool:
    """Of several runs that find the lease expired, the one that holds a second lock takes it over."""
    if not _expired(path):
        return False
    with try_lock(path.with_name(f"{path.name}.lock")) as alone:
        if mine := alone and _expired(path):
            path.fs.pipe_file(path.path, _stamped(owner))
    return mine


def _renew(path: UPath, owner: bytes, ended: threading.Event) -> None:
    while not ended.wait(RENEWAL):
        with contextlib.suppress(Exception):  # tried again at the next renewal
            if not _content(path).startswith(owner):  # this run was stopped for too long
                return
            path.fs.pipe_file(path.path, _stamped(owner))
    _remove(path, owner)


def _expired(path: UPath) -> bool:
    try:
        ours, *_, renewed = _content(path).split()
        return ours == _OURS and time.time() - int(renewed) > EXPIRY
    except ValueError:  # not a lock, or just removed
        return False


def _remove(path: AnyPath, owner: bytes) -> None:
    """Remove a lock of that owner, or of none where its name could not be written; others take over what stays."""
    with contextlib.suppress(Exception):
        if owner.startswith(_content(path)[: len(owner)]):
            path.unlink() if isinstance(path, Path) else paths.remove(path)


def _content(path: AnyPath) -> bytes:
    with contextlib.suppress(FileNotFoundError):
        return path.read_bytes() if isinstance(path, Path) else bytes(path.fs.cat_file(path.path))
    return b""
