"""The video that a text-to-video model changes, instead of making one from noise (Meng et al. 2022, SDEdit).

Reference: `diffusers.WanVideoToVideoPipeline`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from maxdiffusion import parallel
from maxdiffusion.conditioning import inputs
from maxdiffusion.conditioning.described import NOTHING, Described, Grid
from maxdiffusion.config import Config
from maxdiffusion.config.examples import Example
from maxdiffusion.media.frames import to_float
from maxdiffusion.runtime.stages import Stages
from maxdiffusion.weights.nets import Nets


def read(cfg: Config, videos: Sequence[Example]) -> Float[np.ndarray, "f h w 3"] | None:
    """What `video` names, in [-1, 1]; None without one.

    Raises:
      UserError: see `inputs.one_size` and `inputs.video`.
    """
    if not cfg.video:
        return None
    size = inputs.one_size(cfg, videos)
    return to_float(inputs.video("video", cfg.video, cfg.num_frames, *size)[: cfg.num_frames], *size)


def encode(
    cfg: Config, nets: Nets, stages: Stages, videos: Sequence[Example], given: Float[np.ndarray, "f h w 3"]
) -> list[Float[Array, "f2 h2 w2 c"]]:
    """Its latents, for each of the videos that are made of it."""
    del cfg
    vae = stages.load(nets, "vae")
    with stages("video"):
        latents = jax.block_until_ready(vae.encode(parallel.put(given[None]))[0])
    return [latents] * len(videos)


def described(cfg: Config, videos: Sequence[Example], configs: Mapping[str, Any], grid: Grid) -> Described:
    """See `Kind.describe`."""
    return Described({}, {(cfg.num_frames, cfg.height, cfg.width): 1}) if cfg.video else NOTHING
