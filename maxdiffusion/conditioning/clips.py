"""The conditioning of clips: each starts from the last frames of the one before, the first maybe from a video.

The frames handed on are not rounded to 8 bits, so that all meshes make the same clips.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from maxdiffusion.conditioning import control_video
from maxdiffusion.conditioning.control_video import ControlVideo, Used
from maxdiffusion.conditioning.kind import ClipStart, Kind
from maxdiffusion.conditioning.overlap import last_frames
from maxdiffusion.config import schema
from maxdiffusion.errors import UserError
from maxdiffusion.media.frames import covering, to_float
from maxdiffusion.media.read import probe, read_clip, stored_times
from maxdiffusion.models.vae.model import WanVAE
from maxdiffusion.request import Job, Video
from maxdiffusion.request.session import Session

log = logging.getLogger(__name__)


def read_extended(job: Job) -> ControlVideo | None:
    """All frames of the video to extend, in the result's size, as shown at its rate up to the last one.

    Raises:
      UserError: it cannot be read, has fewer frames than overlap or more than a result may have; see also
        `control_video.one_size`.
    """
    cfg = job.cfg
    if cfg.extend is None:
        return None
    height, width = control_video.one_size(job)
    info, at = probe(cfg.extend), _shown_at(cfg.extend, cfg.fps)
    if at is not None and len(at) > schema.MAX_FRAMES:
        raise UserError(
            f"extend={cfg.extend} has {len(at)} frames at fps={cfg.fps}, and a video has at most {schema.MAX_FRAMES}; "
            "give its last part."
        )
    clip = read_clip(cfg.extend, at, lambda frame: covering(frame, height, width))
    found = len(clip.frames)
    if found < cfg.overlap_frames:
        raise UserError(
            f"extend={cfg.extend} has {found} frames at fps={cfg.fps}, but overlap_frames={cfg.overlap_frames}; give a "
            "longer video, or write fewer."
        )
    sound = "; its sound is not kept" if clip.sound and not cfg.keep_audio else ""
    log.info(
        "extend: %d frames at %s per second, of which the last %d start the first clip; %d x %d pixels, made %d x %d%s",
        *(found, cfg.fps, cfg.overlap_frames, info.width, info.height, width, height, sound),
    )
    first, last, count = clip.indices[0], clip.indices[-1], len(set(clip.indices))
    used = Used("extend", cfg.extend, info, first, last, count, clip.colour, clip.sound)
    return ControlVideo(clip.frames, used)


def _shown_at(path: str, fps: Fraction) -> list[Fraction] | None:
    """Times at that rate, the last of which is that of the last frame; None where the frames have no times."""
    if not read_clip(path, [0]).timed:
        return None
    last = stored_times(path)[-1][0]
    return [last - k / fps for k in reversed(range(math.floor(last * fps) + 1))]


class Chain:
    """Makes the conditioning of each clip; keeps the VAE, for the frames that a clip hands on to the next."""

    def __init__(self, s: Session, kinds: Sequence[tuple[Kind, Any]], extended: ControlVideo | None) -> None:
        """`kinds` are the variant's, each with what it has read."""
        self._s, self._kinds, self._extended = s, kinds, extended
        self._vae: WanVAE = s.load("vae")
        self._made: dict[tuple[Video, ...], tuple[int, dict[str, Any]]] = {}  # the clip at hand: its number, fields

    def prompts(self, videos: Sequence[Video], number: int) -> list[str]:
        """The prompts of clip `number`, from 0."""
        return [self._s.job.prompt(video, number) for video in videos]

    def fields(self, videos: Sequence[Video], before: Sequence[Float[np.ndarray, "b f h w c"]]) -> dict[str, Any]:
        """Fields of `Context` beside the text, of the clip after those of `before` (latents)."""
        batch, number = tuple(videos), len(before)
        if batch not in self._made or self._made[batch][0] != number:
            rows = {video: row for row, video in enumerate(videos)}  # a batch may repeat its last video
            starts = [self._start(video, [latents[row] for latents in before]) for video, row in rows.items()]
            made = {}
            for kind, given in self._kinds:
                assert kind.clip is not None  # `Task.chained`
                each = dict(zip(rows, kind.clip(self._s, given, self._vae, starts), strict=True))
                made[kind.field] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(each[video] for video in videos))
            self._made[batch] = number, made
        return self._made[batch][1]

    def _start(self, video: Video, before: Sequence[Float[np.ndarray, "f h w c"]]) -> ClipStart:
        job, frames = self._s.job, None
        if before:
            frames = last_frames(self._vae, before[-1], job.cfg.overlap_frames)
        elif self._extended is not None:
            frames = to_float(self._extended.frames[-job.cfg.overlap_frames :], video.height, video.width)
        return ClipStart(video, len(before), len(before) == len(job.segments) - 1, frames)
