"""The programs of a run, from shapes alone: its own functions, shardings and flags, without a checkpoint."""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from maxdiffusion import conditioning, parallel, variants
from maxdiffusion.attention import AttentionPlan
from maxdiffusion.conditioning import images, text
from maxdiffusion.config import Config, parts
from maxdiffusion.config.examples import Example, examples
from maxdiffusion.denoise import sampling
from maxdiffusion.denoise.guidance import Contexts
from maxdiffusion.denoise.network import split
from maxdiffusion.models.dit import Context
from maxdiffusion.parallel import axes, startup
from maxdiffusion.weights.loader import placed
from maxdiffusion.weights.nets import builders_of


@dataclasses.dataclass(frozen=True)
class Lowered:
    """A program of a run.

    Attributes:
      name: `image`, `encode`, `text`, `prepare`, `step` or `decode`; programs of one name differ in their shapes.
      times: how often the run calls it; with loop=scan a call is all steps of a segment.
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


def programs(cfg: Config, configs: Mapping[str, Any], devices: parallel.Devices) -> Iterator[Lowered]:
    """All programs of a run, in the order in which they first run; nothing is lowered before it is asked for.

    Args:
      cfg: the run.
      configs: of its nets, by folder (see `official.configs_of`).
      devices: where it would run; descriptions will do.

    Raises:
      UserError: the run would be refused.
    """
    plan, placement, _ = startup.lay_out(cfg, configs, devices)
    run = _Run(cfg, configs, plan, placement)
    if not cfg.decode_latents:
        yield from run.conditioning()
        yield from run.denoising()
    yield from run.decoding()


def nbytes(tree: Any) -> int:
    """Bytes per device of arrays that are described."""
    leaves = jax.tree.leaves(tree)
    shapes = [leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape for leaf in leaves]
    return sum(math.prod(shape) * leaf.dtype.itemsize for shape, leaf in zip(shapes, leaves, strict=True))


class _Run:
    """A run whose inputs are not read and whose nets are not loaded."""

    def __init__(
        self, cfg: Config, configs: Mapping[str, Any], plan: AttentionPlan, placement: parallel.Placement
    ) -> None:
        self.cfg, self.configs, self.placement = cfg, configs, placement
        self.parts, self.recipe = parts.of(cfg), sampling.Recipe.of(cfg)
        self.build = builders_of(cfg, plan)
        self.nets: dict[str, nnx.Module] = {}
        self.videos = examples(cfg)
        with parallel.use(placement):
            batches = [([self.videos[row] for row in rows], real) for rows, real in sampling.batched(cfg, self.videos)]
        self.by_shape: dict[tuple[int, int, int], list[tuple[list[Example], int]]] = {}
        for batch, real in batches:
            self.by_shape.setdefault(batch[0].shape, []).append((batch, real))
        self.several, self.units = len(batches) > 1, len(batches) * len(self.parts.starts)

    def net(self, name: str) -> Any:
        if name not in self.nets:
            self.nets[name] = placed(self.build[name](self.configs[name]), self.placement)
        return self.nets[name]

    def make(self, name: str, times: int, resident: int, lower: Callable[[], jax.stages.Lowered]) -> Lowered:
        def under_placement() -> jax.stages.Lowered:
            with parallel.use(self.placement):
                return lower()

        return Lowered(name, times, resident, under_placement)

    def like(self, shape: tuple[int, ...], *logical: str | None, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        with parallel.use(self.placement):
            return parallel.like(shape, dtype, *logical)

    def describe(self, shape: tuple[int, int, int]) -> conditioning.Described:
        """What videos of that `Example.shape` are conditioned on beside the text."""
        videos = [video for video in self.videos if video.shape == shape]
        grid = variants.get(self.cfg.model_name).latent_grid(self.parts.length, *shape[:2])
        return conditioning.describe(self.cfg, videos, self.configs, grid)

    def experts(self, running: int) -> int:
        """Bytes per device of the transformers in memory, without those that are the program's own."""
        names = {segment.net for segment in self.recipe.segments}
        loaded = 1 if self.cfg.expert_residency == "in_turn" else len(names)
        return (loaded - running) * nbytes(nnx.state(self.net(self.recipe.segments[0].net)))

    def vaes(self, copies: int) -> int:
        """Bytes per device of VAEs: so many, and the one that stays while parts hand frames on to each other."""
        animated = conditioning.PERFORMANCE in variants.get(self.cfg.model_name).conditions
        return (copies + animated) * nbytes(nnx.state(self.net("vae")))

    def vae(self, name: str, times: int, resident: int, x: jax.ShapeDtypeStruct) -> Iterator[Lowered]:
        vae = self.net("vae")
        for program, calls in enumerate(vae.calls(name, x.shape)):
            lower = functools.partial(vae.lower, name, x, program)
            yield self.make(name, times * calls, resident + nbytes(x), lower)

    def conditioning(self) -> Iterator[Lowered]:
        for shape in self.by_shape:
            described = self.describe(shape)
            if described.images:
                side = self.configs["image_encoder"].image_size
                net = nnx.split(self.net("image_encoder"))
                pixels = self.like((1, side, side, 3))
                lower = functools.partial(_lower, images.program, *net, pixels)
                yield self.make("image", described.images, 0, lower)
            # Of several parts, all but the first are shown while the transformer waits.
            resident = self.experts(0) if len(self.parts.starts) > 1 else 0
            for (frames, height, width), times in described.encoded.items():
                yield from self.vae("encode", times, resident, self.like((1, frames, height, width, 3)))
        prompts = [video.prompt for video in self.videos]
        prompts += [video.negative_prompt for video in self.videos if self.recipe.guided]
        net = nnx.split(self.net("text_encoder"))
        tokens = [jax.ShapeDtypeStruct((1, text.MAX_LENGTH), dtype) for dtype in (jnp.int32, bool)]
        yield self.make("text", len(set(prompts)), 0, functools.partial(_lower, text.program, *net, *tokens))

    def denoising(self) -> Iterator[Lowered]:
        for shape, batches in self.by_shape.items():
            fields = self.describe(shape).fields
            for rows, count in collections.Counter(len(batch) for batch, _ in batches).items():
                yield from self.batch(batches[0][0][0], fields, rows, count * len(self.parts.starts))

    def batch(self, video: Example, fields: Mapping[str, Any], rows: int, units: int) -> Iterator[Lowered]:
        """`units` times the same: a part of a batch of `rows` videos."""
        config, segments = self.configs["transformer"], self.recipe.segments
        transformer = self.net(segments[0].net)
        network, params = split(transformer)
        shape = sampling.part_shape(self.cfg, video, self.configs["vae"].z_dim)
        x = self.like((rows, *shape), axes.BATCH)
        words: Any = self.like((rows, text.MAX_LENGTH, config.text_dim))
        context = Context(words, **jax.tree.map(lambda leaf: self.like((rows, *leaf.shape)), dict(fields)))
        branches = 2 if self.recipe.guided else 1
        others = self.experts(1) + self.vaes(self.several) + nbytes(context) * (branches - 1)

        @functools.cache
        def prepare() -> jax.stages.Lowered:
            return sampling.preparing(config, rows).lower(nnx.graphdef(transformer), params, context)

        yield self.make("prepare", units * branches * len(segments), others, prepare)

        @functools.cache
        def steps() -> dict[int, jax.stages.Lowered]:
            prepared = prepare().out_info
            denoiser = self.recipe.denoiser(self.cfg, network, config, rows, shape)
            return denoiser.lower(params, x, Contexts(*[prepared] * branches))[1]

        def step(length: int) -> jax.stages.Lowered:
            return steps()[length]

        # In turn, all units wait between two experts: each with its latents and as many velocities as a solver keeps.
        waiting = self.units - 1 if len(segments) > 1 and self.cfg.expert_residency == "in_turn" else 0
        with parallel.use(self.placement):
            state = jax.eval_shape(self.recipe.solver.init, x)
        others += nbytes(context) + waiting * nbytes(jax.tree.map(lambda a: self.like(a.shape, axes.BATCH), state))
        lengths = [segment.stop - segment.start for segment in segments]
        counts = collections.Counter(lengths) if self.cfg.loop == "scan" else {1: sum(lengths)}
        for length, times in counts.items():
            yield self.make("step", units * times, others, functools.partial(step, length))

    def decoding(self) -> Iterator[Lowered]:
        channels = self.configs["vae"].z_dim
        for batches in self.by_shape.values():
            frames, *size, _ = sampling.part_shape(self.cfg, batches[0][0][0], channels)
            resident = self.vaes(0) + (self.experts(0) if self.units > 1 else 0)
            calls = collections.Counter(real for _, real in batches for _ in self.parts.starts)
            calls[1] += (len(self.parts.starts) - 1) * sum(len(batch) for batch, _ in batches)  # frames handed on
            for rows, times in (+calls).items():
                x = self.like((rows, frames - self.parts.leading, *size, channels), axes.BATCH)
                yield from self.vae("decode", times, resident, x)


def _lower(program: Callable[[], Any], *args: Any) -> jax.stages.Lowered:
    return program().lower(*args)
