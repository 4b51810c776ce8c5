"""Names of results that no two runs share.

All files of one video share a stem: `<stem>.mp4`, `<stem>.json`, `<stem>.latents.safetensors`, `<stem>.sheet.jpg`. The
lock file `.<stem>.lock` reserves the stem from before the first of them is written until after the last, so that two
runs at once, or the videos of a batch, never mix their files.
"""

import contextlib
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from pathlib import Path

from maxdiffusion.errors import UserError
from maxdiffusion.request.videos import ENDINGS
from maxdiffusion.runtime import paths
from maxdiffusion.runtime.atomic import explained
from maxdiffusion.runtime.lock import lock_of_living
from maxdiffusion.runtime.paths import AnyPath

RECORD, LATENTS, SHEET = ENDINGS


@contextlib.contextmanager
def removed_if_empty(folder: AnyPath) -> Iterator[None]:
    """Remove after the block what it has made of a folder here and of its parents, if it is empty."""
    new = [path for path in (folder, *folder.parents) if not path.exists()] if isinstance(folder, Path) else []
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # the first that holds something ends it
            for path in new:
                path.rmdir()


def sibling(stem: AnyPath, suffix: str) -> AnyPath:
    """`out/name` and `.json` -> `out/name.json` (`Path.with_suffix` would cut a name that has a dot)."""
    return stem.with_name(stem.name + suffix)


@contextlib.contextmanager
def reserve(
    folder: AnyPath, stem: str, ours: Callable[[AnyPath], bool] = lambda path: False, run: str = ""
) -> Iterator[AnyPath]:
    """Reserve `folder/stem` for one video, or `stem-2`, `stem-3`, ... where it has files or another run reserved it.

    Yields the path without suffix (see `sibling`); `ours` tells the files that this run goes on from, `run` is its
    identity. Makes the folder. The reservation ends with the block; that of a killed run is taken over.

    Raises:
      UserError: the folder cannot be written.
    """
    with contextlib.ExitStack() as reservation:
        with explained(folder):
            for number in count(1):
                path = folder / (stem if number == 1 else f"{stem}-{number}")
                with contextlib.ExitStack() as attempt:
                    # Listed while locked: all that another run wrote under this lock is visible by now.
                    if attempt.enter_context(lock_of_living(lock_of(path), run)) and not _has_files(path, ours):
                        reservation.push(attempt.pop_all())
                        break
        yield path


def _exists(path: AnyPath) -> bool:
    if not isinstance(path, Path):
        return path.exists()
    try:
        path.lstat()
    except FileNotFoundError:
        return False
    return True


def _has_files(stem: AnyPath, ours: Callable[[AnyPath], bool]) -> bool:
    name = _normalised(stem.name)
    return any(
        (_normalised(other) == name or _normalised(other).startswith(f"{name}.")) and not ours(stem.with_name(other))
        for other in paths.names(stem.parent)
    )


def _normalised(name: str) -> str:
    """Folds differences that some file systems ignore: case (macOS, FAT) and composed letters (macOS)."""
    return unicodedata.normalize("NFC", name).casefold()


def lock_of(path: AnyPath) -> AnyPath:
    """The lock file of a stem or file."""
    return path.with_name(f".{path.name}.lock")


@contextlib.contextmanager
def reserve_file(
    final: AnyPath,
    suffixes: Sequence[str],
    overwrite: bool = False,
    ours: Callable[[AnyPath], bool] = lambda path: False,
    run: str = "",
) -> Iterator[AnyPath]:
    """Reserve the stem of a file that the user named, and yield that stem.

    `suffixes` are those of all files that will be written: of `final` itself first, in any case ("" for a folder), then
    of those beside it; `ours` tells the files that this run goes on from, `run` is its identity.

    Raises:
      UserError: one of these files exists and `overwrite` is false, `final` has another suffix, another run reserved
        the stem, or the folder cannot be written.
    """
    own = suffixes[0]
    if not final.name.lower().endswith(own.lower()) or len(final.name) == len(own):
        raise UserError(f"save_file={final} does not end in {own}; name it {sibling(final, own)} or set output_format")
    stem = final.with_name(final.name[: len(final.name) - len(own)])
    with contextlib.ExitStack() as reservation:
        with explained(final):
            free = reservation.enter_context(lock_of_living(lock_of(stem), run))
        if not free:
            raise UserError(
                f"another run is making {final} at this moment; choose another name or wait, or delete {lock_of(stem)} "
                "if that run was killed"
            )
        for path in (final, *(sibling(stem, suffix) for suffix in suffixes[1:])):
            with explained(path):  # such as a name that is too long
                exists = _exists(path)
            if exists and not overwrite and not ours(path):
                raise UserError(f"{path} exists already; choose another save_file or say overwrite=true")
            if exists and path.is_dir() and (own or path != final):
                raise UserError(f"{path} is a folder, which no file replaces; choose another name or move the folder")
        yield stem
