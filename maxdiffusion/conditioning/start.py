"""The video that a text-to-video model changes, instead of making one from noise (Meng et al. 2022, SDEdit).

Reference: `diffusers.WanVideoToVideoPipeline`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from maxdiffusion.conditioning import inputs
from maxdiffusion.config import Config
from maxdiffusion.media.frames import to_float
from maxdiffusion.runtime.stages import Stages
from maxdiffusion.weights.nets import Nets


def read(cfg: Config) -> Float[np.ndarray, "f h w 3"] | None:
    """What `video` names, in [-1, 1]; None without one.

    Raises:
      UserError: see `inputs.video`.
    """
    if not cfg.video:
        return None
    size = (cfg.height, cfg.width)
    return to_float(inputs.video("video", cfg.video, cfg.num_frames, *size)[: cfg.num_frames], *size)


def encode(cfg: Config, nets: Nets, stages: Stages, given: Float[np.ndarray, "f h w 3"]) -> Float[Array, "f h w c"]:
    """Its latents."""
    del cfg
    vae = stages.load(nets, "vae")
    with stages("video"):
        return jax.block_until_ready(vae.encode(jnp.asarray(given)[None])[0])
