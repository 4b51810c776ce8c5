"""Files that are whole under their own name, or absent.

The writer works in a private folder `.NAME.part/` beside the target, so that the last step is a rename within one file
system. The folder is held by an flock for as long as its process lives: a second writer of the same name is refused,
and what a killed process left behind is recognised (nobody holds it) and cleared by the next writer of that name. POSIX
only. Elsewhere (`paths`) the file is made here and uploaded; a name is held by an empty object, which a killed process
leaves behind.
"""

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from maxdiffusion.errors import UserError
from maxdiffusion.runtime import paths
from maxdiffusion.runtime.paths import AnyPath

# File systems that cannot lock (some network mounts): the mkdir alone then decides who holds the folder.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}
# File systems that cannot link (exFAT, some network mounts).
_NO_LINKS = {errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK}
# What a writer in the body can meet that the user can mend.
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
        errno.ENAMETOOLONG: "the name is too long for the file system; choose a shorter one",
        errno.EFBIG: "the file would be larger than the file system or the process limit allows",
    }.get(error.errno or 0, error.strerror or str(error))
    return UserError(f"cannot write {path}: {reason}")


@contextlib.contextmanager
def claim(folder: AnyPath) -> Iterator[AnyPath | None]:
    """Hold `folder` (new and empty; what a dead process left in it is removed) until the block ends, then remove it.

    Yields None where another live process or thread holds it. Raises OSError where it cannot be made.
    """
    if not isinstance(folder, Path):
        with paths.as_oserror(folder):
            held = paths.create(folder)
        try:
            yield folder if held else None
        finally:
            if held:
                paths.remove(folder)
        return
    descriptor = _lock(folder)
    if descriptor is None:
        yield None
        return
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def _lock(folder: Path) -> int | None:
    while True:
        try:
            folder.mkdir()
            fresh = True
        except FileExistsError:
            fresh = False
        try:
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:  # its holder finished between the two calls
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if fresh and error.errno in _NO_LOCKS:
                return descriptor
            os.close(descriptor)
            if isinstance(error, BlockingIOError) or error.errno in _NO_LOCKS:
                return None
            raise
        if not _same(descriptor, folder):  # locked what its holder had just removed
            os.close(descriptor)
            continue
        for entry in () if fresh else list(folder.iterdir()):
            remove(entry)
        return descriptor


def _same(descriptor: int, folder: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), folder.stat())
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def atomic_path(final: AnyPath, overwrite: bool = False) -> Iterator[Path]:
    """Yield a local path to write a file or a folder to (same suffix); after the block it becomes `final`.

    The content is on disk (fsync) before it gets its name. If the block raises, nothing is left. Missing parent folders
    are made. Files that a helper process needs may be put beside the yielded path; they are removed at the end.

    Raises UserError where `final` exists and `overwrite` is false (decided by the final link itself: of two writers one
    wins, the other is told), where another process is writing it now, and for a full disk or a refusal of the operating
    system.
    """
    if not isinstance(final, Path):
        with tempfile.TemporaryDirectory() as here:
            made = Path(here) / final.name
            with _explained(made):
                yield made
            try:
                with paths.as_oserror(final):
                    paths.upload(made, final, overwrite)
            except FileExistsError:
                raise _exists(final) from None
            except OSError as error:
                raise explain(final, error) from error
        return
    if not overwrite and os.path.lexists(final):
        raise _exists(final)
    with contextlib.ExitStack() as stack:
        try:
            final.parent.mkdir(parents=True, exist_ok=True)
            folder = stack.enter_context(claim(final.with_name(f".{final.name}.part")))
        except OSError as error:
            raise explain(final, error) from error
        if folder is None:
            raise UserError(
                f"{final} is being written by another run (it holds {final.parent / f'.{final.name}.part'}); "
                "choose another name or wait"
            )
        # A fresh name, so that an orphaned child of a killed run cannot write into a later run's file.
        temporary = final.with_name(folder.name) / (secrets.token_hex(4) + final.suffix)
        with _explained(final):
            yield temporary
        try:
            _sync(temporary)
            _publish(temporary, final, overwrite)
            _sync_one(final.parent)
        except OSError as error:
            raise explain(final, error) from error


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """What the body meets that the user can mend, in one sentence."""
    try:
        yield
    except OSError as error:
        if error.errno in _DISK:
            raise explain(path, error) from error
        raise


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with all it holds."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _exists(final: AnyPath) -> UserError:
    return UserError(f"{final} exists already; give another name or say overwrite=true")


def _publish(temporary: Path, final: Path, overwrite: bool) -> None:
    if overwrite:
        if final.is_dir() or (temporary.is_dir() and os.path.lexists(final)):  # a folder cannot be replaced in one step
            os.rename(final, temporary.with_name("replaced"))
        os.replace(temporary, final)
    elif temporary.is_dir():
        try:
            os.rename(temporary, final)  # refuses a folder that holds anything, and a file
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise _exists(final) from error
            raise
    else:
        try:
            os.link(temporary, final)
        except FileExistsError as error:
            raise _exists(final) from error
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            if os.path.lexists(final):
                raise _exists(final) from error
            os.rename(temporary, final)


def _sync(path: Path) -> None:
    if path.is_dir():
        for entry in path.iterdir():
            _sync(entry)
    _sync_one(path)


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):  # folders cannot be synced everywhere
            raise
    finally:
        os.close(descriptor)
