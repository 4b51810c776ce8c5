"""Experts: their steps, guidance scales, order and residency in memory. Imports no jax."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

from maxdiffusion.denoise.schedule import TRAIN_STEPS

T = TypeVar("T")

# Batches that wait for the second of two experts in turn: two loads are little beside the steps of eight, and no file
# waits for the high-noise steps of more.
IN_TURN = 8


class ExpertSteps(NamedTuple):
    """Steps start .. stop - 1 of a run, the expert that denoises them and its guidance scale."""

    start: int
    stop: int
    net: str = "transformer"  # its folder in the checkpoint
    guidance_scale: float = 1.0
    half: bool = False  # whether the latents have half the height and width of the video's

    @property
    def guided(self) -> bool:
        """Whether a step evaluates both branches of guidance: a scale of 1 means the prompt's velocity alone."""
        return self.guidance_scale != 1


def expert_steps(
    timesteps: np.ndarray,
    boundary_ratio: float | None,
    guidance_scale: float,
    guidance_scale_2: float | None,
    boundary_step: int | None = None,
) -> tuple[ExpertSteps, ...]:
    """All steps of a run, in order, divided between its experts.

    WAN 2.2 A14B has two experts: `transformer` takes the first `boundary_step` steps, or without that those whose
    timestep is at least boundary_ratio x 1000, and `transformer_2` the others. All other models have one. An expert
    without steps is left out.
    """
    steps = len(timesteps)
    if boundary_step is None and boundary_ratio is not None:
        boundary_step = int((timesteps >= boundary_ratio * TRAIN_STEPS).sum())
    if boundary_step is None or guidance_scale_2 is None:
        return (ExpertSteps(0, steps, "transformer", guidance_scale),)
    switch = min(boundary_step, steps)
    high = ExpertSteps(0, switch, "transformer", guidance_scale)
    low = ExpertSteps(switch, steps, "transformer_2", guidance_scale_2)
    return tuple(expert for expert in (high, low) if expert.stop > expert.start)


def guided(boundary_ratio: float | None, guidance_scale: float, guidance_scale_2: float | None) -> tuple[bool, ...]:
    """Whether each expert is guided, before there is a schedule: computed for its two ends, timesteps 1000 and 0."""
    ends = np.array([TRAIN_STEPS, 0])
    return tuple(each.guided for each in expert_steps(ends, boundary_ratio, guidance_scale, guidance_scale_2))


def calls(expert: ExpertSteps, steps: int) -> Iterator[tuple[int, int]]:
    """(first step, number of steps) of each call of an expert's program, which makes at most `steps` steps."""
    for first in range(expert.start, expert.stop, steps):
        yield first, min(steps, expert.stop - first)


def program_calls(experts: Sequence[ExpertSteps], steps: int) -> Counter[tuple[bool, int]]:
    """How often a run calls each of its programs, which differ in (guided, steps of one call, at most `steps`)."""
    return Counter((expert.guided, length) for expert in experts for _, length in calls(expert, steps))


def from_step(experts: Sequence[ExpertSteps], start: int) -> tuple[ExpertSteps, ...]:
    """The experts of the steps from `start` on."""
    return tuple(each._replace(start=max(each.start, start)) for each in experts if each.stop > start)


def half_size_first(experts: Sequence[ExpertSteps], steps: int) -> tuple[ExpertSteps, ...]:
    """The experts with the first `steps` of the run at half height and width."""
    first = (each._replace(stop=min(each.stop, steps), half=True) for each in experts if each.start < steps)
    return (*first, *from_step(experts, steps))


def described(experts: Sequence[ExpertSteps], computed: Sequence[int] | None = None) -> str:
    """The steps as text, and how often each network is evaluated: a guided step takes two passes.

    `14 steps: 10 of transformer with guidance (20 passes), 4 of transformer_2 (4 passes)`. `computed` is the number of
    each expert's steps that a step cache computes, which alone are counted; None: all.
    """
    parts = []
    counts = [expert.stop - expert.start for expert in experts]
    left = "" if computed in (None, counts) else f", {sum(computed or ())} computed"
    for expert, steps in zip(experts, computed or counts, strict=True):
        with_guidance, passes = (" with guidance", 2 * steps) if expert.guided else ("", steps)
        size = " at half height and width" if expert.half else ""
        parts.append(f"{steps} of {expert.net}{size}{with_guidance} ({passes} passes)")
    return f"{experts[-1].stop} steps{left}: {', '.join(parts)}"


def execution_order(
    experts: Sequence[ExpertSteps], batches: Sequence[T], residency: str, segments: int = 1
) -> Iterator[tuple[T, int, ExpertSteps]]:
    """(batch, segment, expert) in the order in which they run; a segment may need the one before it.

    `together` finishes batch after batch; `in_turn` runs IN_TURN batches through an expert before the next expert, so
    that each is loaded once for all of them.
    """
    size = IN_TURN if residency == "in_turn" else 1
    for first, segment, expert in itertools.product(range(0, len(batches), size), range(segments), experts):
        yield from ((batch, segment, expert) for batch in batches[first : first + size])


class LoadedExperts:
    """The experts in memory, by folder: with residency `in_turn` only the last one requested, else all requested."""

    def __init__(self, load: Callable[[str], Any], residency: str) -> None:
        self._load, self._one = load, residency == "in_turn"
        self._loaded: dict[str, Any] = {}

    def free(self) -> None:
        """Drops all of them."""
        self._loaded.clear()

    def __getitem__(self, net: str) -> Any:
        if net not in self._loaded:
            if self._one:
                self.free()  # before the next is read
            self._loaded[net] = self._load(net)
        return self._loaded[net]
