"""Files that are whole under their own name, or absent.

A local file is written in a private folder `.XXXXXXXX.part/` beside its target, new for each writer, so that the last
step is a rename within one file system. Elsewhere (`paths`) it is written here and uploaded. A lock in the folder tells
that its writer lives; the folder of a killed one is removed by the next writer.
"""

import contextlib
import errno
import json
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from maxdiffusion.errors import UserError
from maxdiffusion.runtime import paths
from maxdiffusion.runtime.lock import owner_died, try_lock
from maxdiffusion.runtime.paths import AnyPath

# Seconds after the last change of a private folder after which its writer was killed, where its lock does not tell.
ABANDONED = 24 * 3600
_LOCK = "lock"
# File systems that cannot link (exFAT, some network mounts).
_NO_LINKS = {errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK}
# Errors of a writer in the body that the user can correct.
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG}


def explain(path: AnyPath, error: OSError) -> UserError:
    """The one sentence for an operating system's refusal to write `path`."""
    reason = {
        errno.ENOSPC: "the disk is full; free some space or choose another folder",
        errno.EDQUOT: "the disk quota is used up; free some space or choose another folder",
        errno.EACCES: "permission denied; choose a folder that you may write to",
        errno.EPERM: "permission denied; choose a folder that you may write to",
        errno.EROFS: "the file system is read-only; choose another folder",
        errno.ENOTDIR: "a part of its path is a file, not a folder; choose another folder",
        errno.EEXIST: "a part of its path is a file, not a folder; choose another folder",
        errno.EISDIR: "it is a folder, which no file replaces; choose another name or move the folder",
        errno.ENAMETOOLONG: "the name is too long for the file system; choose a shorter one",
        errno.EFBIG: "the file would be larger than the file system or the process limit allows",
    }.get(error.errno or 0, error.strerror or str(error))
    return UserError(f"cannot write {path}: {reason}")


@contextlib.contextmanager
def explained(path: AnyPath) -> Iterator[None]:
    """Raise the block's OSErrors, which must concern `path`, as UserErrors."""
    try:
        yield
    except OSError as error:
        raise explain(path, error) from error


@contextlib.contextmanager
def atomic_path(final: AnyPath, overwrite: bool = False) -> Iterator[Path]:
    """Yield a local path to write a file or a folder to (same suffix); after the block it becomes `final`.

    The content is on disk (fsync) before it gets its name. If the block raises, nothing is left. Missing parent folders
    are made. Of two writers with `overwrite` the last one wins.

    Raises:
      UserError: `final` exists and `overwrite` is false (the final link itself decides between two writers), the disk
        is full, or the operating system refuses.
    """
    with contextlib.ExitStack() as stack:
        with explained(final):
            here = None
            if isinstance(final, Path):
                here = final.parent
                here.mkdir(parents=True, exist_ok=True)
                with contextlib.suppress(FileNotFoundError):
                    os.lstat(final)  # raises where the name is too long
                    if not overwrite:
                        raise _exists(final)
            _remove_abandoned(here or Path(tempfile.gettempdir()))
            folder = tempfile.TemporaryDirectory(dir=here, prefix=".", suffix=".part", ignore_cleanup_errors=True)
            private = Path(stack.enter_context(folder))
            stack.enter_context(try_lock(private / _LOCK))
            temporary = private / f"new{final.suffix}"
        try:
            yield temporary
        except OSError as error:
            if error.errno not in _DISK:
                raise
            raise explain(temporary if here is None else final, error) from error
        with explained(final):
            try:
                if isinstance(final, Path):
                    _publish(temporary, final, overwrite)
                else:
                    paths.upload(temporary, final, overwrite)
            except FileExistsError as error:
                raise _exists(final) from error


def write_json(path: AnyPath, value: Any, overwrite: bool = False) -> None:
    """Write readable JSON, whole or not at all; bytes that are not UTF-8 (surrogates) are escaped.

    Raises:
      UserError: as `atomic_path`.
      TypeError, ValueError: JSON cannot hold `value`.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with atomic_path(path, overwrite) as temporary:
        temporary.write_bytes(text.encode("utf-8", "backslashreplace"))


def _exists(final: AnyPath) -> UserError:
    return UserError(f"{final} exists already; give another name or say overwrite=true")


def _remove_abandoned(folder: Path) -> None:
    for part in folder.glob(".????????.part"):
        with contextlib.suppress(OSError):  # its writer has finished meanwhile
            about = part.lstat()
            newest = max(entry.lstat().st_mtime for entry in (part, *part.iterdir()))
            ours = about.st_uid == os.geteuid() and stat.S_ISDIR(about.st_mode)
            if ours and (time.time() - newest > ABANDONED or owner_died(part / _LOCK)):
                shutil.rmtree(part)


def _publish(temporary: Path, final: Path, overwrite: bool) -> None:
    for path in (temporary, *temporary.rglob("*")):
        _sync(path)
    if overwrite:
        if final.is_dir() and not final.is_symlink() and not temporary.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if final.is_dir() or (temporary.is_dir() and os.path.lexists(final)):  # a folder cannot be replaced in one step
            os.rename(final, temporary.with_name("replaced"))
        os.replace(temporary, final)
    elif temporary.is_dir():
        try:
            os.rename(temporary, final)  # refuses a folder that holds anything, and a file
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.ENOTDIR):
                raise FileExistsError from error
            raise
    else:
        try:
            os.link(temporary, final)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            if os.path.lexists(final):
                raise FileExistsError from error
            os.rename(temporary, final)
    _sync(final.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):  # folders cannot be synced everywhere
            raise
    finally:
        os.close(descriptor)
