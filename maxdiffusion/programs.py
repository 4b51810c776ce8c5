"""All programs of a run: a run compiles and calls them, a plan compiles them for devices elsewhere.

All arguments are abstract (shapes with shardings), so that neither a checkpoint nor memory is needed.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from maxdiffusion import conditioning, parallel
from maxdiffusion.conditioning import text
from maxdiffusion.conditioning.kind import Shapes
from maxdiffusion.config.schema import Config
from maxdiffusion.denoise.experts import IN_TURN, ExpertSteps, from_step, program_calls
from maxdiffusion.denoise.guidance import TwoPassGuidance, choose
from maxdiffusion.denoise.loop import Denoiser
from maxdiffusion.denoise.network import split
from maxdiffusion.models.dit.config import Animate2Config, DiTConfig, S2VConfig
from maxdiffusion.models.dit.context import Context, PreparedContext, Shared, map_batched
from maxdiffusion.models.wav2vec2.config import SAMPLE_RATE
from maxdiffusion.parallel import axes
from maxdiffusion.request import Video, caching
from maxdiffusion.request.session import Setup
from maxdiffusion.request.videos import halved


@dataclasses.dataclass(frozen=True)
class Program:
    """A program of a run.

    Attributes:
      name: `image`, `encode`, `audio`, `text`, `prepare`, `step` or `decode`; programs of one name differ in shapes.
      times: how often the run calls it; with loop=scan a call is several steps (`scanned_steps`).
      resident: bytes per device of what is in memory beside its arguments.
      lower: makes `lowered`.
      placement: under which it is lowered.
    """

    name: str
    times: int
    resident: int
    lower: Callable[[], jax.stages.Lowered]
    placement: parallel.Placement

    @functools.cached_property
    def lowered(self) -> jax.stages.Lowered:
        """The traced program; its `compile()` uses the compiler options of the run."""
        with parallel.use(self.placement):
            return self.lower()


def programs(setup: Setup) -> list[Program]:
    """All programs of a run, in the order in which they first run; none is lowered yet."""
    job = setup.job
    with parallel.use(setup.placement):
        batches: dict[tuple[int, int, int], tuple[BatchPrograms, list[int]]] = {}
        for rows, real in job.batches(parallel.data_degree()):
            video = job.videos[rows[0]]
            batches.setdefault(video.shape, (BatchPrograms(setup, video, len(rows)), []))[1].append(real)
        run = _Run(setup, tuple(batches.values()))
        denoised = () if job.cfg.decode_latents else (*run.conditioning(), *run.denoising())
        return [Program(*each, setup.placement) for each in (*denoised, *run.decoding())]


@dataclasses.dataclass(frozen=True, eq=False)
class BatchPrograms:
    """The programs that denoise batches of `rows` videos of one shape, under the current placement.

    Attributes:
      setup: the run.
      video: any of the videos.
      rows: of a batch.
      start: the first step; not 0 where a saved state is resumed.
      half: whether they are those of `halved`.
    """

    setup: Setup
    video: Video
    rows: int
    start: int = 0
    half: bool = False

    @functools.cached_property
    def halved(self) -> BatchPrograms:
        """The programs of the steps at half height and width."""
        setup = dataclasses.replace(self.setup, job=self.setup.job.halved)
        return dataclasses.replace(self, setup=setup, video=halved(self.video), half=True)

    @property
    def sizes(self) -> tuple[BatchPrograms, ...]:
        """The programs of each size, in the order of the steps."""
        return (self.halved, self) if self.setup.recipe.half_steps else (self,)

    @property
    def experts(self) -> tuple[ExpertSteps, ...]:
        """The experts' steps of this size."""
        return tuple(each for each in from_step(self.setup.recipe.experts, self.start) if each.half == self.half)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape f h w c of the latents that are denoised at once."""
        return self.setup.job.segment_shape(self.video, self.setup.configs["vae"].z_dim)

    @functools.cached_property
    def transformer(self) -> nnx.Module:
        """The first expert, abstract; the other has the same shapes."""
        return self.setup.abstract(self.setup.recipe.experts[0].net)

    @functools.cached_property
    def noise(self) -> jax.ShapeDtypeStruct:
        """The latents that a batch starts from."""
        return parallel.like((self.rows, *self.shape), jnp.float32, axes.BATCH)

    @property
    def keys(self) -> jax.ShapeDtypeStruct:
        """The keys of `step_noise`."""
        return parallel.like((self.rows, 2), jnp.uint32)

    @functools.cached_property
    def conditions(self) -> Shapes:
        """What conditioning computes for all videos of the shape."""
        job = self.setup.job
        videos = [video for video in job.videos if video.shape == self.video.shape]
        return conditioning.shapes(job, videos, self.setup.configs, job.latent_grid(self.video))

    @functools.cached_property
    def context(self) -> Context:
        """The conditioning of one branch of guidance."""
        width = self.setup.configs["transformer"].text_dim
        words: Any = parallel.like((self.rows, text.MAX_LENGTH, width), jnp.float32)
        whole = jax.tree.map(lambda leaf: parallel.like(leaf.shape, leaf.dtype), dict(self.conditions.fields))
        return Context(words, **map_batched(lambda leaf: parallel.like((self.rows, *leaf.shape), leaf.dtype), whole))

    @functools.cached_property
    def prepare(self) -> jax.stages.Lowered:
        """`WanTransformer.prepare`: (parameters, context) -> `PreparedContext` with the shardings of a step."""
        config: DiTConfig = self.setup.configs["transformer"]
        batch = parallel.like((self.rows,), jnp.float32, axes.BATCH).sharding
        heads = (self.rows, config.num_layers, 1, config.num_attention_heads, 1)
        sources = parallel.like(heads, jnp.float32, axes.BATCH, None, None, axes.HEADS, None).sharding
        adapter: Any = batch
        if isinstance(config.adapter, Animate2Config):
            from maxdiffusion.models.dit.animate2 import PreparedDriving

            keys = (1, parallel.degree(axes.SEQUENCE), 1, config.num_attention_heads, 1)
            driving = parallel.like(keys, jnp.float32, None, axes.SEQUENCE, None, axes.HEADS, None).sharding
            adapter = PreparedDriving(Shared(driving), batch)
        jitted = parallel.jit(_prepare, static_argnums=0, out_shardings=PreparedContext(sources, batch, adapter))
        return jitted.lower(nnx.graphdef(self.transformer), split(self.transformer)[1], self.context)

    @property
    def tokens(self) -> int:
        """Of a video in one pass of the network."""
        return self.setup.job.tokens(self.setup.configs["transformer"], self.video)

    @functools.cached_property
    def denoiser(self) -> Denoiser:
        """The loop with its strategies."""
        recipe, cfg = self.setup.recipe, self.setup.job.cfg
        per_shard = [self.tokens * -(-number // parallel.data_degree()) for number in (self.rows, 2 * self.rows)]
        guidance = choose(cfg.guidance_mode, *per_shard) if recipe.guided else TwoPassGuidance()
        network, _ = split(self.transformer)
        strategies = network, self.experts, recipe.schedule, recipe.solver, guidance
        scan, windows = scanned_steps(cfg), self.setup.job.windows
        return Denoiser(*strategies, self.setup.cache, scan, windows)

    def step(self, program: tuple[bool, int]) -> jax.stages.Lowered:
        """The denoiser's program of (guided, steps of one call)."""
        return self._steps[program]

    @functools.cached_property
    def _steps(self) -> dict[tuple[bool, int], jax.stages.Lowered]:
        return self.denoiser.lower(*self.arguments)[1]

    @property
    def arguments(self) -> tuple[Any, Any, Any, Any]:
        """Arguments of the denoiser: parameters, latents, the context of one branch and the keys of `step_noise`."""
        return split(self.transformer)[1], self.noise, self.prepare.out_info, self.keys


