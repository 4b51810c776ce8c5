"""The stages of a run, each timed and shown."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from maxdiffusion.runtime import distributed, progress
from maxdiffusion.runtime.timing import Clock


class Stages:
    """`with stages("denoise", total=50) as advance: ...; advance(1)`: a phase of the clock and a progress bar."""

    def __init__(self, mode: str) -> None:
        """`mode` is the config key `progress`: auto, on or off."""
        self.clock = Clock()
        self._show = progress.make("off" if distributed.index() else mode)  # process 0 shows it for all

    @contextlib.contextmanager
    def __call__(self, name: str, total: int | None = None, unit: str = "steps") -> Iterator[progress.Advance]:
        with self.clock.phase(name), self._show(name, total, unit) as advance:
            yield advance
