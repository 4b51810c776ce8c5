"""The conditioning of an Animate 2 transformer: a character's image, and a driving video in segments.

Each segment but the first starts from the last frames of the one before.
Reference: diffusers' modular pipeline (`diffusers.modular_pipelines.wan_animate_2`).
"""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from PIL import Image

from maxdiffusion import parallel
from maxdiffusion.conditioning import control_video, text
from maxdiffusion.conditioning.animate import encode_characters, given_channels
from maxdiffusion.conditioning.control_video import ControlVideo
from maxdiffusion.conditioning.image import encode_images, token_shapes
from maxdiffusion.conditioning.kind import SEGMENT, Grid, Images, Kind, Shapes, fp32
from maxdiffusion.conditioning.overlap import last_frames
from maxdiffusion.media.frames import letterboxed, to_float
from maxdiffusion.models.dit.animate2 import Driving, DrivingVideo
from maxdiffusion.models.dit.context import Frames, Shared
from maxdiffusion.models.vae.model import WanVAE
from maxdiffusion.request import Job, Video
from maxdiffusion.request.session import Session
from maxdiffusion.runtime.distributed import fetch

log = logging.getLogger(__name__)

Fields = dict[str, Any]
Characters = Mapping[str, UInt8[np.ndarray, "h w 3"]]


class Inputs(NamedTuple):
    """The characters and the driving video, both on black in the result's size."""

    characters: Characters
    driving: ControlVideo


def read(job: Job, images: Images) -> Inputs:
    """The contents of `image` and `driving_video`.

    Raises:
      UserError: see `control_video` and `letterboxed`.
    """
    cfg = job.cfg
    driving = control_video.read(
        cfg, "driving_video", str(cfg.driving_video), *control_video.one_size(job), fit="letterboxed"
    )
    for at, image in images.items():
        log.info("image %s: %d x %d pixels, made %d x %d on black", at, *image.size, job.cfg.width, job.cfg.height)
    return Inputs(read_characters(job, images), driving)


def read_characters(job: Job, images: Images) -> Characters:
    """The images in the result's size, proportions kept, centred on black."""
    size = control_video.one_size(job)
    return {at: letterboxed(np.asarray(image), *size, Image.Resampling.BICUBIC) for at, image in images.items()}


def encode(s: Session, given: Inputs) -> list[Float[np.ndarray, "1 h w z"]]:
    """The latents of each video's character."""
    return encode_characters(s, given.characters)


def encode_tokens(s: Session, characters: Characters) -> list[Float[np.ndarray, "k e"]]:
    """CLIP's hidden states of each video's character."""
    made = dict(zip(characters, map(fetch, encode_images(s, characters.values(), "squashed")), strict=True))
    return [made[str(video.image)] for video in s.job.videos]


def shapes(job: Job, videos: Sequence[Video], configs: Mapping[str, Any], grid: Grid) -> Shapes:
    """See `Kind.shapes`."""
    (f, h, w), vae, clip, cut = grid, configs["vae"], configs["image_encoder"], job.segments
    no: Any = jax.ShapeDtypeStruct((), bool)
    driving = DrivingVideo(
        latents=fp32(f, h, w, vae.z_dim),
        text=fp32(text.MAX_LENGTH, configs["transformer"].text_dim),
        image=fp32(clip.tokens, clip.hidden_size),
    )
    frames = Frames(channels=fp32(1 + f, h, w, vae.temporal_factor + vae.z_dim))
    size, characters = (videos[0].height, videos[0].width), {video.image for video in videos}
    encoded = Counter({(cut.length, *size): len(cut) * (1 + len(videos))})
    fields = {"frames": frames, "adapter": Driving(Shared(driving), no)}
    return Shapes(fields, encoded + Counter({(1, *size): len(characters)}), 1)


def frames_of(frames: int, start: int, length: int) -> list[int]:
    """The frames of a segment from `start`; at both ends a video goes on with its mirror image, end frame included."""
    return [min(at % (2 * frames), -(at + 1) % (2 * frames)) for at in range(start, start + length)]


class Performer:
    """Makes the fields of each segment; keeps the VAE, and what the driving video's own pass is given."""

    def __init__(self, s: Session, given: Inputs, by_prompt: Mapping[str, Float[np.ndarray, "_ e"]]) -> None:
        """`given` is the result of `read`."""
        self._stages, self._segments = s.stages, s.job.segments
        self._frames = given.driving.frames
        self._text = parallel.put(text.padded([by_prompt[str(s.job.spec.driving_prompt)]])[0])
        [image] = encode_images(s, [self._frames[0]], "squashed")
        self._image = parallel.put(fetch(image))
        self._vae: WanVAE = s.load("vae")
        self._driven = functools.cache(self._drive)

    def _drive(self, segment: int) -> Shared:
        """The driving video: the same for every batch."""
        start, length = self._segments.starts[segment], self._segments.length
        shown = self._frames[frames_of(len(self._frames), start, length)]
        latents = self._vae.encode(parallel.put(to_float(shown, *shown.shape[1:3])[None]))[0]
        return Shared(DrivingVideo(latents, self._text, self._image))

    def fields(
        self, characters: Float[Array, "b 1 h w z"], before: Sequence[Float[np.ndarray, "b f h w c"]]
    ) -> tuple[Fields, Fields]:
        """Fields of `Context` of the segment after those of `before` (latents), of both branches of guidance."""
        vae, overlap, b = self._vae, self._segments.overlap, len(characters)
        size = self._frames.shape[1:3]
        with self._stages("control"):
            channels = []
            for row, character in enumerate(characters):
                shown = np.zeros((self._segments.length, *size, 3), np.float32)
                if before:
                    shown[:overlap] = last_frames(vae, before[-1][row], overlap)
                unknown = np.ones(shown.shape[:3], np.float32)
                channels.append(given_channels(vae, character, shown, unknown, overlap if before else 0))
            video, frames = self._driven(len(before)), Frames(channels=jnp.stack(channels))
            branches = (Driving(video, parallel.put(np.full(b, which))) for which in (False, True))
            positive, negative = ({"frames": frames, "adapter": driving} for driving in branches)
            return positive, negative


KIND = Kind(read, encode, SEGMENT, shapes, performer=Performer)
TOKENS = Kind(read_characters, encode_tokens, "image", token_shapes)
