"""Which network denoises which steps, how strongly guided, and which of them are in memory at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np
from flax import nnx

from maxdiffusion.denoise.schedule import TRAIN_STEPS

T = TypeVar("T")


class Segment(NamedTuple):
    """Steps start .. stop - 1: the net that denoises them (its folder in the checkpoint) and their guidance scale."""

    start: int
    stop: int
    net: str = "transformer"
    guidance_scale: float = 1.0


@runtime_checkable
class Experts(Protocol):
    """A frozen value that splits a run into segments."""

    def segments(self, timesteps: np.ndarray) -> tuple[Segment, ...]:
        """The run, in order and without gaps."""


@dataclasses.dataclass(frozen=True)
class SingleExpert:
    """One network for all steps: every model but the A14B ones."""

    guidance_scale: float

    def segments(self, timesteps: np.ndarray) -> tuple[Segment, ...]:
        return (Segment(0, len(timesteps), "transformer", self.guidance_scale),)


@dataclasses.dataclass(frozen=True)
class TwoExperts:
    """`transformer` while the timestep is at least boundary_ratio x 1000, `transformer_2` below (WAN 2.2 A14B)."""

    boundary_ratio: float
    guidance_scale: float
    guidance_scale_2: float

    def segments(self, timesteps: np.ndarray) -> tuple[Segment, ...]:
        switch = int((timesteps >= self.boundary_ratio * TRAIN_STEPS).sum())
        both = (
            Segment(0, switch, "transformer", self.guidance_scale),
            Segment(switch, len(timesteps), "transformer_2", self.guidance_scale_2),
        )
        return tuple(segment for segment in both if segment.stop > segment.start)


def choose(boundary_ratio: float | None, guidance_scale: float, guidance_scale_2: float | None) -> Experts:
    """The strategy of a config: two experts where it has a boundary."""
    if boundary_ratio is None or guidance_scale_2 is None:
        return SingleExpert(guidance_scale)
    return TwoExperts(boundary_ratio, guidance_scale, guidance_scale_2)


def turns(segments: Sequence[Segment], batches: Sequence[T], residency: str) -> Iterator[tuple[T, Segment]]:
    """(batch, segment) in the order in which they run.

    `together` finishes batch after batch; `in_turn` takes all batches through a segment before the next, so that each
    net is loaded once.
    """
    if residency == "in_turn":
        return ((batch, segment) for segment in segments for batch in batches)
    return ((batch, segment) for batch in batches for segment in segments)


class Residents:
    """The nets in memory: with `in_turn` only the last that was asked for, else all."""

    def __init__(self, load: Callable[[str], nnx.Module], residency: str) -> None:
        self._load, self._one = load, residency == "in_turn"
        self._held: dict[str, nnx.Module] = {}

    def free(self) -> None:
        """Lets go of all of them."""
        self._held.clear()

    def __getitem__(self, net: str) -> nnx.Module:
        if net not in self._held:
            if self._one:
                self.free()  # before the next is read
            self._held[net] = self._load(net)
        return self._held[net]