# Steps of a scanned call, after which a signal is answered and a state can be saved: about a minute of the 14B model on
# eight v6e or four v5p (3 to 9 s a step). Schedules of 10, 20, 30, 40 and 50 steps have calls of one length.
SCANNED = 10


def scanned_steps(cfg: Config) -> int | None:
    """The largest number of steps of a call; None: nothing is scanned."""
    return (cfg.checkpoint_steps or SCANNED) if cfg.loop == "scan" else None


def _prepare(graph: Any, params: Any, context: Context) -> PreparedContext:
    return nnx.merge(graph, params).prepare(context)


def nbytes(tree: Any) -> int:
    """Bytes per device of abstract arrays."""
    leaves = jax.tree.leaves(tree)
    shapes = [leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape for leaf in leaves]
    return sum(math.prod(shape) * leaf.dtype.itemsize for shape, leaf in zip(shapes, leaves, strict=True))


_Parts = tuple[str, int, int, Callable[[], jax.stages.Lowered]]  # name, times, resident, lower


@dataclasses.dataclass(frozen=True)
class _Run:
    """A run as batches of each shape: their programs, and the number of videos in each batch without padding.

    Its methods are called under the run's placement.
    """

    setup: Setup
    batches: tuple[tuple[BatchPrograms, list[int]], ...]

    @property
    def units(self) -> int:
        """Segments of batches."""
        return sum(len(reals) for _, reals in self.batches) * len(self.setup.job.segments)

    def experts(self, running: int) -> int:
        """Bytes per device of the transformers in memory, without the running ones."""
        segments = self.setup.recipe.experts
        loaded = 1 if self.setup.job.cfg.expert_residency == "in_turn" else len({each.net for each in segments})
        return (loaded - running) * nbytes(nnx.state(self.setup.abstract(segments[0].net)))

    def vaes(self, copies: int) -> int:
        """Bytes per device of so many VAEs, and of the one that stays loaded for the overlap of segments."""
        job = self.setup.job
        return (copies + (job.spec.task.segmented or job.chained)) * nbytes(nnx.state(self.setup.abstract("vae")))

    def vae(self, name: str, times: int, resident: int, x: jax.ShapeDtypeStruct) -> Iterator[_Parts]:
        vae: Any = self.setup.abstract("vae")
        for program, number in enumerate(vae.calls(name, x.shape)):
            yield name, times * number, resident + nbytes(x), functools.partial(vae.lower, name, x, program)

    def conditioning(self) -> Iterator[_Parts]:
        setup, job = self.setup, self.setup.job
        for batch, _ in self.batches:
            # Of several segments, all but the first are encoded while the transformer waits.
            resident = self.experts(0) if len(job.segments) > 1 else 0
            if batch.conditions.images:
                from maxdiffusion.conditioning import image

                side = setup.configs["image_encoder"].image_size
                arguments = *nnx.split(setup.abstract("image_encoder")), parallel.like((1, side, side, 3), jnp.float32)
                waiting = resident if job.chained else 0
                yield "image", batch.conditions.images, waiting, functools.partial(image.program().lower, *arguments)
            for (frames, height, width), times in batch.conditions.encoded.items():
                x = parallel.like((1, frames, height, width, 3), jnp.float32)
                yield from self.vae("encode", times, resident, x)
        if "audio_encoder" in setup.configs:
            from maxdiffusion.conditioning import sound

            frames = len(job.segments) * job.segments.length
            samples = parallel.like((1, math.ceil(SAMPLE_RATE * frames / job.cfg.fps)), jnp.float32)
            encoder = nnx.split(setup.abstract("audio_encoder"))
            yield "audio", 1, 0, functools.partial(sound.program().lower, *encoder, samples, job.cfg.fps, frames)
        tokens = [jax.ShapeDtypeStruct((1, text.MAX_LENGTH), dtype) for dtype in (jnp.int32, bool)]
        net = nnx.split(setup.abstract("text_encoder"))
        yield "text", len(job.prompts(setup.recipe.guided)), 0, functools.partial(text.program().lower, *net, *tokens)

    def denoising(self) -> Iterator[_Parts]:
        job, recipe = self.setup.job, self.setup.recipe
        # In turn, the batches of a group wait between two experts: each with its latents and a solver's velocities.
        in_turn = len(recipe.experts) > 1 and job.cfg.expert_residency == "in_turn"
        for batch, reals in self.batches:
            units, context = len(reals) * len(job.segments), nbytes(batch.context)
            decoder = self.units > len(job.segments) or job.cfg.cache_psnr is not None
            resident = self.experts(1) + self.vaes(decoder) + context * recipe.guided
            times = units * sum(1 + segment.guided for segment in recipe.experts)
            yield "prepare", times, resident, functools.partial(getattr, batch, "prepare")
            if in_turn:
                state = jax.eval_shape(recipe.solver.init, batch.noise)
                state = jax.tree.map(lambda leaf: parallel.like(leaf.shape, leaf.dtype, axes.BATCH), state)
                resident += (min(sum(len(reals) for _, reals in self.batches), IN_TURN) - 1) * nbytes(state)
            if not caching.is_static(job.cfg):
                for sized in batch.sizes:
                    for program, calls in program_calls(sized.experts, scanned_steps(job.cfg) or 1).items():
                        yield "step", units * calls, resident + context, functools.partial(sized.step, program)
                continue
            # Of a cache whose steps are known, those that are computed, one by one and beside the cache's state.
            cfg = job.cfg.model_copy(update={"cache": "none", "loop": "steps"})
            plain = dataclasses.replace(self.setup, job=dataclasses.replace(job, cfg=cfg))
            computed = BatchPrograms(plain, batch.video, batch.rows)
            for expert, count in zip(recipe.experts, caching.counted(job, recipe), strict=True):
                cached, sized = (each.halved if expert.half else each for each in (batch, computed))
                kept = nbytes(cached.denoiser.cache_state(expert.guided, *cached.arguments[:3]))
                lower = functools.partial(sized.step, (expert.guided, 1))
                yield "step", units * count, resident + context + kept, lower

    def decoding(self) -> Iterator[_Parts]:
        job, channels = self.setup.job, self.setup.configs["vae"].z_dim
        waiting = self.units > 1 or job.cfg.cache_psnr is not None
        resident = self.vaes(0) + (self.experts(0) if waiting else 0)
        for batch, reals in self.batches:
            f, h, w = job.latent_grid(batch.video)
            lengths = [f] * len(job.segments)  # in latents
            if job.segments.dropped:  # after those of the image, or of the last frames
                lengths = [f + 1, *[f + S2VConfig.MOTION] * (len(lengths) - 1)]
                handing = [(batch.rows, length) for _ in reals for length in lengths[:-1]]
            else:  # their last frames on, one by one
                handing = [(1, f)] * (len(lengths) - 1) * (sum(reals) if job.chained else len(reals) * batch.rows)
            counts = collections.Counter([*itertools.product(reals, lengths), *handing])
            for (rows, length), times in counts.items():
                x = parallel.like((rows, length, h, w, channels), jnp.float32, axes.BATCH)
                yield from self.vae("decode", times, resident, x)
