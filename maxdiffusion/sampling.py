"""Denoising of a run's batches: each through its segments, each segment through its experts."""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from maxdiffusion import parallel
from maxdiffusion.conditioning import Conditioning
from maxdiffusion.denoise.experts import ExpertSteps, LoadedExperts, execution_order
from maxdiffusion.denoise.loop import Program, State
from maxdiffusion.denoise.network import split
from maxdiffusion.denoise.noise import noise, step_keys
from maxdiffusion.models.dit.context import Contexts
from maxdiffusion.parallel import axes
from maxdiffusion.programs import BatchPrograms
from maxdiffusion.request import Video
from maxdiffusion.request.session import Session
from maxdiffusion.runtime import distributed

# Called with i and the latents (b f h w c, on the device) after step i, counted from 0; copy what you keep.
OnLatents = Callable[[int, jax.Array], object]


class Work(NamedTuple):
    """One expert's steps on one segment of one batch.

    Attributes:
      batch: its number.
      segment: its number, of the frames.
      expert: which network takes which steps.
      last: whether no further work follows, so that the transformers can be freed.
    """

    batch: int
    segment: int
    expert: ExpertSteps
    last: bool


class Sampler:
    """Denoises a run's batches from noise to latents, one `Work` at a time, in the order of `order`."""

    def __init__(
        self,
        s: Session,
        conditions: Conditioning,
        given: Float[np.ndarray, "b f h w c"] | None = None,
        on_latents: OnLatents = lambda i, latents: None,
    ) -> None:
        """`given` is the noise of every video; None draws it from each video's seed. Call it under the placement."""
        self._s, self._conditions, self._given, self._on_latents = s, conditions, given, on_latents
        self._batches = list(s.job.batches(parallel.data_degree()))
        self._compiled: dict[tuple[int, ...], tuple[BatchPrograms, Any, Program]] = {}
        self._states: dict[tuple[int, int], State] = {}
        self._done: dict[int, list[np.ndarray]] = collections.defaultdict(list)  # latents of segments, by batch

    def order(self) -> Iterator[Work]:
        """Batch after batch; with the experts in turn, all batches' high-noise steps first."""
        s = self._s
        units = [(batch, segment) for batch in range(len(self._batches)) for segment in range(len(s.job.segments))]
        work = list(execution_order(s.recipe.experts, units, s.job.cfg.expert_residency))
        for number, ((batch, segment), expert) in enumerate(work, 1):
            yield Work(batch, segment, expert, number == len(work))

    def videos(self, work: Work) -> tuple[Video, ...]:
        """The videos of that work's batch."""
        rows, real = self._batches[work.batch]
        return tuple(self._s.job.videos[row] for row in rows[:real])

    def advance(self, work: Work, experts: LoadedExperts) -> Float[np.ndarray, "b f h w c"] | None:
        """Runs that work's steps; returns the latents of its batch's videos once they are complete."""
        s, (rows, real) = self._s, self._batches[work.batch]
        batch, unit = [s.job.videos[row] for row in rows], (work.batch, work.segment)
        raw = self._conditions.contexts(batch, work.expert.guided, self._done[work.batch])
        programs, prepare, program = self._programs(batch)
        _, params = split(experts[work.expert.net])
        with s.stages("text"):
            context = jax.tree.map(lambda leaf: leaf.sharding, programs.context)
            placed = (None if branch is None else jax.device_put(branch, context) for branch in raw)
            contexts = Contexts(*(None if branch is None else prepare(params, branch) for branch in placed))
            jax.block_until_ready(contexts)
        state = self._states.pop(unit, None)
        if state is None:
            keys = parallel.put(step_keys([video.seed for video in batch], work.segment))
            state = program.init(self._noise(rows, work.segment, programs), keys)
        with s.stages("denoise", work.expert.stop - work.expert.start, "steps") as advance:
            state = self._run(program, params, contexts, state, work.expert, advance)
        if work.expert != s.recipe.experts[-1]:
            self._states[unit] = state
            return None
        latents = distributed.fetch(raw.positive.frames.keep(state.x))
        self._done[work.batch].append(latents[:, s.job.segments.reference_frames :])
        if work.segment < len(s.job.segments) - 1:
            return None
        return np.concatenate(self._done.pop(work.batch), axis=1)[:real]

    def _noise(self, rows: list[int], segment: int, programs: BatchPrograms) -> jax.Array:
        """Initial latents of a segment of these videos."""
        s, (frames, h, w, c) = self._s, programs.shape
        videos = [s.job.videos[row] for row in rows]
        if self._given is None:
            x = noise([video.seed for video in videos], (len(s.job.segments) * frames, h, w, c))
        else:
            x = parallel.put(self._given[rows], axes.BATCH)
        x = x[:, segment * frames : (segment + 1) * frames]
        x = self._conditions.start(videos, x, s.recipe)
        return jax.device_put(x, programs.noise.sharding)

    def _programs(self, batch: list[Video]) -> tuple[BatchPrograms, Any, Program]:
        """Programs of such a batch, compiled once: abstract ones, `prepare` and the denoise loop."""
        key = (len(batch), *batch[0].shape)
        if key not in self._compiled:
            programs = BatchPrograms(self._s.setup, batch[0], len(batch))
            with self._s.stages("compile"):
                prepare = programs.prepare.compile()
                self._compiled[key] = programs, prepare, programs.denoiser.compile(*programs.arguments)
        return self._compiled[key]

    def _run(
        self,
        program: Program,
        params: Any,
        contexts: Contexts,
        state: State,
        expert: ExpertSteps,
        advance: Callable[[int], object],
    ) -> State:
        """One expert's steps, with progress and clock of every call of a program: a step, or all steps of a scan."""
        clock, done = self._s.stages.clock, expert.start
        with contextlib.ExitStack() as step:
            step.enter_context(clock.step())

            def on_step(i: int, n: int, state: State) -> None:
                nonlocal done
                step.close()
                self._on_latents(i, state.x)
                advance(i + 1 - done)
                done = i + 1
                if done < expert.stop:
                    step.enter_context(clock.step())

            return jax.block_until_ready(program.advance(params, contexts, state, expert, on_step))
