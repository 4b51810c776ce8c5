"""From text embeddings to latents, batch by batch: the strategies that the config names, compiled once per size."""

from __future__ import annotations

import collections
import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float

from maxdiffusion import conditioning, parallel, variants
from maxdiffusion.config import Config, parts
from maxdiffusion.config.examples import Example
from maxdiffusion.denoise import experts
from maxdiffusion.denoise.experts import Segment
from maxdiffusion.denoise.given import Batch
from maxdiffusion.denoise.guidance import Contexts, choose
from maxdiffusion.denoise.loop import Denoiser, Program, State
from maxdiffusion.denoise.network import split
from maxdiffusion.denoise.noise import noise
from maxdiffusion.denoise.solvers import SOLVERS
from maxdiffusion.models.dit import Context, PreparedContext
from maxdiffusion.parallel import axes
from maxdiffusion.runtime import distributed
from maxdiffusion.runtime.progress import Advance
from maxdiffusion.runtime.stages import Stages
from maxdiffusion.weights.nets import Nets

# Told the latents (b f h w c, on the device) after step i, counted from 0; to be copied if kept.
Watch = Callable[[int, jax.Array], object]


def sample(
    cfg: Config,
    videos: Sequence[Example],
    nets: Nets,
    shape: tuple[int, int, int, int],
    given: Float[np.ndarray, "b f h w c"] | None,
    inputs: conditioning.Inputs,
    stages: Stages,
    watch: Watch = lambda i, latents: None,
) -> Iterator[Batch]:
    """Encodes all inputs, loads the transformer, then yields each batch of videos as soon as its latents are there.

    Args:
      cfg: the run.
      videos: what to make; those of one size share their batches and their program.
      nets: what to load from.
      shape: f h w c of one video's latents, of the size that `cfg` says.
      given: the noise of every video; None draws it from each video's seed.
      inputs: what `conditioning.read` found.
      stages: timing and progress.
      watch: sees the latents after every call of the program: a step, or all steps of a scan.
    """
    batches = list(_batches(videos, cfg.per_device_batch_size * parallel.data_degree()))
    spec = variants.get(cfg.model_name)
    solver = SOLVERS[cfg.solver]
    schedule = solver.schedule(cfg.num_inference_steps, cfg.flow_shift)
    if conditioning.START in inputs.by_kind:
        schedule = schedule.last(cfg.strength)
    cut = parts.of(cfg)
    count, per_part = len(cut.starts), cut.leading + shape[0] // len(cut.starts)
    strategy = experts.choose(cfg.boundary_ratio, cfg.guidance_scale, cfg.guidance_scale_2)
    segments = strategy.segments(schedule.timesteps)
    scales = [segment.guidance_scale for segment in segments]
    guided = any(scale != 1 for scale in scales)
    conditions = conditioning.encode(cfg, videos, nets, stages, guided, inputs)

    prepare = jax.jit(_prepare, static_argnums=0, compiler_options=parallel.compiler_options())
    residents = experts.Residents(functools.partial(stages.load, nets), cfg.expert_residency)
    programs: dict[tuple[int, ...], Program] = {}
    states: dict[tuple[int, int], State] = {}
    made: dict[int, list[np.ndarray]] = collections.defaultdict(list)
    units = [(index, part) for index in range(len(batches)) for part in range(count)]
    for unit, segment in experts.turns(segments, units, cfg.expert_residency):
        index, part = unit
        rows, real = batches[index]
        batch = [videos[row] for row in rows]
        _, h, w = spec.latent_grid(cfg.num_frames, batch[0].height, batch[0].width)
        size = (per_part, h, w, shape[3])
        raw = conditions.contexts(batch, guided, made[index])
        transformer = residents[segment.net]
        network, params = split(transformer)
        with stages("text"):
            prepared = (prepare(nnx.graphdef(transformer), params, context) for context in raw if context is not None)
            contexts = jax.block_until_ready(Contexts(*prepared))
        if unit not in states:
            seeds, whole = [video.seed for video in batch], (count * per_part, *size[1:])
            x = noise(seeds, whole) if given is None else parallel.put(given[rows], axes.BATCH)
            x = conditions.start(batch, x[:, part * per_part : (part + 1) * per_part], float(schedule.sigmas[0]))
        program = programs.get((len(rows), *size))
        if program is None:
            tokens = math.prod(nets.configs["transformer"].grid(*size[:3]))
            per_shard = [tokens * -(-number // parallel.data_degree()) for number in (len(rows), 2 * len(rows))]
            guidance = choose(cfg.guidance_mode, scales, *per_shard)
            denoiser = Denoiser(network, segments, schedule, solver, guidance, scan=cfg.loop == "scan")
            with stages("compile"):
                program = programs[len(rows), *size] = denoiser.compile(params, x, contexts)
        state = states.pop(unit) if unit in states else program.init(x)
        with stages("denoise", segment.stop - segment.start, "steps") as advance:
            states[unit] = _run(program, params, contexts, state, segment, advance, stages, watch)
        del transformer, params, contexts  # the next net may need their memory
        if segment == segments[-1]:
            latents = distributed.fetch(raw.positive.frames.keep(states.pop(unit).x))
            made[index].append(latents[:, cut.leading :])
            if part == count - 1:
                yield tuple(batch[:real]), np.concatenate(made.pop(index), axis=1)[:real]


def _batches(videos: Sequence[Example], limit: int) -> Iterator[tuple[list[int], int]]:
    """(rows of `videos`, how many of them count) of each batch: of one size, and a short last one filled up."""
    for size in dict.fromkeys((video.height, video.width) for video in videos):
        rows = [row for row, video in enumerate(videos) if (video.height, video.width) == size]
        step = min(len(rows), limit)
        for first in range(0, len(rows), step):
            batch = rows[first : first + step]
            yield batch + batch[-1:] * (step - len(batch)), len(batch)


def _prepare(graph: Any, params: Any, context: Context) -> PreparedContext:
    """What the conditioning gives every step, computed once (see `WanTransformer.prepare`)."""
    return nnx.merge(graph, params).prepare(context)


def _run(
    program: Program,
    params: Any,
    contexts: Contexts,
    state: State,
    segment: Segment,
    advance: Advance,
    stages: Stages,
    watch: Watch,
) -> State:
    """One segment, telling progress and clock of every call of the program: a step, or all steps of a scan."""
    done = segment.start
    with contextlib.ExitStack() as step:
        step.enter_context(stages.clock.step())

        def on_step(i: int, n: int, state: State) -> None:
            nonlocal done
            step.close()
            watch(i, state.x)
            advance(i + 1 - done)
            done = i + 1
            if done < segment.stop:
                step.enter_context(stages.clock.step())

        return jax.block_until_ready(program.advance(params, contexts, state, segment, on_step))
