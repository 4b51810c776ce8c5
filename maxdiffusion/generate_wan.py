"""From a config to its videos: the whole run on one page."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from maxdiffusion import conditioning, denoise, parallel, variants
from maxdiffusion.config import Config
from maxdiffusion.config.examples import Batch, batches, saved
from maxdiffusion.media import frames, output
from maxdiffusion.runtime import compile_cache, log
from maxdiffusion.runtime.stages import Stages
from maxdiffusion.runtime.versions import versions
from maxdiffusion.weights import hub, specs
from maxdiffusion.weights.latents_io import load_latents
from maxdiffusion.weights.nets import Nets, builders

logger = logging.getLogger(__name__)


def run(cfg: Config) -> list[Path]:
    """Makes every video that `cfg` asks for and returns their paths.

    Raises:
      UserError: the checkpoint, the devices or the disk do not allow it; what is finished by then stays.
    """
    log.setup(cfg.log_level)
    logger.info("%s", cfg.describe())
    compile_cache.enable(cfg.jax_cache_dir)
    stages = Stages(cfg.progress)
    paths: list[Path] = []

    with stages("load"):
        pipeline = specs.open_pipeline(hub.resolve(cfg.pretrained_model_name_or_path, cfg.revision))
        variants.check(variants.get(cfg.model_name), pipeline.files.configs["transformer"])
        plan, placement = parallel.setup(cfg, heads=pipeline.configs["transformer"].num_attention_heads)
    with parallel.use(placement), stages.clock.compilation():
        nets = Nets(pipeline, builders(plan, cfg), placement)
        made = decoded_only(cfg, nets) if cfg.decode_latents else sample(cfg, nets, stages)
        vae = load(nets, "vae", stages)
        for batch, latents in made:
            with output.reserved(cfg, batch.examples) as files:
                files.save_latents(latents)
                with stages("decode", cfg.num_frames, "frames") as advance:
                    clips = frames.collect(vae.decode_chunks(latents), advance)
                with stages("encode", len(batch.examples), "videos") as advance:
                    for path in files.write(clips):
                        advance(1)
                        logger.info("wrote %s", path)
                        paths.append(path)
                files.record(versions(), stages.clock.as_dict())
    logger.info("%s", stages.clock.table())
    return paths
