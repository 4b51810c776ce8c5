"""Every program that a run compiles, said once: a run calls them, a plan compiles them for devices elsewhere.

All arguments are abstract (shapes with shardings), so that neither a checkpoint nor memory is needed.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from maxdiffusion import conditioning, parallel
from maxdiffusion.conditioning import text
from maxdiffusion.denoise.experts import program_calls
from maxdiffusion.denoise.guidance import TwoPassGuidance, choose
from maxdiffusion.denoise.loop import Denoiser
from maxdiffusion.denoise.network import split
from maxdiffusion.models.dit.config import DiTConfig
from maxdiffusion.models.dit.context import Context, PreparedContext
from maxdiffusion.parallel import axes
from maxdiffusion.request import Video
from maxdiffusion.request.session import Setup


@dataclasses.dataclass(frozen=True)
class Program:
    """A program of a run.

    Attributes:
      name: `image`, `encode`, `text`, `prepare`, `step` or `decode`; programs of one name differ in their shapes.
      times: how often the run calls it; with loop=scan a call is all steps of an expert.
      resident: bytes per device of what is in memory beside its arguments.
      lower: makes `lowered`.
    """

    name: str
    times: int
    resident: int
    lower: Callable[[], jax.stages.Lowered]

    @functools.cached_property
    def lowered(self) -> jax.stages.Lowered:
        """Its `compile()` takes the compiler's options by itself, as the run's does."""
        return self.lower()


def programs(setup: Setup) -> Iterator[Program]:
    """All programs of a run, in the order in which they first run; nothing is lowered before it is asked for."""
    run = _Run(setup)
    if not setup.job.cfg.decode_latents:
        yield from run.conditioning()
        yield from run.denoising()
    yield from run.decoding()


@dataclasses.dataclass(frozen=True, eq=False)
class BatchPrograms:
    """What denoises the batches of `rows` videos of one shape, under the current placement.

    Attributes:
      setup: the run.
      video: any of the videos.
      rows: of a batch.
    """

    setup: Setup
    video: Video
    rows: int

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """F h w c of the latents that are denoised at once."""
        return self.setup.job.segment_shape(self.video, self.setup.configs["vae"].z_dim)

    @functools.cached_property
    def transformer(self) -> nnx.Module:
        """The first expert, abstract; the other has the same shapes."""
        return self.setup.abstract(self.setup.recipe.experts[0].net)

    @functools.cached_property
    def noise(self) -> jax.ShapeDtypeStruct:
        """The latents that a batch starts from."""
        return parallel.like((self.rows, *self.shape), jnp.float32, axes.BATCH)

    @functools.cached_property
    def context(self) -> Context:
        """What one branch of guidance is conditioned on."""
        job, configs = self.setup.job, self.setup.configs
        videos = [video for video in job.videos if video.shape == self.video.shape]
        fields = conditioning.shapes(job, videos, configs, job.latent_grid(self.video)).fields
        words: Any = parallel.like((self.rows, text.MAX_LENGTH, configs["transformer"].text_dim), jnp.float32)
        return Context(
            words, **jax.tree.map(lambda leaf: parallel.like((self.rows, *leaf.shape), leaf.dtype), dict(fields))
        )

    @functools.cached_property
    def prepare(self) -> jax.stages.Lowered:
        """`WanTransformer.prepare`: (parameters, context) -> what every step takes, laid out as a step takes it."""
        config: DiTConfig = self.setup.configs["transformer"]
        batch = parallel.like((self.rows,), jnp.float32, axes.BATCH).sharding
        heads = (self.rows, config.num_layers, 1, config.num_attention_heads, 1)
        sources = parallel.like(heads, jnp.float32, axes.BATCH, None, None, axes.HEADS, None).sharding
        jitted = parallel.jit(_prepare, static_argnums=0, out_shardings=PreparedContext(sources, batch, batch))
        return jitted.lower(nnx.graphdef(self.transformer), split(self.transformer)[1], self.context)

    @functools.cached_property
    def denoiser(self) -> Denoiser:
        """The loop with its strategies."""
        recipe, cfg = self.setup.recipe, self.setup.job.cfg
        tokens = math.prod(self.setup.configs["transformer"].grid(*self.shape[:3]))
        per_shard = [tokens * -(-number // parallel.data_degree()) for number in (self.rows, 2 * self.rows)]
        guidance = choose(cfg.guidance_mode, *per_shard) if recipe.guided else TwoPassGuidance()
        network, _ = split(self.transformer)
        return Denoiser(network, recipe.experts, recipe.schedule, recipe.solver, guidance, scan=cfg.loop == "scan")

    @property
    def arguments(self) -> tuple[Any, Any, Any]:
        """Of the denoiser: parameters, latents and the context of one branch."""
        return split(self.transformer)[1], self.noise, self.prepare.out_info


def _prepare(graph: Any, params: Any, context: Context) -> PreparedContext:
    return nnx.merge(graph, params).prepare(context)


def nbytes(tree: Any) -> int:
    """Bytes per device of abstract arrays."""
    leaves = jax.tree.leaves(tree)
    shapes = [leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape for leaf in leaves]
    return sum(math.prod(shape) * leaf.dtype.itemsize for shape, leaf in zip(shapes, leaves, strict=True))


class _Run:
    """A run whose inputs are not read and whose networks are not loaded."""

    def __init__(self, setup: Setup) -> None:
        self.setup, self.job, self.configs = setup, setup.job, setup.configs
        self.cut, self.recipe = setup.job.segments, setup.recipe
        with parallel.use(setup.placement):
            batches = list(self.job.batches(parallel.data_degree()))
        self.by_shape: dict[tuple[int, int, int], list[tuple[list[Video], int]]] = {}
        for rows, real in batches:
            batch = [self.job.videos[row] for row in rows]
            self.by_shape.setdefault(batch[0].shape, []).append((batch, real))
        self.several, self.units = len(batches) > 1, len(batches) * len(self.cut)

    def make(self, name: str, times: int, resident: int, lower: Callable[[], jax.stages.Lowered]) -> Program:
        def under_placement() -> jax.stages.Lowered:
            with parallel.use(self.setup.placement):
                return lower()

        return Program(name, times, resident, under_placement)

    def like(self, shape: tuple[int, ...], *logical: str | None, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        with parallel.use(self.setup.placement):
            return parallel.like(shape, dtype, *logical)

    def experts(self, running: int) -> int:
        """Bytes per device of the transformers in memory, without those that are the program's own."""
        names = {expert.net for expert in self.recipe.experts}
        loaded = 1 if self.job.cfg.expert_residency == "in_turn" else len(names)
        return (loaded - running) * nbytes(nnx.state(self.setup.abstract(self.recipe.experts[0].net)))

    def vaes(self, copies: int) -> int:
        """Bytes per device of VAEs: so many, and the one that stays while segments hand frames on to each other."""
        return (copies + self.job.spec.task.segmented) * nbytes(nnx.state(self.setup.abstract("vae")))

    def vae(self, name: str, times: int, resident: int, x: jax.ShapeDtypeStruct) -> Iterator[Program]:
        vae: Any = self.setup.abstract("vae")
        for program, number in enumerate(vae.calls(name, x.shape)):
            lower = functools.partial(vae.lower, name, x, program)
            yield self.make(name, times * number, resident + nbytes(x), lower)

    def conditioning(self) -> Iterator[Program]:
        for shape, batches in self.by_shape.items():
            videos = [video for video in self.job.videos if video.shape == shape]
            grid = self.job.latent_grid(batches[0][0][0])
            shapes = conditioning.shapes(self.job, videos, self.configs, grid)
            if shapes.images:
                from maxdiffusion.conditioning import image

                side = self.configs["image_encoder"].image_size
                net = nnx.split(self.setup.abstract("image_encoder"))
                lower = functools.partial(_lower, image.program, *net, self.like((1, side, side, 3)))
                yield self.make("image", shapes.images, 0, lower)
            # Of several segments, all but the first are encoded while the transformer waits.
            resident = self.experts(0) if len(self.cut) > 1 else 0
            for (frames, height, width), times in shapes.encoded.items():
                yield from self.vae("encode", times, resident, self.like((1, frames, height, width, 3)))
        prompts = {video.prompt for video in self.job.videos}
        if self.setup.recipe.guided:
            prompts |= {video.negative_prompt for video in self.job.videos}
        net = nnx.split(self.setup.abstract("text_encoder"))
        tokens = [jax.ShapeDtypeStruct((1, text.MAX_LENGTH), dtype) for dtype in (jnp.int32, bool)]
        yield self.make("text", len(prompts), 0, functools.partial(_lower, text.program, *net, *tokens))

    def denoising(self) -> Iterator[Program]:
        for batches in self.by_shape.values():
            for rows, count in collections.Counter(len(batch) for batch, _ in batches).items():
                with parallel.use(self.setup.placement):
                    batch = BatchPrograms(self.setup, batches[0][0][0], rows)
                    context, noise = nbytes(batch.context), batch.noise
                    state = jax.eval_shape(self.setup.recipe.solver.init, noise)
                yield from self.batch(batch, context, state, count * len(self.cut))

    def batch(self, batch: BatchPrograms, context: int, state: Any, units: int) -> Iterator[Program]:
        """`units` times the same: a segment of a batch; `context` is the bytes of one branch's."""
        others = self.experts(1) + self.vaes(self.several)
        times = units * sum(1 + expert.guided for expert in self.recipe.experts)
        resident = others + context * self.setup.recipe.guided
        yield self.make("prepare", times, resident, lambda: batch.prepare)

        @functools.cache
        def steps() -> dict[tuple[bool, int], jax.stages.Lowered]:
            return batch.denoiser.lower(*batch.arguments)[1]

        # In turn, all units wait between two experts: each with its latents and as many velocities as a solver keeps.
        in_turn = len(self.recipe.experts) > 1 and self.job.cfg.expert_residency == "in_turn"
        waiting = self.units - 1 if in_turn else 0
        others = resident + context + waiting * nbytes(jax.tree.map(lambda a: self.like(a.shape, axes.BATCH), state))

        def step(program: tuple[bool, int]) -> jax.stages.Lowered:
            return steps()[program]

        for program, number in program_calls(self.recipe.experts, self.job.cfg.loop == "scan").items():
            yield self.make("step", units * number, others, functools.partial(step, program))

    def decoding(self) -> Iterator[Program]:
        channels = self.configs["vae"].z_dim
        for batches in self.by_shape.values():
            shape = *self.job.latent_grid(batches[0][0][0]), channels
            resident = self.vaes(0) + (self.experts(0) if self.units > 1 else 0)
            counts = collections.Counter(real for _, real in batches for _ in self.cut.starts)
            counts[1] += (len(self.cut) - 1) * sum(len(batch) for batch, _ in batches)  # frames handed on
            for rows, times in (+counts).items():
                yield from self.vae("decode", times, resident, self.like((rows, *shape), axes.BATCH))


def _lower(program: Callable[[], Any], *args: Any) -> jax.stages.Lowered:
    return program().lower(*args)
