"""From a config to its videos: the whole run on one page."""

from __future__ import annotations

import logging
import math

from maxdiffusion import conditioning, parallel, variants
from maxdiffusion.config import Config, parts
from maxdiffusion.config.examples import examples
from maxdiffusion.denoise import given, sampling
from maxdiffusion.media import frames, manifest, output
from maxdiffusion.parallel import axes, startup
from maxdiffusion.runtime import compile_cache, distributed, log
from maxdiffusion.runtime.paths import AnyPath
from maxdiffusion.runtime.stages import Stages
from maxdiffusion.runtime.versions import versions
from maxdiffusion.weights import specs
from maxdiffusion.weights.nets import Nets, builders_of

logger = logging.getLogger(__name__)


def run(cfg: Config) -> list[AnyPath]:
    """Makes every video that `cfg` asks for and returns their paths; of a prompt file, those that are not there yet.

    Raises:
      UserError: the checkpoint, the devices or the disk do not allow it; what is finished by then stays.
    """
    log.setup(cfg.log_level)
    distributed.start(cfg)
    logger.info("%s", cfg.describe())
    compile_cache.enable(cfg.jax_cache_dir)
    stages = Stages(cfg.progress)
    paths: list[AnyPath] = []
    if not (videos := manifest.remaining(cfg, examples(cfg))):
        return paths
    with distributed.together():
        inputs = conditioning.read(cfg, videos)
        nets, placement, shape = open_nets(cfg, stages)
        start = given.read(cfg, shape)
    distributed.agree(
        cfg, checkpoint=nets.files.digest(), latents=start.digest(), inputs=inputs.digest(), videos=repr(videos)
    )

    with parallel.use(placement), stages.clock.compilation():
        batches = start.finished or sampling.sample(cfg, videos, nets, shape, start.noise, inputs, stages)
        vae = stages.load(nets, "vae")
        decode = lambda part: vae.decode_chunks(parallel.put(part, axes.BATCH))  # noqa: E731
        for made, latents in batches:
            with output.reserved(cfg, made) as files:
                files.save_latents(latents)
                with stages("decode", cfg.num_frames, "frames") as advance:
                    chunks = parts.of(cfg).decode(decode, latents)
                    clips = frames.collect(chunks, advance)
                with stages("encode", len(made), "videos") as advance:
                    paths += files.write(clips, advance)
                files.record(versions(), stages.clock.as_dict())
    logger.info("%s", stages.clock.table())
    return paths


def open_nets(
    cfg: Config, stages: Stages, devices: parallel.Devices | None = None
) -> tuple[Nets, parallel.Placement, tuple[int, int, int, int]]:
    """Everything checked, nothing loaded: the nets, where they will live and f h w c of one video's latents.

    Raises:
      UserError: the checkpoint is not what `cfg` says, or the devices (all by default) do not fit its degrees.
    """
    with stages("load"):
        pipeline = specs.open_config(cfg)
        spec = variants.get(cfg.model_name)
        variants.check(spec, pipeline.files.configs["transformer"])
        cut, network = parts.of(cfg), pipeline.configs["transformer"]
        f, h, w = spec.latent_grid(cut.length, cfg.height, cfg.width)
        sizes = {spec.latent_grid(cut.length, video.height, video.width)[1:] for video in examples(cfg)}
        tokens = max(math.prod(network.grid(cut.leading + f, *size)) for size in sizes)
        plan, placement = startup.place(cfg, network.num_attention_heads, network.attention_head_dim, tokens, devices)
        build = builders_of(cfg, plan)
        nets = Nets(pipeline, build, placement)
        return nets, placement, (cut.latent_frames(f), h, w, pipeline.configs["vae"].z_dim)
