"""Readable names that no two runs share.

All files of one video share a stem: `<stem>.mp4`, `<stem>.json`, `<stem>.latents.safetensors`. The stem is held from
before the first of them is written until the last, so that two runs at once, or a batch, never mix their files.
"""

import contextlib
import os
import unicodedata
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path

from maxdiffusion.errors import UserError
from maxdiffusion.runtime import paths
from maxdiffusion.runtime.atomic import claim, explain
from maxdiffusion.runtime.paths import AnyPath

RECORD, LATENTS = ".json", ".latents.safetensors"  # beside a video


def sibling(stem: AnyPath, suffix: str) -> AnyPath:
    """`out/name` and `.json` -> `out/name.json` (`Path.with_suffix` would cut a name that has a dot)."""
    return stem.with_name(stem.name + suffix)


@contextlib.contextmanager
def reserve(folder: AnyPath, stem: str) -> Iterator[AnyPath]:
    """Hold `folder/stem` for one video, or `stem-2`, `stem-3`, ... where a file of that stem exists or a run holds it.

    Yields the path without suffix (see `sibling`). Makes the folder. Nothing is left of the reservation afterwards, and
    that of a killed run hinders no later run.

    Raises UserError where the folder cannot be written.
    """
    with contextlib.ExitStack() as hold:
        try:
            paths.make_folder(folder)
            path = next(path for number in count(1) if (path := _try(folder, stem, number, hold)))
        except OSError as error:
            raise explain(folder, error) from error
        yield path


def _try(folder: AnyPath, stem: str, number: int, hold: contextlib.ExitStack) -> AnyPath | None:
    path = folder / (stem if number == 1 else f"{stem}-{number}")
    with contextlib.ExitStack() as attempt:
        # Looked at while held: what another run wrote under its hold is visible by now.
        if attempt.enter_context(claim(_hold_of(path))) is None or _taken(path):
            return None
        hold.enter_context(attempt.pop_all())
    return path


def _taken(path: AnyPath) -> bool:
    name = _alike(path.name)
    return any(other == name or other.startswith(f"{name}.") for other in map(_alike, paths.names(path.parent)))


def _alike(name: str) -> str:
    """Names that some file system takes for one: case (macOS, FAT) and composed letters (macOS)."""
    return unicodedata.normalize("NFC", name).casefold()


def _hold_of(path: AnyPath) -> AnyPath:
    return path.with_name(f".{path.name}.lock")


@contextlib.contextmanager
def reserve_file(final: AnyPath, suffixes: Sequence[str], overwrite: bool = False) -> Iterator[AnyPath]:
    """Hold the stem of a file that the user named to the letter, and yield that stem.

    `suffixes` are all that will be written: the file's own first ("" for a folder), then those of its siblings.

    Raises UserError where one of these exists and `overwrite` is false, where `final` has another suffix, where another
    run holds the stem, and where the folder cannot be written.
    """
    own = suffixes[0]
    if not final.name.lower().endswith(own) or len(final.name) == len(own):
        raise UserError(f"save_file={final} does not end in {own}; name it {sibling(final, own)} or set output_format")
    stem = final.with_name(final.name[: len(final.name) - len(own)])
    with contextlib.ExitStack() as hold:
        try:
            paths.make_folder(final.parent)
            held = hold.enter_context(claim(_hold_of(stem)))
        except OSError as error:
            raise explain(final, error) from error
        if held is None:
            raise UserError(
                f"another run is making {final} at this moment; choose another name or wait"
                + ("" if isinstance(final, Path) else f", or delete {_hold_of(stem)} if that run was killed")
            )
        for path in (final, *(sibling(stem, suffix) for suffix in suffixes[1:])):
            if not overwrite and (os.path.lexists(path) if isinstance(path, Path) else path.exists()):
                raise UserError(f"{path} exists already; choose another save_file or say overwrite=true")
        yield stem
