"""Which expert denoises which steps, how strongly guided, and in what order. Free of jax."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from maxdiffusion.denoise.schedule import TRAIN_STEPS

T = TypeVar("T")


class Segment(NamedTuple):
    """Steps start .. stop - 1 of a run, the expert that denoises them and its guidance scale."""

    start: int
    stop: int
    net: str = "transformer"  # its folder in the checkpoint
    guidance_scale: float = 1.0

    @property
    def guided(self) -> bool:
        """Whether a step evaluates both branches of guidance: a scale of 1 means the prompt's velocity alone."""
        return self.guidance_scale != 1


def segments(
    timesteps: np.ndarray, boundary_ratio: float | None, guidance_scale: float, guidance_scale_2: float | None
) -> tuple[Segment, ...]:
    """The run in order and without gaps.

    WAN 2.2 A14B has a boundary and two experts: `transformer` while the timestep is at least boundary_ratio x 1000,
    `transformer_2` below. All other models have one. An expert without steps is left out.
    """
    steps = len(timesteps)
    if boundary_ratio is None or guidance_scale_2 is None:
        return (Segment(0, steps, "transformer", guidance_scale),)
    switch = int((timesteps >= boundary_ratio * TRAIN_STEPS).sum())
    both = (
        Segment(0, switch, "transformer", guidance_scale),
        Segment(switch, steps, "transformer_2", guidance_scale_2),
    )
    return tuple(segment for segment in both if segment.stop > segment.start)


def guided(boundary_ratio: float | None, guidance_scale: float, guidance_scale_2: float | None) -> tuple[bool, ...]:
    """Whether each expert is guided, before there is a schedule: that of the highest and of the lowest timestep."""
    ends = np.array([TRAIN_STEPS, 0])
    return tuple(each.guided for each in segments(ends, boundary_ratio, guidance_scale, guidance_scale_2))


def program_calls(segments: Sequence[Segment], scan: bool) -> Counter[tuple[bool, int]]:
    """How often a run calls each of its programs, which differ in (guided, steps of one call).

    With `scan` one call makes all steps of a segment, else one step.
    """
    found: Counter[tuple[bool, int]] = Counter()
    for segment in segments:
        steps = segment.stop - segment.start
        found[segment.guided, steps if scan else 1] += 1 if scan else steps
    return found


def execution_order(segments: Sequence[Segment], batches: Sequence[T], residency: str) -> Iterator[tuple[T, Segment]]:
    """(batch, segment) in the order in which they run.

    `together` finishes batch after batch; `in_turn` takes all batches through a segment before the next, so that each
    expert is loaded once.
    """
    if residency == "in_turn":
        return ((batch, segment) for segment in segments for batch in batches)
    return ((batch, segment) for batch in batches for segment in segments)
