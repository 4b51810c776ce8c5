"""From text embeddings to latents, batch by batch: the strategies that the config names, compiled once per size."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float

from maxdiffusion import conditioning, parallel, variants
from maxdiffusion.config import Config, parts
from maxdiffusion.config.examples import Example
from maxdiffusion.denoise.experts import LoadedExperts
from maxdiffusion.denoise.given import Batch
from maxdiffusion.denoise.guidance import TwoPassGuidance, choose
from maxdiffusion.denoise.loop import Denoiser, Program, State
from maxdiffusion.denoise.network import Network, split
from maxdiffusion.denoise.noise import noise
from maxdiffusion.denoise.schedule import Schedule
from maxdiffusion.denoise.segments import Segment, execution_order, segments
from maxdiffusion.denoise.solvers import SOLVERS, Solver
from maxdiffusion.models.dit import Context, DiTConfig, PreparedContext
from maxdiffusion.models.dit.context import Contexts
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
      videos: what to make; those of one shape share their batches and their program.
      nets: what to load from.
      shape: f h w c of one video's latents, of the size that `cfg` says.
      given: the noise of every video; None draws it from each video's seed.
      inputs: what `conditioning.read` found.
      stages: timing and progress.
      watch: sees the latents after every call of the program: a step, or all steps of a scan.
    """
    batches = list(batched(cfg, videos))
    recipe = Recipe.of(cfg)
    count, network_config = len(parts.of(cfg).starts), nets.configs["transformer"]
    conditions = conditioning.encode(cfg, videos, nets, stages, recipe.guided, inputs)

    loaded = LoadedExperts(functools.partial(stages.load, nets), cfg.expert_residency)
    programs: dict[tuple[int, ...], Program] = {}
    states: dict[tuple[int, int], State] = {}
    made: dict[int, list[np.ndarray]] = collections.defaultdict(list)
    units = [(index, part) for index in range(len(batches)) for part in range(count)]
    for unit, segment in execution_order(recipe.segments, units, cfg.expert_residency):
        index, part = unit
        rows, real = batches[index]
        batch = [videos[row] for row in rows]
        size = part_shape(cfg, batch[0], shape[3])
        raw = conditions.contexts(batch, segment.guided, made[index])
        transformer = loaded[segment.net]
        network, params = split(transformer)
        with stages("text"):
            prepare = prepare_program(network_config, len(rows))
            prepared = (prepare(nnx.graphdef(transformer), params, context) for context in raw if context is not None)
            contexts = jax.block_until_ready(Contexts(*prepared))
        if unit not in states:
            seeds, whole = [video.seed for video in batch], (count * size[0], *size[1:])
            x = noise(seeds, whole) if given is None else parallel.put(given[rows], axes.BATCH)
            x = x[:, part * size[0] : (part + 1) * size[0]]
            x = conditions.start(batch, x, float(recipe.schedule.sigmas[0]))
        program = programs.get((len(rows), *batch[0].shape))
        if program is None:
            denoiser = recipe.denoiser(cfg, network, network_config, len(rows), size)
            with stages("compile"):
                program = programs[len(rows), *batch[0].shape] = denoiser.compile(params, x, contexts.positive)
        state = states.pop(unit) if unit in states else program.init(x)
        with stages("denoise", segment.stop - segment.start, "steps") as advance:
            states[unit] = _run(program, params, contexts, state, segment, advance, stages, watch)
        del transformer, params, contexts  # the next net may need their memory
        if segment == recipe.segments[-1]:
            latents = distributed.fetch(raw.positive.frames.keep(states.pop(unit).x))
            made[index].append(latents[:, parts.of(cfg).leading :])
            if part == count - 1:
                if index == len(batches) - 1:
                    loaded.free()  # the decoder may need their memory
                yield tuple(batch[:real]), np.concatenate(made.pop(index), axis=1)[:real]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a config says of the loop, before there is any data."""

    solver: Solver
    schedule: Schedule
    segments: tuple[Segment, ...]

    @classmethod
    def of(cls, cfg: Config) -> Recipe:
        """Raises UserError: the schedule cannot be made, or `strength` leaves none of its steps."""
        solver = SOLVERS[cfg.solver]
        schedule = solver.schedule(cfg.num_inference_steps, cfg.flow_shift)
        if cfg.video and conditioning.START in variants.get(cfg.model_name).conditions:
            schedule = schedule.last(cfg.strength)
        scales = cfg.guidance_scale, cfg.guidance_scale_2
        return cls(solver, schedule, segments(schedule.timesteps, cfg.boundary_ratio, *scales))

    @property
    def guided(self) -> bool:
        """Whether any segment is: negative prompts are encoded."""
        return any(segment.guided for segment in self.segments)

    def denoiser(
        self, cfg: Config, network: Network, config: DiTConfig, rows: int, shape: tuple[int, int, int, int]
    ) -> Denoiser:
        """For batches of `rows` videos' latents of f h w c."""
        tokens, shards = math.prod(config.grid(*shape[:3])), parallel.data_degree()
        per_shard = [tokens * -(-number // shards) for number in (rows, 2 * rows)]
        guidance = choose(cfg.guidance_mode, *per_shard) if self.guided else TwoPassGuidance()
        return Denoiser(network, self.segments, self.schedule, self.solver, guidance, scan=cfg.loop == "scan")


def part_shape(cfg: Config, video: Example, channels: int) -> tuple[int, int, int, int]:
    """Of the latents (f h w c) that are denoised at once, leading frames included."""
    cut = parts.of(cfg)
    f, h, w = variants.get(cfg.model_name).latent_grid(cut.length, video.height, video.width)
    return cut.leading + f, h, w, channels


def batched(cfg: Config, videos: Sequence[Example]) -> Iterator[tuple[list[int], int]]:
    """(rows of `videos`, how many of them count) of each batch under the current placement."""
    return _batches(videos, cfg.per_device_batch_size * parallel.data_degree())


def _batches(videos: Sequence[Example], limit: int) -> Iterator[tuple[list[int], int]]:
    """Of one shape each, and a short last one filled up."""
    for shape in dict.fromkeys(video.shape for video in videos):
        rows = [row for row, video in enumerate(videos) if video.shape == shape]
        step = min(len(rows), limit)
        for first in range(0, len(rows), step):
            batch = rows[first : first + step]
            yield batch + batch[-1:] * (step - len(batch)), len(batch)


def prepare_program(config: DiTConfig, rows: int) -> Any:
    """`WanTransformer.prepare` of a batch's context, jitted: (graph, parameters, context) -> prepared context.

    The result lies where the step's program expects it.
    """
    batch = parallel.like((rows,), jnp.float32, axes.BATCH).sharding
    heads = (rows, config.num_layers, 1, config.num_attention_heads, 1)
    sources = parallel.like(heads, jnp.float32, axes.BATCH, None, None, axes.HEADS, None).sharding
    return parallel.jit(_prepare, static_argnums=0, out_shardings=PreparedContext(sources, batch, batch))


def _prepare(graph: Any, params: Any, context: Context) -> PreparedContext:
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
