"""The stages of a run, each timed and shown."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from maxdiffusion.runtime import distributed, memory, progress
from maxdiffusion.runtime.timing import Clock


class Stages:
    """`with stages("denoise", total=50) as advance: ...; advance(1)`: a phase of the clock and a progress bar.

    `expect(denoise=100)` tells how much the whole run has of a stage, so that progress can say when the run is done.
    """

    def __init__(self, mode: str) -> None:
        """`mode` is the config key `progress`: auto, on or off."""
        self.clock = Clock()
        self._outlook = progress.Outlook()
        self.expect = self._outlook.expect
        self._show = progress.make("off" if distributed.index() else mode)  # process 0 shows it for all

    @contextlib.contextmanager
    def __call__(
        self, name: str, total: int | None = None, unit: str = "steps", what: str = ""
    ) -> Iterator[progress.Advance]:
        """`what` is shown after the name; the clock counts all of one name together.

        Raises:
          OutOfMemory: the device's memory does not suffice.
        """
        label = f"{name} {what}".rstrip()
        with (
            self.clock.phase(name),
            memory.explained(label),
            self._outlook.stage(name) as count,
            self._show(label, total, unit, self._outlook.text) as show,
        ):

            def advance(number: int) -> None:
                count(number)
                show(number)

            yield advance
