"""From a config to its videos: the whole run on one page."""

from __future__ import annotations

import functools
import logging

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
        vae = functools.cache(lambda: stages.load(nets, "vae"))  # once latents are saved, after the last transformer
        decode = lambda part: vae().decode_chunks(parallel.put(part, axes.BATCH))  # noqa: E731
        for made, latents in batches:
            with output.reserved(cfg, made, latents) as files:
                vae()
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
        variants.check(variants.get(cfg.model_name), pipeline.files.configs["transformer"])
        plan, placement, shape = startup.lay_out(cfg, pipeline.configs, devices)
        return Nets(pipeline, builders_of(cfg, plan), placement), placement, shape
