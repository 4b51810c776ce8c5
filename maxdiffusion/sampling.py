"""Denoising of a run's batches: each through its segments, each segment through its experts."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from maxdiffusion import parallel
from maxdiffusion.conditioning import Conditioning
from maxdiffusion.config import Config
from maxdiffusion.denoise import caches
from maxdiffusion.denoise.cache_rows import CacheRows
from maxdiffusion.denoise.experts import ExpertSteps, LoadedExperts, execution_order, from_step
from maxdiffusion.denoise.loop import Program, State
from maxdiffusion.denoise.network import split
from maxdiffusion.denoise.noise import noise, step_keys
from maxdiffusion.denoise.upsampling import halve, upsample
from maxdiffusion.errors import UserError
from maxdiffusion.models.dit.context import Contexts, without_shared
from maxdiffusion.models.quantized import products
from maxdiffusion.output.states import Progress, States
from maxdiffusion.parallel import axes
from maxdiffusion.programs import BatchPrograms
from maxdiffusion.request import Video
from maxdiffusion.request.session import Session
from maxdiffusion.runtime import distributed, finite, peers, stop

log = logging.getLogger(__name__)

CHECKED = 8  # every so many steps, and after an expert's first and last, the latents are searched for NaN

# Called with i and the latents (b f h w c, on the device) after step i, counted from 0; copy what you keep.
OnLatents = Callable[[int, jax.Array], object]
# Called with the videos, the number of a segment and its latents, when that segment is whole.
OnSegment = Callable[[tuple[Video, ...], int, Float[np.ndarray, "b f h w c"]], object]


# By the step at which a scan is entered, size, number of videos and shape: see `Sampler._programs`.
Compiled = dict[tuple[int, ...], tuple[BatchPrograms, Any, Program]]


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
    """Denoises a run's batches to latents, one `Work` at a time, in the order of `order`.

    A batch starts from noise, or from the states that an earlier run has left of its videos.
    """

    def __init__(
        self,
        s: Session,
        conditions: Conditioning,
        given: Float[np.ndarray, "b f h w c"] | None = None,
        states: States | None = None,
        on_latents: OnLatents = lambda i, latents: None,
        on_segment: OnSegment = lambda videos, segment, latents: None,
        compiled: Compiled | None = None,
    ) -> None:
        """`given` is the noise of every video; None draws it from each video's seed. Call it under the placement.

        `states` are those of `s.job`'s videos; None saves none. `compiled` are programs of another sampler, of a run
        that differs in the step cache's table alone; those that this one compiles are added.
        """
        self._s, self._conditions, self._given, self._on_latents = s, conditions, given, on_latents
        self._saved, self._on_segment = states, on_segment
        self._batches = list(s.job.batches(parallel.data_degree(), self._progress))
        self._compiled: Compiled = {} if compiled is None else compiled
        self._states: dict[tuple[int, int], State] = {}
        self._resumed: set[tuple[int, int]] = set()
        self._done: dict[int, list[np.ndarray]] = collections.defaultdict(list)  # latents of segments, by batch
        # What the step cache has logged, by video and segment: branches x steps.
        self.logged: dict[Video, dict[int, np.ndarray]] = collections.defaultdict(dict)

    def order(self) -> Iterator[Work]:
        """All work in the order in which it runs, without what an earlier run has done."""
        s, work = self._s, []
        batches, residency = range(len(self._batches)), s.job.cfg.expert_residency
        for batch, segment, expert in execution_order(s.recipe.experts, batches, residency, len(s.job.segments)):
            at = self._progress(self._batches[batch][0][0])
            if segment >= at.segment:
                left = from_step([expert], at.step if segment == at.segment else 0)
                work += [(batch, segment, each) for each in left]
        for number, one in enumerate(work, 1):
            yield Work(*one, number == len(work))

    def expected(self) -> dict[str, int]:
        """Steps to denoise and frames to decode, by the stage's name."""
        work = list(self.order())
        steps = sum(each.expert.stop - each.expert.start for each in work)
        return {"denoise": steps, "decode": len({each.batch for each in work}) * self._s.job.segments.frames}

    def _progress(self, row: int) -> Progress:
        """How far an earlier run has denoised that row of the job's videos."""
        return self._saved.progress.get(self._s.job.videos[row], Progress()) if self._saved else Progress()

    def videos(self, work: Work) -> tuple[Video, ...]:
        """The videos of that work's batch."""
        rows, real = self._batches[work.batch]
        return tuple(self._s.job.videos[row] for row in rows[:real])

    def advance(self, work: Work, experts: LoadedExperts) -> Float[np.ndarray, "b f h w c"] | None:
        """Runs that work's steps; returns the latents of its batch's videos once they are complete.

        Raises:
          UserError: values are NaN or infinite; the same on all processes.
        """
        s, (rows, real) = self._s, self._batches[work.batch]
        batch, unit = [s.job.videos[row] for row in rows], (work.batch, work.segment)
        self._resume(work, batch)
        raw = self._conditions.contexts(batch, work.expert.guided, self._done[work.batch])
        with stop.immediate():  # compiling and loading
            programs, prepare, program = self._programs(batch, work.expert)
            _, params = split(experts[work.expert.net])
        with s.stages("text"):
            context = jax.tree.map(lambda leaf: leaf.sharding, programs.context)
            negative = None
            if raw.negative is not None:  # first, so that what both branches share is in memory once
                prepared = jax.block_until_ready(prepare(params, jax.device_put(raw.negative, context)))
                negative, prepared = without_shared(prepared), None
            contexts = Contexts(prepare(params, jax.device_put(raw.positive, context)), negative)
            jax.block_until_ready(contexts)
        state = self._states.pop(unit, None)
        midway = state is not None and work.expert.start not in starts(s.recipe.experts)
        if midway and s.job.cfg.cache != "none" and not self._progress(rows[0]).cache:
            log.info("cache=%s starts anew: step %d is computed", s.job.cfg.cache, work.expert.start + 1)
        keys = parallel.put(step_keys([s.job.seed(video, work.segment) for video in batch], work.segment))
        if state is None and work.expert.half:
            state = program.init(self._resized(halve, programs, self._noise(rows, work.segment)), keys)
        elif state is None:
            state = program.init(self._noise(rows, work.segment), keys)
        elif 0 < work.expert.start == s.recipe.half_steps:
            state = program.init(self._upsampled(state, self._noise(rows, work.segment), programs), keys)
        else:
            state = program.place(state, work.expert.guided)
        with s.stages("denoise", work.expert.stop - work.expert.start, "steps") as advance:
            state = self._run(program, params, contexts, state, work, advance, raw)
        if work.expert.stop < len(s.recipe.schedule):
            self._states[unit] = state
            if s.job.cfg.expert_residency == "in_turn":
                self._save(work, Progress(work.segment, work.expert.stop), state)
            return None
        latents = distributed.fetch(raw.positive.frames.keep(state.x))
        self._done[work.batch].append(latents[:, s.job.segments.reference_frames :])
        self._on_segment(self.videos(work), work.segment, self._done[work.batch][-1][:real])
        if work.segment < len(s.job.segments) - 1:
            self._save_if_needed(work, Progress(work.segment + 1), None, due=s.job.own_seeds)
            return None
        return np.concatenate(self._done.pop(work.batch), axis=1)[:real]

    def predict(self, steps: int, experts: LoadedExperts) -> Float[np.ndarray, "b f h w c"]:
        """The clean latents of the first batch's first segment as its first `steps` (2 or more) predict them.

        They are at level 0 of the line through the last two latents; the run is without scan. Saves nothing.
        """
        seen: dict[int, np.ndarray] = {}
        self._on_latents = lambda i, x: seen.update({i: distributed.fetch(x).copy()} if i >= steps - 2 else {})
        for work in list(self.order()):
            if work.batch == work.segment == 0 and work.expert.start < steps:
                expert = work.expert._replace(stop=min(work.expert.stop, steps))
                self.advance(work._replace(expert=expert, last=False), experts)
        before, last = self._s.recipe.schedule.sigmas[steps - 1 : steps + 1]
        x = seen[steps - 1] + (seen[steps - 1] - seen[steps - 2]) * (last / (before - last))
        rows, real = self._batches[0]
        contexts = self._conditions.contexts([self._s.job.videos[row] for row in rows], False, [])
        kept = distributed.fetch(contexts.positive.frames.keep(parallel.put(x, axes.BATCH)))
        return kept[:real, self._s.job.segments.reference_frames :]

    def _resume(self, work: Work, batch: list[Video]) -> None:
        """Takes the saved state of a batch, once, at its first work of this run."""
        at = self._progress(self._batches[work.batch][0][0])
        unit = (work.batch, at.segment)
        if self._saved is None or at == Progress() or unit in self._resumed:
            return
        self._resumed.add(unit)
        programs = BatchPrograms(self._s.setup, batch[0], len(batch))
        if 0 < at.step <= self._s.recipe.half_steps:
            programs = programs.halved
        solver = jax.eval_shape(programs.denoiser.init, programs.noise, programs.keys).solver if at.step else ()
        frames, *grid = programs.shape
        done = np.zeros((frames - self._s.job.segments.reference_frames, *grid), np.float32)
        abstract = [jax.ShapeDtypeStruct((1, *leaf.shape[1:]), leaf.dtype) for leaf in jax.tree.leaves(solver)]
        shapes, kept = [], ()  # of the step cache: what is wanted of the file, and the abstract state
        if self._logs and at.cache:
            shapes.append(jax.ShapeDtypeStruct((1, at.segment + (at.step > 0), *self._log_shape), np.float32))
        if self._logs and at.cache == "state":
            with stop.immediate():
                kept = self._programs(batch, work.expert)[2].caches[work.expert.guided]
            shapes += self._cache_rows(work).shapes(kept)
        found = {video: self._saved.load(video, abstract, [done] * at.segment, shapes) for video in set(batch)}
        rows = [found[video] for video in batch]
        self._done[work.batch] = [np.stack(parts) for parts in zip(*(row.done for row in rows), strict=True)]
        for video, row in found.items() if shapes else ():
            self.logged[video] = dict(enumerate(row.cache[0][0].copy()))
        if at.step:
            leaves = [np.concatenate(parts) for parts in zip(*(row.solver for row in rows), strict=True)]
            arrays = [np.concatenate(parts) for parts in zip(*(row.cache[1:] for row in rows), strict=True)]
            cache = self._cache_rows(work).by_call(arrays, kept) if kept else None
            self._states[unit] = State(jax.tree.unflatten(jax.tree.structure(solver), leaves), cache)

    def _save(self, work: Work, at: Progress, state: State | None) -> None:
        if self._saved is None or self._s.job.cfg.checkpoint_steps == 0:
            return
        videos, cache = self.videos(work), []
        running = None if state is None else state.cache
        if self._logs:
            at = dataclasses.replace(at, cache="log")
            if running is not None:
                self._log_cache(work, running)
            none = np.zeros(self._log_shape, np.float32)
            segments = range(at.segment + (at.step > 0))
            rows = [[self.logged[video].get(segment, none) for segment in segments] for video in videos]
            cache.append(np.array(rows, np.float32).reshape(len(videos), len(segments), *self._log_shape))
        if running is not None and at.step not in starts(self._s.recipe.experts) and self._s.setup.cache.reads(at.step):
            at = dataclasses.replace(at, cache="state")
            cache += self._cache_rows(work).by_video(running, distributed.fetch)
        self._saved.save(videos, at, None if state is None else state.solver, self._done[work.batch], cache)

    @property
    def _logs(self) -> bool:
        """Whether the run has a step cache, which logs what it does."""
        return self._s.job.cfg.cache != "none" or bool(self._s.job.cfg.calibrate_cache)

    @property
    def _log_shape(self) -> tuple[int, int]:
        """Branches and steps of the log of a segment."""
        return 1 + self._s.recipe.guided, len(self._s.recipe.schedule)

    def _cache_rows(self, work: Work) -> CacheRows:
        """How that work's calls hold the step cache's state."""
        batch = [self._s.job.videos[row] for row in self._batches[work.batch][0]]
        programs, _, program = self._programs(batch, work.expert)
        return program.denoiser.cache_rows(work.expert.guided, len(batch), programs.tokens)

    def _save_if_needed(self, work: Work, at: Progress, state: State | None, due: bool = False) -> None:
        """Saves the state where it is due, or said to be; after a signal in any process, all of them stop here.

        Raises:
          Stopped: after a signal.
        """
        if self._saved is None:
            return
        save, signal = distributed.largest([self._saved.due(at.step) or due, stop.heard()])
        if signal or save:
            self._save(work, at, state)
        if signal:
            part = f" of segment {at.segment + 1}" if len(self._s.job.segments) > 1 else ""
            peers.agreed()
            kept = "" if self._s.job.cfg.checkpoint_steps == 0 else ", whose state is saved"
            raise stop.Stopped(signal, f"stopped after step {at.step} of {len(self._s.recipe.schedule)}{part}{kept}")

    def _noise(self, rows: list[int], segment: int) -> jax.Array:
        """Initial latents of a segment of these videos."""
        s, videos = self._s, [self._s.job.videos[row] for row in rows]
        programs = BatchPrograms(s.setup, videos[0], len(videos))
        frames, h, w, c = programs.shape
        part = slice(segment * frames, (segment + 1) * frames)
        if self._given is not None:
            x = parallel.put(self._given[rows], axes.BATCH)[:, part]
        elif s.job.own_seeds:
            x = noise([s.job.seed(video, segment) for video in videos], programs.shape)
        else:
            x = noise([video.seed for video in videos], (len(s.job.segments) * frames, h, w, c))[:, part]
        x = jax.device_put(self._conditions.start(videos, x, s.recipe), programs.noise.sharding)
        if found := finite.fault(x):
            raise UserError(f"the encoded input video has {found} values; {instead(s.job.cfg, 'vae')}.")
        return x

    def _upsampled(self, state: State, start: jax.Array, programs: BatchPrograms) -> jax.Array:
        """The latents of a state at half height and width as those of the step that follows, at the whole size.

        `start` are the initial latents of the whole size.
        """
        recipe, x = self._s.recipe, state.solver.x
        x = x if isinstance(x, jax.Array) else parallel.put(x, axes.BATCH)  # of a saved state
        log.info("step %d of %d and those after it are at the whole size", recipe.half_steps + 1, len(recipe.schedule))
        larger = functools.partial(upsample, sigma=float(recipe.schedule.sigmas[recipe.half_steps]))
        return self._resized(larger, programs, x, start / recipe.noise_scale)

    def _resized(self, change: Callable[..., jax.Array], programs: BatchPrograms, *latents: jax.Array) -> jax.Array:
        return parallel.jit(change, out_shardings=programs.noise.sharding)(*latents)

    def _programs(self, batch: list[Video], expert: ExpertSteps) -> tuple[BatchPrograms, Any, Program]:
        """Programs of such a batch for these steps, compiled once: abstract ones, `prepare` and the denoise loop.

        A scan that a resumed batch enters within an expert's steps has calls of other lengths.
        """
        scanned, step = self._s.job.cfg.loop == "scan", expert.start
        resumed = step if scanned and step not in starts(self._s.recipe.experts) else 0
        key = (resumed, expert.half, len(batch), *batch[0].shape)
        if key not in self._compiled:
            programs = BatchPrograms(self._s.setup, batch[0], len(batch), resumed)
            programs = programs.halved if expert.half else programs
            with self._s.stages("compile"):
                prepare = programs.prepare.compile()
                self._compiled[key] = programs, prepare, programs.denoiser.compile(*programs.arguments)
            if self._s.job.cfg.quantization != "none":
                _log_products(self._compiled[key][2])
            distributed.wait_for_all()
        programs, prepare, program = self._compiled[key]
        return programs, prepare, program.with_cache(self._s.setup.cache)

    def _run(
        self,
        program: Program,
        params: Any,
        contexts: Contexts,
        state: State,
        work: Work,
        advance: Callable[[int], object],
        raw: Contexts,
    ) -> State:
        """One expert's steps, with progress and clock of every call of a program: a step, or those of a scan."""
        s, expert = self._s, work.expert
        clock, done = s.stages.clock, expert.start
        with contextlib.ExitStack() as step:
            step.enter_context(clock.step())

            def on_step(i: int, n: int, state: State) -> None:
                nonlocal done
                step.close()
                self._on_latents(i, state.x)
                advance(i + 1 - done)
                done = i + 1
                if i - expert.start == 0 or done % CHECKED == 0 or done == expert.stop:
                    self._check(state.x, f"step {done} of {n}", expert.net, params, raw)
                if done == expert.stop and self._logs:
                    self._log_cache(work, state.cache)
                if done < n:
                    self._save_if_needed(work, Progress(work.segment, done), state)
                if done < expert.stop:
                    step.enter_context(clock.step())

            return jax.block_until_ready(program.advance(params, contexts, state, expert, on_step))

    def _log_cache(self, work: Work, states: tuple[Any, ...]) -> None:
        """Keeps what the cache of an expert has logged, before its states are dropped or saved."""
        expert, (rows, _) = work.expert, self._batches[work.batch]
        logs = [distributed.fetch(each.log) for each in states]
        for row, logged in zip(rows, caches.logs(logs, len(rows), expert.guided), strict=True):
            steps = np.zeros(self._log_shape, np.float32)
            kept = self.logged[self._s.job.videos[row]].setdefault(work.segment, steps)
            kept[: len(logged), expert.start : expert.stop] = logged[:, expert.start : expert.stop]

    def _check(self, latents: jax.Array, step: str, net: str, params: Any, raw: Contexts) -> None:
        """Refuses latents that are not finite; names what was so first: the conditioning, the weights or a step."""
        if not (found := finite.fault(latents)):
            return
        cfg = self._s.job.cfg
        for branch in raw:
            for part, (name, maker) in _MADE_BY.items():
                if branch is not None and (before := finite.fault(getattr(branch, part))):
                    raise UserError(f"the {name} has {before} values before the first step; {instead(cfg, maker)}.")
        if stored := finite.fault(params):
            raise UserError(f"the weights of {net} have {stored} values: their file is damaged; give another.")
        raise UserError(f"{step} ({net}) left {found} values in the latents, which are not saved; {instead(cfg, net)}.")


