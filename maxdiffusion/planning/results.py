"""What a plan found, as values that go to a file and back. Imports no jax."""

from __future__ import annotations

import dataclasses
from typing import Literal

import pydantic

from maxdiffusion.request.cost import Layout, Run, Seconds

Source = Literal["compiled", "modelled"]  # by the compiler, or by `request.cost`


@dataclasses.dataclass(frozen=True)
class Program:
    """A program of a run.

    Attributes:
      name: as `programs.Lowered` has it.
      times: how often the run calls it.
      gib: per device at its peak, with what lies in memory beside it.
      seconds: of one call.
      compile_seconds: what compiling took.
    """

    name: str
    times: int
    gib: float
    seconds: Seconds
    compile_seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage of a run on one split.

    Attributes:
      source: of its figures.
      programs: what it runs.
      fits: whether each device's memory holds it.
      fault: why there are no compiled figures, as a sentence.
    """

    source: Source
    programs: tuple[Program, ...]
    fits: bool
    fault: str = ""

    @property
    def gib(self) -> float:
        """Per device, at the peak of the largest program."""
        return max((program.gib for program in self.programs), default=0.0)

    @property
    def seconds(self) -> Seconds:
        """Of all calls."""
        return sum((program.seconds * program.times for program in self.programs), Seconds())

    def of(self, name: str) -> Seconds:
        """Of all calls of the programs of one name."""
        return sum((each.seconds * each.times for each in self.programs if each.name == name), Seconds())

    def timed(self, modelled: Stage) -> Stage:
        """The same, of a compiler that counts no cycles, with the seconds of a modelled stage."""
        (model,) = modelled.programs
        calls = max(1, sum(each.times for each in self.programs if each.name == model.name))
        seconds = modelled.seconds * (1 / calls)
        programs = [
            dataclasses.replace(each, seconds=seconds) if each.name == model.name else each for each in self.programs
        ]
        return dataclasses.replace(self, programs=tuple(programs))


def modelled(run: Run, layout: Layout, gib: float) -> dict[str, Stage]:
    """The three stages by arithmetic, on devices of so much memory."""
    found = {
        "text": ("text", run.text(layout)),
        "denoise": ("step", run.step(layout)),
        "decode": ("decode", run.decode(layout)),
    }
    return {
        stage: Stage("modelled", (Program(name, *estimate),), estimate.gib <= gib)
        for stage, (name, estimate) in found.items()
    }


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a worker found.

    Attributes:
      stage: None where it is refused.
      refused: why the run is refused on this split.
      unkept: why what was compiled is not kept for the next plan; of what is kept empty.
    """

    stage: Stage | None = None
    refused: str = ""
    unkept: str = ""


@dataclasses.dataclass(frozen=True)
class Split:
    """How the devices share a run.

    Attributes:
      data: devices over the batch, which the guidance pair may take.
      fsdp: devices over the weights and the batch.
      context: devices over the video tokens.
      ring: of them, around which keys and values travel.
      ulysses: devices that trade sequence for heads.
      tensor: devices over heads and feed-forward width.
      sharded: whether weights are spread over the context axis, too.
      overrides: the key=value words that say so.
    """

    data: int
    fsdp: int
    context: int
    ring: int
    ulysses: int
    tensor: int
    sharded: bool
    overrides: tuple[str, ...]

    @property
    def name(self) -> str:
        degrees = {"data": self.data, "fsdp": self.fsdp, "tensor": self.tensor}
        over = [f"{axis} {degree}" for axis, degree in degrees.items() if degree > 1]
        if self.context != self.ring * self.ulysses:
            return " x ".join([*over, f"context {self.context}, keys gathered"])
        return " x ".join([*over, f"ring {self.ring}", f"ulysses {self.ulysses}"])

    @property
    def holders(self) -> int:
        """Devices over which one copy of the weights is spread, but for those of `tensor`."""
        return self.fsdp * (self.context if self.sharded else 1)


@dataclasses.dataclass(frozen=True)
class Row:
    """A legal split, the denoise steps of the whole run, and its three stages."""

    split: Split
    steps: int
    stages: dict[str, Stage]

    @property
    def fits(self) -> bool:
        return all(stage.fits for stage in self.stages.values())

    @property
    def seconds(self) -> Seconds:
        return sum((stage.seconds for stage in self.stages.values()), Seconds())

    @property
    def step(self) -> Seconds:
        """Of one denoise step."""
        return self.stages["denoise"].of("step") * (1 / self.steps)

    @property
    def compiled(self) -> bool:
        return all(stage.source == "compiled" for stage in self.stages.values())

    @property
    def peak(self) -> str:
        """The stage that needs most memory."""
        return max(self.stages, key=lambda name: self.stages[name].gib)


@dataclasses.dataclass(frozen=True)
class Refused:
    """A split that a run would refuse, and its sentence."""

    name: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Change:
    """Words with which the run would fit, and GiB that each device would then need, by arithmetic."""

    words: tuple[str, ...]
    gib: float


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that a plan found.

    Attributes:
      command: the words before the overrides: the config file and what was given.
      run: the run in words.
      target: the devices in words.
      chips: how many are rented.
      gib: memory that a program may use on one device.
      rows: the legal splits, those that fit first, then the fastest.
      refused: the illegal ones.
      changes: where nothing fits.
      notes: what one has to know of the figures, as sentences.
    """

    command: tuple[str, ...]
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


def to_json(plan: Plan) -> bytes:
    """As a file holds it."""
    return pydantic.TypeAdapter(Plan).dump_json(plan, indent=1)


def from_json(content: bytes) -> Plan:
    """The inverse of `to_json`.

    Raises:
      ValueError: it is no plan.
    """
    return pydantic.TypeAdapter(Plan).validate_json(content)
