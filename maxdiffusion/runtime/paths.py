"""Files on this machine and in object stores behind one interface, pathlib's: gs://, s3://, all that fsspec reads."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import fsspec
from upath import UPath

from maxdiffusion.errors import UserError

AnyPath = Path | UPath  # on this machine | elsewhere

T = TypeVar("T")
R = TypeVar("R")

_EXTRAS = {"gs": "gcs", "gcs": "gcs"}
# Stores whose objects have their name only once the upload is complete, and can be created exclusively.
_WHOLE_OR_ABSENT = {"gs", "gcs", "s3", "s3a"}
_AHEAD = 8  # requests at once: one stream of an object store gives about 100 MB/s, whatever the host's link


def parse(text: str) -> AnyPath:
    """The path that `text` names; SCHEME://... is a UPath, except for file://.

    Raises:
      UserError: the scheme is unknown, or the package that reads it is not installed.
    """
    scheme, separator, rest = text.partition("://")
    if not separator:
        return Path(text)
    if scheme in ("file", "local"):
        return Path(rest)
    try:
        fsspec.get_filesystem_class(scheme)
    except ValueError:
        raise UserError(f"{text} has an unknown scheme; give gs://..., s3://... or a local path.") from None
    except ImportError as error:
        what = f"pip install 'maxdiffusion[{_EXTRAS[scheme]}]'" if scheme in _EXTRAS else str(error)
        raise UserError(f"{text} needs a package that is not installed: {what}") from None
    return UPath(text)


def is_url(text: str) -> bool:
    """Whether it is an http or https URL; the scheme may be in capitals."""
    return text.lower().startswith(("http://", "https://"))


def check_file(path: AnyPath, what: str) -> None:
    """Checks that a path which exists is a file or a folder: reading a pipe or a device may never end.

    Raises:
      UserError: it is neither; the message begins with `what`.
    """
    if isinstance(path, Path) and path.exists() and not (path.is_file() or path.is_dir()):
        raise UserError(f"{what} is neither a file nor a folder but a pipe or a device; write its content to a file.")


def expanded(text: str, what: str) -> str:
    """A path with its ~ and $VARIABLES replaced; an http(s) URL, and the path of a file whose name has a $, as it is.

    Raises:
      UserError: it has a NUL character or a variable that is not set, or the operating system refuses it. The message
        begins with `what`.
    """
    if is_url(text):
        return text
    path = os.path.expanduser(text)
    if not os.path.lexists(path):
        path = os.path.expanduser(os.path.expandvars(text))
    if "\0" in path:
        raise UserError(f"{what} contains a NUL character, which no path can; remove it.")
    if (unset := re.search(r"\$(\w+|\{\w+\})", path)) and not os.path.lexists(path):
        raise UserError(f"{what} is {text} and uses {unset[0]}, which is not set in the environment; set it first.")
    try:
        if "://" not in path:
            Path(path).exists()
    except OSError as error:  # a folder that is closed, a name that is too long
        raise UserError(
            f"{what} is {path:.80}, which cannot be written or read ({error.strerror}); give another path."
        ) from None
    return path


def probe(text: str) -> AnyPath:
    """Parse `text` as `parse` does, and ask a store for it, to report one that does not answer.

    Raises:
      UserError: as `parse`, or the network, credentials or permission are missing.
    """
    path = parse(text)
    if not isinstance(path, Path):
        try:
            with as_oserror(path):
                path.exists()
        except OSError as error:
            raise UserError(
                f"{text} cannot be reached ({error.strerror or error}); check the name, the network and your "
                "credentials."
            ) from None
    return path


@contextlib.contextmanager
def as_oserror(path: AnyPath) -> Iterator[None]:
    """Raise the exceptions of a store's library (HTTP errors, missing credentials) as OSError, as local files do."""
    try:
        yield
    except (OSError, UserError):
        raise
    except Exception as error:
        if isinstance(path, Path):
            raise
        raise OSError(errno.EIO, " ".join(str(error).split()) or type(error).__name__) from error


def names(folder: AnyPath) -> list[str]:
    """The names of all files and folders in a folder; none where it does not exist."""
    if not isinstance(folder, Path):
        folder.fs.invalidate_cache(folder.path)
    try:
        return [entry.name for entry in folder.iterdir()]
    except (FileNotFoundError, NotADirectoryError):  # which of them depends on the store
        return []


@contextlib.contextmanager
def local(folder: AnyPath) -> Iterator[Path]:
    """A local folder for libraries that read nothing else: `folder` itself, or a copy until the block ends."""
    if isinstance(folder, Path):
        yield folder
        return
    with tempfile.TemporaryDirectory() as copy:
        with as_oserror(folder):
            for name in names(folder):
                folder.fs.get_file((folder / name).path, f"{copy}/{name}")
        yield Path(copy)


def read(path: AnyPath, start: int, stop: int) -> bytes:
    """The bytes `start` to `stop` of a file, fewer where it ends before `stop`.

    Raises:
      OSError: it cannot be read.
    """
    with as_oserror(path):
        if not isinstance(path, Path):
            return bytes(path.fs.cat_file(path.path, start, stop))
        with path.open("rb") as file:
            file.seek(start)
            return file.read(stop - start)


def each(path: AnyPath, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """`map` for a function that reads `path`: one at a time, or ahead where each read waits for a round trip."""
    return map(function, items) if isinstance(path, Path) else ahead(function, items)


def ahead(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """`map` in threads, in order, at most _AHEAD results before their use."""
    with ThreadPoolExecutor(_AHEAD) as pool:
        waiting: deque[Future[R]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) == _AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


# ---- writing


def make_folder(folder: AnyPath) -> None:
    """Make a folder and its parents; nothing in an object store, where fsspec would create a bucket."""
    if isinstance(folder, Path):
        folder.mkdir(parents=True, exist_ok=True)
    elif folder.protocol not in _WHOLE_OR_ABSENT:
        with as_oserror(folder):
            folder.fs.makedirs(folder.path, exist_ok=True)


def create(path: UPath, content: bytes) -> bool:
    """Write a new file; false where it exists already."""
    try:
        path.fs.pipe_file(path.path, content, mode="create")
    except FileExistsError:
        return False
    return True


def upload(source: Path, final: UPath, overwrite: bool) -> None:
    """Copy a local file to `final`, which has its name only once it is whole.

    Raises:
      FileExistsError: `final` exists and `overwrite` is false.
      OSError: the store refuses.
    """
    with as_oserror(final):
        if final.protocol in _WHOLE_OR_ABSENT:
            final.fs.put_file(str(source), final.path, mode="overwrite" if overwrite else "create")
            return
        make_folder(final.parent)
        part = final.with_name(f".{secrets.token_hex(4)}.part")
        try:
            final.fs.put_file(str(source), part.path)
            if not overwrite and final.exists():
                raise FileExistsError
            final.fs.mv(part.path, final.path)
        finally:
            remove(part)


def remove(path: UPath) -> None:
    """Remove a file if it exists."""
    with contextlib.suppress(FileNotFoundError):
        path.fs.rm_file(path.path)


def check_writable(folder: AnyPath) -> None:
    """Write an empty file in `folder` and remove it; a local folder must exist, another is made.

    Raises:
      OSError: it cannot be written.
    """
    if isinstance(folder, Path):
        with tempfile.TemporaryFile(dir=folder):
            return
    probe = folder / f".{secrets.token_hex(8)}.probe"
    with as_oserror(folder):
        make_folder(folder)
        create(probe, b"")
        remove(probe)
