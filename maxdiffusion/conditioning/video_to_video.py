"""The video that a text-to-video model changes, instead of starting from noise alone (Meng et al. 2022, SDEdit).

Reference: `diffusers.WanVideoToVideoPipeline`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from maxdiffusion import parallel
from maxdiffusion.conditioning import control_video
from maxdiffusion.conditioning.kind import NOTHING, START, Grid, Images, Kind, Shapes
from maxdiffusion.media.frames import to_float
from maxdiffusion.request import Job, Video
from maxdiffusion.request.session import Session


def read(job: Job, images: Images) -> Float[np.ndarray, "f h w 3"] | None:
    """The frames of `video` in [-1, 1]; None without one.

    Raises:
      UserError: see `control_video.one_size` and `control_video.read`.
    """
    path, frames = job.cfg.video, job.cfg.num_frames
    if not path:
        return None
    size = control_video.one_size(job)
    return to_float(control_video.read("video", path, frames, *size)[:frames], *size)


def encode(s: Session, given: Float[np.ndarray, "f h w 3"]) -> list[Float[Array, "f2 h2 w2 c"]]:
    """Its latents, for each of the videos that are made of it."""
    vae = s.load("vae")
    with s.stages("video"):
        latents = jax.block_until_ready(vae.encode(parallel.put(given[None]))[0])
    return [latents] * len(s.job.videos)


def shapes(job: Job, videos: Sequence[Video], configs: Mapping[str, Any], grid: Grid) -> Shapes:
    """See `Kind.shapes`."""
    return Shapes({}, {(job.cfg.num_frames, job.cfg.height, job.cfg.width): 1}) if job.cfg.video else NOTHING


KIND = Kind(read, encode, START, shapes)
