"""The video that a text-to-video model changes, instead of starting from noise alone (Meng et al. 2022, SDEdit).

Reference: `diffusers.WanVideoToVideoPipeline`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from maxdiffusion import parallel
from maxdiffusion.conditioning import control_video
from maxdiffusion.conditioning.control_video import ControlVideo
from maxdiffusion.conditioning.kind import NOTHING, START, Grid, Images, Kind, Shapes
from maxdiffusion.media.frames import to_float
from maxdiffusion.request import Job, Video
from maxdiffusion.request.session import Session
from maxdiffusion.runtime import distributed


def read(job: Job, images: Images) -> ControlVideo | None:
    """The frames of `video` in the result's size; None without one.

    Raises:
      UserError: see `control_video.one_size` and `control_video.read`.
    """
    return control_video.read(job.cfg, "video", job.cfg.video, *control_video.one_size(job)) if job.cfg.video else None


def encode(s: Session, given: ControlVideo) -> list[Float[np.ndarray, "f2 h2 w2 c"]]:
    """Its latents, for each of the videos that are made of it."""
    vae = s.load("vae")
    with s.stages("video"):
        pixels = to_float(given.frames, *given.frames.shape[1:3])
        latents = distributed.fetch(vae.encode(parallel.put(pixels[None])))[0]
    return [latents] * len(s.job.videos)


def shapes(job: Job, videos: Sequence[Video], configs: Mapping[str, Any], grid: Grid) -> Shapes:
    """See `Kind.shapes`."""
    return Shapes({}, {(job.cfg.num_frames, job.cfg.height, job.cfg.width): 1}) if job.cfg.video else NOTHING


KIND = Kind(read, encode, START, shapes)
