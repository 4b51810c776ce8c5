"""The frames of a folder of pictures, written while they are decoded, so that a decode that was stopped goes on."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from maxdiffusion.media.write import check_replaceable, write_frame
from maxdiffusion.runtime.atomic import atomic_path, explained


class Frames:
    """The frames of one video in `.<stem>.<digest>.frames/`, which becomes the result once all are there.

    Attributes:
      there: those that an earlier run has written, up to the first that is absent or damaged.
      count: the number of frames written, by this run or before.
    """

    def __init__(
        self, stem: Path, latents: Float[np.ndarray, "f h w c"], identity: str, metadata: Mapping[str, str]
    ) -> None:
        """The digest is that of `latents` and `identity`: frames of other latents are never taken for these."""
        digest = hashlib.sha256(identity.encode() + np.ascontiguousarray(latents).tobytes()).hexdigest()[:16]
        self._folder = stem.with_name(f".{stem.name}.{digest}.frames")
        self._metadata = metadata
        self.there = list(self._read())
        self.count = len(self.there)

    def _read(self) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
        for number in itertools.count():
            try:
                with Image.open(self._path(number), formats=["PNG"]) as image:
                    yield np.asarray(image)
            except (OSError, SyntaxError):  # Pillow's error for a damaged PNG
                return

    def add(self, first: int, frames: UInt8[np.ndarray, "f h w 3"]) -> None:
        """Writes the frames `first`, `first` + 1, ..., each whole or not at all.

        Raises:
          UserError: the disk is full or the folder cannot be written.
        """
        with explained(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            for number, frame in enumerate(frames, first):
                part = self._folder / "part"
                write_frame(frame, part, {} if number else self._metadata)
                os.replace(part, self._path(number))
                self.count = number + 1

    @contextlib.contextmanager
    def writing(
        self, final: Path, overwrite: bool
    ) -> Iterator[Callable[[Iterator[UInt8[np.ndarray, "f h w 3"]]], None]]:
        """Give the function that writes those frames of the video that are not `there`; publish them after the block.

        Raises:
          UserError: see `add` and `publish`.
        """
        yield self._write
        self.publish(final, overwrite)

    def _write(self, chunks: Iterator[UInt8[np.ndarray, "f h w 3"]]) -> None:
        at = 0
        for chunk in chunks:
            new = max(len(self.there) - at, 0)
            self.add(at + new, chunk[new:])
            at += len(chunk)

    def publish(self, final: Path, overwrite: bool) -> None:
        """Makes the folder the result.

        Raises:
          UserError: `final` exists and `overwrite` is false, holds other files than frames, or cannot be written.
        """
        if overwrite and final.is_dir():
            check_replaceable(final)
        with atomic_path(final, overwrite) as temporary:
            os.rename(self._folder, temporary)

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:04d}.png"
