"""Values of a plan, which its cache and its reports hold. Imports no jax."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

from maxdiffusion.hardware.chips import Slice
from maxdiffusion.request.cost import Figures, Layout, Run, Seconds

Words = tuple[str, ...]  # key=value arguments of a command line


@dataclasses.dataclass(frozen=True)
class Target:
    """The devices of a plan.

    Attributes:
      slice: of TPUs; None is this machine's own devices.
      platform: as jax calls it.
      kind: `device_kind`.
      devices: how many.
      gib: memory of one that a program may use.
    """

    slice: Slice | None
    platform: str
    kind: str
    devices: int
    gib: float

    @property
    def chips(self) -> int:
        """Number of chips rented."""
        return self.slice.chips if self.slice else self.devices

    def __str__(self) -> str:
        if self.slice:
            return f"{self.slice.topology} ({self.devices} devices of {self.gib:g} GiB on {self.chips} chips)"
        return f"this machine ({self.devices} x {self.kind}, {self.gib:.1f} GiB each)"


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of a run on one split.

    Attributes:
      source: of its figures: the compiler, or the arithmetic of `request.cost`.
      programs: what it runs.
      fits: whether each device's memory holds it.
      fault: why compiled figures are incomplete, as a sentence.
    """

    source: Literal["compiled", "modelled"]
    programs: tuple[Figures, ...]
    fits: bool
    fault: str = ""

    @property
    def gib(self) -> float:
        """GiB per device at the peak of the largest program."""
        return max((program.gib for program in self.programs), default=0.0)

    @property
    def seconds(self) -> Seconds:
        """Seconds of all calls."""
        return sum((program.seconds * program.times for program in self.programs), Seconds())


@dataclasses.dataclass(frozen=True)
class Row:
    """A legal split of a run over the devices, with its figures.

    Attributes:
      overrides: the arguments that select it.
      split: its degrees as text.
      holders: devices over which one copy of the weights is spread, without those of the tensor axis.
      steps: denoise steps of the whole run, of a cache whose steps are known those that are computed.
      stages: `text` (all conditioning), `denoise` and `decode`.
    """

    overrides: Words
    split: str
    holders: int
    steps: int
    stages: dict[str, Stage]

    @property
    def fits(self) -> bool:
        return all(stage.fits for stage in self.stages.values())

    @property
    def seconds(self) -> Seconds:
        """Seconds of the whole run."""
        return sum((stage.seconds for stage in self.stages.values()), Seconds())

    @property
    def step(self) -> Seconds:
        """Seconds of one denoise step, a mean."""
        steps = (each for each in self.stages["denoise"].programs if each.name == "step")
        return sum((each.seconds * each.times for each in steps), Seconds()) * (1 / self.steps)

    @property
    def peak(self) -> str:
        """The stage that needs most memory."""
        return max(self.stages, key=lambda name: self.stages[name].gib)

    @property
    def gib(self) -> float:
        """GiB per device at the peak of the run."""
        return self.stages[self.peak].gib

    @property
    def weights(self) -> str:
        """The placement of the transformer's weights."""
        return "whole" if self.holders == 1 else f"over {self.holders}"

    @property
    def source(self) -> str:
        """Source of the least certain stage."""
        return "compiled" if all(stage.source == "compiled" for stage in self.stages.values()) else "modelled"

    @property
    def rank(self) -> tuple[bool, bool, float]:
        """Sorts rows that fit first, then those compiled as a whole, then the fastest."""
        return not self.fits, self.source == "modelled", self.seconds.total


def modelled(run: Run, layouts: Mapping[Words, Layout], gib: float) -> dict[Words, Row]:
    """The row of each split by arithmetic, on devices with `gib` of memory."""
    rows = {}
    for words, layout in layouts.items():
        stages = {name: Stage("modelled", (each,), each.gib <= gib) for name, each in run.stages(layout).items()}
        rows[words] = Row(words, layout.name, layout.holders, run.steps * run.units(layout), stages)
    return rows


@dataclasses.dataclass(frozen=True)
class Refused:
    """A split that a run would refuse, and the reason as a sentence."""

    split: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Change:
    """Arguments with which the run would fit, and the GiB per device that it would need, by arithmetic."""

    words: Words
    gib: float


@dataclasses.dataclass(frozen=True)
class Plan:
    """A whole plan.

    Attributes:
      command: the arguments before the overrides: the config file and given keys.
      run: the run as text.
      target: the devices as text.
      chips: number of chips rented.
      gib: memory of one device that a program may use.
      rows: the legal splits by `Row.rank`.
      refused: the illegal ones.
      changes: where nothing fits.
      notes: caveats of the figures, as sentences.
    """

    command: Words
    run: str
    target: str
    chips: int
    gib: float
    rows: tuple[Row, ...]
    refused: tuple[Refused, ...] = ()
    changes: tuple[Change, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def best(self) -> Row | None:
        """The fastest split that fits."""
        return next((row for row in self.rows if row.fits), None)
