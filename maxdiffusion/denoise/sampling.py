"""From text embeddings to latents, batch by batch: the strategies that the config names, compiled once."""

from __future__ import annotations

import collections
import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float

from maxdiffusion import conditioning, parallel
from maxdiffusion.config import Config, parts
from maxdiffusion.config.examples import examples
from maxdiffusion.denoise import experts
from maxdiffusion.denoise.experts import Segment
from maxdiffusion.denoise.given import Batch
from maxdiffusion.denoise.guidance import Contexts, NoGuidance, choose
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
      nets: what to load from.
      shape: f h w c of one video's latents.
      given: the noise of every video; None draws it from each video's seed.
      inputs: what `conditioning.read` found.
      stages: timing and progress.
      watch: sees the latents after every call of the program: a step, or all steps of a scan.
    """
    videos = examples(cfg)
    size = min(len(videos), cfg.per_device_batch_size * parallel.data_degree())
    solver = SOLVERS[cfg.solver]
    schedule = solver.schedule(cfg.num_inference_steps, cfg.flow_shift)
    if conditioning.START in inputs.by_kind:
        schedule = schedule.last(cfg.strength)
    plan = parts.of(cfg)
    per_part, count = plan.leading + shape[0] // len(plan.starts), len(plan.starts)
    shape = (per_part * count, *shape[1:])
    strategy = experts.choose(cfg.boundary_ratio, cfg.guidance_scale, cfg.guidance_scale_2)
    segments = strategy.segments(schedule.timesteps)
    tokens = math.prod(nets.configs["transformer"].grid(per_part, *shape[1:3]))
    per_shard = [tokens * -(-rows // parallel.data_degree()) for rows in (size, 2 * size)]
    guidance = choose(cfg.guidance_mode, [segment.guidance_scale for segment in segments], *per_shard)
    guided = not isinstance(guidance, NoGuidance)
    conditions = conditioning.encode(cfg, nets, stages, guided, inputs)

    prepare = jax.jit(_prepare, static_argnums=0)
    residents = experts.Residents(functools.partial(stages.load, nets), cfg.expert_residency)
    program: Program | None = None
    states: dict[tuple[int, int], State] = {}
    made: dict[int, list[np.ndarray]] = collections.defaultdict(list)
    units = [(first, part) for first in range(0, len(videos), size) for part in range(count)]
    for (first, part), segment in experts.turns(segments, units, cfg.expert_residency):
        rows = [min(first + i, len(videos) - 1) for i in range(size)]  # a short last batch is filled up
        raw = conditions.contexts([videos[row] for row in rows], guided, made[first])
        transformer = residents[segment.net]
        network, params = split(transformer)
        with stages("text"):
            prepared = (prepare(nnx.graphdef(transformer), params, context) for context in raw if context is not None)
            contexts = jax.block_until_ready(Contexts(*prepared))
        if (first, part) not in states:
            batch = [videos[row] for row in rows]
            seeds = [video.seed for video in batch]
            x = noise(seeds, shape) if given is None else parallel.put(given[rows], axes.BATCH)
            x = x[:, part * per_part : (part + 1) * per_part]
            x = conditions.start(batch, x, float(schedule.sigmas[0]))
        if program is None:
            denoiser = Denoiser(network, segments, schedule, solver, guidance, scan=cfg.loop == "scan")
            with stages("compile"):
                program = denoiser.compile(params, x, contexts)
        state = states.pop((first, part)) if (first, part) in states else program.init(x)
        with stages("denoise", segment.stop - segment.start, "steps") as advance:
            states[first, part] = _run(program, params, contexts, state, segment, advance, stages, watch)
        del transformer, params, contexts  # the next net may need their memory
        if segment == segments[-1]:
            latents = distributed.fetch(raw.positive.frames.keep(states.pop((first, part)).x))
            made[first].append(latents[:, plan.leading :])
            if part == count - 1:
                yield videos[first : first + size], np.concatenate(made.pop(first), axis=1)[: len(videos) - first]


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
