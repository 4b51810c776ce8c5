"""A video's first and last image: as tokens of an image encoder, as input channels, and as the first latent frame.

Reference: `WanI2V` and `WanTI2V` of the official repository, `diffusers.WanImageToVideoPipeline` (`encode_image`,
`prepare_latents`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, UInt8
from PIL import Image

from maxdiffusion import parallel
from maxdiffusion.conditioning.kind import NOTHING, Grid, Images, Kind, Shapes, fp32
from maxdiffusion.errors import UserError
from maxdiffusion.media.resize import bicubic
from maxdiffusion.models.dit.context import Frames
from maxdiffusion.models.vae.model import WanVAE
from maxdiffusion.request import Job, Video
from maxdiffusion.request.session import Session
from maxdiffusion.runtime.distributed import fetch

log = logging.getLogger(__name__)

MOST_PIXELS = 2**28  # of an image that is resized before it is cropped; four times the largest video frame

# Every image that a run names, once: by its location, and by its location and the video's width and height.
Originals = Mapping[str, UInt8[np.ndarray, "_ _ 3"]]
Fitted = Mapping[tuple[str, int, int], Float[np.ndarray, "_ _ 3"]]

Resize = Callable[[Image.Image, int, int], Float[np.ndarray, "h w 3"]]  # (image, width, height) -> [-1, 1]


def read_originals(job: Job, images: Images) -> Originals | None:
    """All images in their own size; None where none is given."""
    return {at: np.asarray(image) for at, image in images.items()} or None


def read_ends(job: Job, images: Images) -> Fitted | None:
    """First and last images in the size of their video, [-1, 1]; None where none is given. Logs how each was resized.

    Bicubic (official), an image may exceed [-1, 1], and it is squashed to the size where its proportions are those of
    the size but for rounding to a multiple of `WanSpec.size_step`. That is what `WanI2V` does, which has no other
    sizes. `WanFLF2V` means the same for a last image of other proportions than the first, but exchanges its width and
    height when it crops; it is covered and cropped here.
    """
    if job.conventions.start_image == "bicubic":
        return _read(job, images, _bicubic, job.spec.size_step)
    return read_first(job, images)


def read_first(job: Job, images: Images) -> Fitted | None:
    """Images in the size of their video, [-1, 1]; None where none is given. Logs how each was resized.

    Lanczos, as `WanTI2V.i2v` of the official repository; without anything to crop as diffusers' `VaeImageProcessor`.
    """
    return _read(job, images, _lanczos, 0)


def _read(job: Job, images: Images, resize: Resize, tolerance: int) -> Fitted | None:
    wanted = dict.fromkeys(key for video in job.videos for key in _fitted(video))
    return {key: _fit(images[key[0]], *key, resize, tolerance) for key in wanted} or None


def encode_tokens(s: Session, given: Originals) -> list[Float[np.ndarray, "k e"]]:
    """CLIP's hidden states of each video's image, followed by those of its last image if it has one."""
    from maxdiffusion.models.clip.vision import preprocess

    encoder = s.load("image_encoder")
    run, net = program(), nnx.split(encoder)
    with s.stages("image"):
        side, view = encoder.config.image_size, s.job.conventions.clip_view
        pixels = {at: preprocess([image], side, view) for at, image in given.items()}
        tokens = {at: fetch(run(*net, parallel.put(image)))[0] for at, image in pixels.items()}
        made = {images: np.concatenate([tokens[at] for at in images]) for images in {v.images for v in s.job.videos}}
        return [made[video.images] for video in s.job.videos]


def _run(graph: Any, params: Any, pixels: jax.Array) -> jax.Array:
    return parallel.shard(nnx.merge(graph, params)(pixels), parallel.axes.BATCH, None, None)


def program() -> Any:
    """The image encoder under the current placement, jitted: (its graph, parameters, pixels) -> hidden states."""
    return parallel.jit(_run, static_argnums=0)


def token_shapes(job: Job, videos: Sequence[Video], configs: Mapping[str, Any], grid: Grid) -> Shapes:
    """See `Kind.shapes`."""
    clip, images = configs["image_encoder"], {at for video in videos for at in video.images}
    shape = (len(videos[0].images) * clip.tokens, clip.hidden_size)
    return Shapes({"image": fp32(*shape)}, {}, len(images)) if images else NOTHING


def encode_channels(s: Session, given: Fitted) -> list[Frames]:
    """Mask and encoded frames, as input channels (see `channels`)."""
    vae = s.load("vae")
    with s.stages("image"):
        wanted = dict.fromkeys(_fitted(video) for video in s.job.videos)
        made: dict[Any, Any] = {
            keys: fetch(channels(vae, [given[key] for key in keys], s.job.cfg.num_frames)) for keys in wanted
        }
        return [Frames(channels=made[_fitted(video)]) for video in s.job.videos]


def channel_shapes(job: Job, videos: Sequence[Video], configs: Mapping[str, Any], grid: Grid) -> Shapes:
    """See `Kind.shapes`."""
    wanted = {_fitted(video) for video in videos} - {()}
    frames = Frames(channels=fp32(*grid, configs["vae"].temporal_factor + configs["vae"].z_dim))
    video = (job.cfg.num_frames, videos[0].height, videos[0].width)
    return Shapes({"frames": frames}, {video: len(wanted)}) if wanted else NOTHING


def encode_first(s: Session, given: Fitted) -> list[Frames]:
    """The first latent frame of each video that has an image."""
    vae = s.load("vae")
    with s.stages("image"):
        latents = {at: fetch(vae.encode(parallel.put(image[None, None])))[0] for at, image in given.items()}
        return [Frames(first=latents[_fitted(video)[0]]) if video.image else Frames() for video in s.job.videos]


def first_shapes(job: Job, videos: Sequence[Video], configs: Mapping[str, Any], grid: Grid) -> Shapes:
    """See `Kind.shapes`."""
    wanted = {key for video in videos for key in _fitted(video)}
    frames = Frames(first=fp32(1, *grid[1:], configs["vae"].z_dim))
    image = (1, videos[0].height, videos[0].width)
    return Shapes({"frames": frames}, {image: len(wanted)}) if wanted else NOTHING


TOKENS = Kind(read_originals, encode_tokens, "image", token_shapes)
CHANNELS = Kind(read_ends, encode_channels, "frames", channel_shapes)
FIRST_FRAME = Kind(read_first, encode_first, "frames", first_shapes)


def channels(vae: WanVAE, ends: Sequence[Float[np.ndarray, "h w 3"]], frames: int) -> Float[Array, "f hl wl c"]:
    """The first and maybe the last image of a video of `frames` frames, for the network's further input channels.

    Mask channels, one for each frame of a latent frame, 1 where a frame is given (the first image fills all of its
    latent frame), then the latents of the video with zeros in place of the other frames.
    """
    video = np.zeros((1, frames, *ends[0].shape), np.float32)
    given = np.zeros(frames, np.float32)
    for at, image in zip((0, -1), ends, strict=False):
        video[0, at], given[at] = image, 1
    latents = vae.encode(parallel.put(video))[0]
    factor = vae.config.temporal_factor
    mask = np.concatenate([np.repeat(given[:1], factor), given[1:]]).reshape(-1, 1, 1, factor)
    return jnp.concatenate([jnp.broadcast_to(mask, (*latents.shape[:3], factor)), latents], axis=-1)


def _fitted(video: Video) -> tuple[tuple[str, int, int], ...]:
    return tuple((at, video.width, video.height) for at in video.images)


def _fit(
    image: Image.Image, location: str, width: int, height: int, resize: Resize, tolerance: int
) -> Float[np.ndarray, "h w 3"]:
    """Resized to cover the size, then cropped in the middle.

    Where a size with sides of up to `tolerance` pixels more has its proportions, it is resized to exactly the size.

    Raises:
      UserError: it is so narrow that it would have more than `MOST_PIXELS` in between.
    """
    if width / (height + tolerance) <= image.width / image.height <= (width + tolerance) / height:
        w, h = width, height
    else:
        scale = max(width / image.width, height / image.height)
        w, h = round(image.width * scale), round(image.height * scale)
    if w * h > MOST_PIXELS:
        raise UserError(
            f"image={location} is {image.width} wide x {image.height} high, which covers {width} x {height} only at "
            f"{w} x {h} pixels; crop it to about those proportions."
        )
    left, top = (w - width) // 2, (h - height) // 2
    cropped = "" if (w, h) == (width, height) else f", cropped to {width} x {height}"
    log.info("image %s: %d x %d pixels, made %d x %d%s", location, image.width, image.height, w, h, cropped)
    return resize(image, w, h)[top : top + height, left : left + width]


def _lanczos(image: Image.Image, width: int, height: int) -> Float[np.ndarray, "h w 3"]:
    return _unit(np.asarray(image.resize((width, height), Image.Resampling.LANCZOS), np.float32))


def _bicubic(image: Image.Image, width: int, height: int) -> Float[np.ndarray, "h w 3"]:
    return _unit(bicubic(np.asarray(image), height, width))


def _unit(levels: Float[np.ndarray, "h w 3"]) -> Float[np.ndarray, "h w 3"]:
    """0..255 to -1..1."""
    return levels / np.float32(255) * 2 - 1