def starts(experts: Sequence[ExpertSteps]) -> set[int]:
    """The first step of each expert."""
    return {expert.start for expert in experts}


# The part of `Context` -> (its name, the network that made it).
_MADE_BY = {
    "text": ("text embedding", "text_encoder"),
    "image": ("image embedding", "image_encoder"),
    "frames": ("encoded image", "vae"),
    "adapter": ("encoded control video or sound", "vae"),
}
_DTYPES = {"vae": "vae_dtype", "text_encoder": "text_encoder_dtype", "image_encoder": "text_encoder_dtype"}


def instead(cfg: Config, net: str) -> str:
    """What to try where that network overflows."""
    key = _DTYPES.get(net, "activations_dtype")
    if getattr(cfg, key) != "float32":
        return f"try {key}=float32"
    return f"{key} is float32 already, so look at the weights of {net}: its file, or a LoRA and its strength"


def _log_products(program: Program) -> None:
    """Logs the dtypes of the products that the compiler made of each step's."""
    for (guided, _), compiled in program.programs.items():
        found = products(compiled.as_text() or "").items()
        shown = ", ".join(f"{count} of {dtypes}" for dtypes, count in found) or "none that can be read"
        log.info("matrix products of the compiled step%s: %s", " with guidance" if guided else "", shown)
