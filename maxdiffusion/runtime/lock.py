"""Locks: a small file that says which run uses a name, made exclusively and removed at the end.

The file of a killed run is taken over. A local file is held by flock as long as its owner runs, on network file
systems by their server's locks; process numbers could not tell, because containers share host names but not processes.
An object in a store is renewed by its owner, and free when it has not been renewed for EXPIRY seconds, or at once where
its owner was a process of this machine.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
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

log = logging.getLogger(__name__)

RENEWAL, EXPIRY = 15.0, 90.0  # seconds; the clocks of two hosts must not differ by more than the rest
_OURS = b"maxdiffusion"


def try_lock(path: AnyPath, run: str = "") -> AbstractContextManager[bool]:
    """Hold the lock file `path` until the block ends, then remove it; False if another holds it. Makes its folder.

    A live run's or thread's file, a link, a folder, and a file of other content count as held and stay as they are.
    `run` is an identity of this run, for `lock_of_living`.

    Raises:
      OSError: the file cannot be made.
    """
    paths.make_folder(path.parent)
    return _locked(path, _owner(run)) if isinstance(path, Path) else _leased(path, _owner(run))


@contextlib.contextmanager
def lock_of_living(path: AnyPath, run: str) -> Iterator[bool]:
    """As `try_lock`, but an object that an earlier process of the same `run` has left in a store is waited for.

    It is free once it was not renewed for EXPIRY seconds; one that is renewed has a living owner: False.
    """
    with contextlib.ExitStack() as stack:
        mine = stack.enter_context(try_lock(path, run))
        found = b"" if mine or isinstance(path, Path) else _content(path)
        if found.split()[_RUN : _RUN + 1] == [run.encode()] and _lives(found) is None:
            log.info("waiting at most %.0f s for %s, which another process of this run has left or holds", EXPIRY, path)
            deadline = time.monotonic() + EXPIRY + RENEWAL
            while not mine and _content(path) in (found, b"") and time.monotonic() < deadline:
                time.sleep(1)
                mine = stack.enter_context(try_lock(path, run))
        yield mine


def leave(path: AnyPath) -> None:
    """Let a lock file that this run holds stay when its block ends, free for the next run."""
    content = b"%s left 0\n" % _OURS
    path.write_bytes(content) if isinstance(path, Path) else path.fs.pipe_file(path.path, content)


def owner_died(path: Path) -> bool:
    """Whether a lock file here is that of a killed run; false where this cannot be told, as of a new, empty one."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return os.pread(descriptor, len(_OURS), 0) == _OURS
        finally:
            os.close(descriptor)
    return False


_PROCESS, _RUN = 2, 4  # places in a lock's words: its owner, and the identity of its run


def _owner(run: str) -> bytes:
    words = (_OURS.decode(), socket.gethostname(), _process(os.getpid()), secrets.token_hex(4), run or "-")
    return " ".join(words).encode()


def _process(number: int) -> str:
    """A process's number, start and, as a digest, boot and namespace of its machine; the number alone if it is no more.

    Start and boot part it from others of that number, the namespace from those of other containers.
    """
    try:
        start = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[19]
        machine = Path("/proc/sys/kernel/random/boot_id").read_text() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return str(number)
    return f"{number}/{start}/{hashlib.sha256(machine.encode()).hexdigest()[:16]}"


def _lives(lock: bytes) -> bool | None:
    """Whether a lock's owner lives; None where it is not a process of this machine."""
    owner = lock.split()[_PROCESS].decode()
    number, _, more = owner.partition("/")
    machine = more.partition("/")[2]
    if not machine or machine != _process(os.getpid()).rpartition("/")[2]:
        return None
    return _process(int(number)) == owner


def _stamped(owner: bytes) -> bytes:
    return b"%s %d\n" % (owner, time.time())


@contextlib.contextmanager
def _locked(path: Path, owner: bytes) -> Iterator[bool]:
    mine = False
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
def _leased(path: UPath, owner: bytes) -> Iterator[bool]:
    ended = threading.Event()
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
    content = _content(path)
    try:
        ours, *_, renewed = content.split()
        return ours == _OURS and (time.time() - int(renewed) > EXPIRY or _lives(content) is False)
    except (ValueError, LookupError):  # not a lock, or just removed
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
