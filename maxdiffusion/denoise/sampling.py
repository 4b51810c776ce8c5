"""From text embeddings to latents, batch by batch: the strategies that the config names, compiled once."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float

from maxdiffusion import conditioning, parallel
from maxdiffusion.config import Config
from maxdiffusion.config.examples import examples
from maxdiffusion.denoise.experts import SingleExpert
from maxdiffusion.denoise.given import Batch
from maxdiffusion.denoise.guidance import Contexts, NoGuidance, choose
from maxdiffusion.denoise.loop import Denoiser, Program, State
from maxdiffusion.denoise.network import split
from maxdiffusion.denoise.noise import noise
from maxdiffusion.denoise.solvers import SOLVERS
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
    stages: Stages,
    watch: Watch = lambda i, latents: None,
) -> Iterator[Batch]:
    """Encodes all prompts, loads the transformer, then yields each batch of videos as soon as its latents are there.

    Args:
      cfg: the run.
      nets: what to load from.
      shape: f h w c of one video's latents.
      given: the noise of every video; None draws it from each video's seed.
      stages: timing and progress.
      watch: sees the latents after every call of the program: a step, or all steps of a scan.
    """
    embeddings = conditioning.encode(cfg, nets, stages)
    transformer = stages.load(nets, "transformer")
    network, params = split(transformer)
    videos = examples(cfg)
    size = min(len(videos), cfg.per_device_batch_size * parallel.data_degree())
    tokens = math.prod(nets.configs["transformer"].grid(*shape[:3])) * -(-size // parallel.data_degree())
    guidance = choose(cfg.guidance_mode, cfg.guidance_scale, tokens)
    solver = SOLVERS[cfg.solver]
    schedule = solver.schedule(cfg.num_inference_steps, cfg.flow_shift)
    denoiser = Denoiser(network, SingleExpert(params), schedule, solver, guidance, scan=cfg.loop == "scan")
    prepare = jax.jit(functools.partial(_prepare, nnx.graphdef(transformer)))

    program = None
    for first in range(0, len(videos), size):
        batch = videos[first : first + size]
        rows = [min(first + i, len(videos) - 1) for i in range(size)]  # a short last batch is filled up
        full = [videos[row] for row in rows]
        x = noise([video.seed for video in full], shape) if given is None else jnp.asarray(given[rows])
        with stages("text"):
            contexts = embeddings.contexts(full, guided=not isinstance(guidance, NoGuidance))
            contexts = jax.block_until_ready(jax.tree.map(functools.partial(prepare, params), contexts))
        if program is None:
            with stages("compile"):
                program = denoiser.compile(x, contexts)
        with stages("denoise", len(schedule), "steps") as advance:
            latents = _run(program, x, contexts, advance, stages, watch)
        yield batch, np.asarray(latents[: len(batch)])


def _prepare(graph: Any, params: Any, context: jax.Array) -> Any:
    """What the text gives every step, computed once (see `WanTransformer.prepare`)."""
    return nnx.merge(graph, params).prepare(context)


def _run(
    program: Program, x: jax.Array, contexts: Contexts, advance: Advance, stages: Stages, watch: Watch
) -> jax.Array:
    """The loop, telling progress and clock of every call of the program: a step, or all steps of a scan."""
    done = 0
    with contextlib.ExitStack() as step:
        step.enter_context(stages.clock.step())

        def on_step(i: int, n: int, state: State) -> None:
            nonlocal done
            step.close()
            watch(i, state.x)
            advance(i + 1 - done)
            done = i + 1
            if done < n:
                step.enter_context(stages.clock.step())

        return jax.block_until_ready(program(x, contexts, on_step))
