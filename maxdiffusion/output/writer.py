"""A video's file that takes the frames as they are decoded: a thread encodes them while the next ones are made."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from maxdiffusion.media import drift
from maxdiffusion.media.write import Frames
from maxdiffusion.runtime.feed import feeding


class Writer:
    """Within its block, takes the frames of a video in chunks.

    Attributes:
      sheet: those of its contact sheet, once they have been written.
    """

    def __init__(
        self,
        file: AbstractContextManager[Callable[[Iterator[Frames]], None]],
        sheet: Collection[int],
        clips: Sequence[range],
    ) -> None:
        """`file` is a `media.write.writing`; `sheet` and `clips` are the numbers of frames."""
        self.sheet: list[np.ndarray] = []
        self._file, self._numbers, self._clips = file, sheet, clips
        self._looks: list[list[drift.Look]] = [[] for _ in clips]
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Writer:
        encode = self._stack.enter_context(self._file)

        def consume(chunks: Iterator[Frames]) -> None:
            encode(self._seen(chunks))

        self._put = self._stack.enter_context(feeding(consume))
        return self

    def __exit__(self, *exception: Any) -> bool | None:
        return self._stack.__exit__(*exception)

    def add(self, chunk: Frames) -> None:
        """Takes the next frames; an error of earlier ones is raised by `finish`."""
        self._put(chunk)

    def finish(self) -> None:
        """Waits until the file is whole and has its name.

        Raises:
          UserError: it could not be written; see `media.write.writing`.
        """
        self._stack.close()

    @property
    def looks(self) -> list[drift.Look]:
        """The look of each clip of the finished video."""
        return [drift.mean(each) for each in self._looks]

    def _seen(self, chunks: Iterator[Frames]) -> Iterator[Frames]:
        numbers = itertools.count()
        for chunk in chunks:
            for frame, number in zip(chunk, numbers, strict=False):
                if number in self._numbers:
                    self.sheet.append(frame.copy())
                for clip, looks in zip(self._clips, self._looks, strict=True):
                    if number in clip:
                        looks.append(drift.look_of_frame(frame))
            yield chunk
