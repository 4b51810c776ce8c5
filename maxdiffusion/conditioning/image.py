"""A video's first and last image: as tokens of an image encoder, as input channels, and as the first latent frame.

Reference: `WanI2V` and `WanTI2V` of the official repository, `diffusers.WanImageToVideoPipeline` (`encode_image`,
`prepare_latents`).
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, UInt8
from PIL import Image

from maxdiffusion import parallel
from maxdiffusion.conditioning.kind import NOTHING, ClipStart, Grid, Images, Kind, Shapes, fp32
from maxdiffusion.errors import UserError
from maxdiffusion.media.frames import to_uint8
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
    tokens = dict(zip(given, map(fetch, encode_images(s, given.values(), s.job.conventions.clip_view)), strict=True))
    made = {images: np.concatenate([tokens[at] for at in images]) for images in {v.images for v in s.job.videos}}
    return [made[video.images] for video in s.job.videos]


def clip_tokens(s: Session, given: Originals, vae: WanVAE, starts: Sequence[ClipStart]) -> list[Float[Array, "k e"]]:
    """See `Kind.clip`: of the clip's first frame, followed in every clip by those of the video's last image."""
    first = [given[str(each.video.image)] if each.frames is None else to_uint8(each.frames[:1])[0] for each in starts]
    last = [each.video.last_image for each in starts]
    shown = [[image, given[at]] if at else [image] for image, at in zip(first, last, strict=True)]
    tokens = iter(encode_images(s, itertools.chain.from_iterable(shown), s.job.conventions.clip_view))
    return [jnp.concatenate([next(tokens) for _ in images]) for images in shown]


def encode_images(
    s: Session, images: Iterable[UInt8[np.ndarray, "_ _ 3"]], view: Literal["squashed", "centre"]
) -> list[Float[Array, "k e"]]:
    """CLIP's hidden states of each image; `view` as in `Conventions.clip_view`."""
    from maxdiffusion.models.clip.vision import preprocess

    encoder = s.load("image_encoder")
    run, net = program(), nnx.split(encoder)
    with s.stages("image"):
        pixels = (preprocess([image], encoder.config.image_size, view) for image in images)
        return jax.block_until_ready([run(*net, parallel.put(each))[0] for each in pixels])


def _run(graph: Any, params: Any, pixels: jax.Array) -> jax.Array:
    return parallel.shard(nnx.merge(graph, params)(pixels), parallel.axes.BATCH, None, None)


def program() -> Any:
    """The image encoder under the current placement, jitted: (its graph, parameters, pixels) -> hidden states."""
    return parallel.jit(_run, static_argnums=0)


def token_shapes(job: Job, videos: Sequence[Video], configs: Mapping[str, Any], grid: Grid) -> Shapes:
    """See `Kind.shapes`."""
    clip, images = configs["image_encoder"], {at for video in videos for at in video.images}
    each, count = len(videos[0].images), len(images)
    if job.chained:
        each = 1 + (videos[0].last_image is not None)
        count = each * len(videos) * len(job.segments)
    return Shapes({"image": fp32(each * clip.tokens, clip.hidden_size)}, {}, count) if count else NOTHING


def encode_channels(s: Session, given: Fitted) -> list[Frames]:
    """Mask and encoded frames, as input channels (see `channels`)."""
    vae = s.load("vae")
    with s.stages("image"):
        wanted = dict.fromkeys(_fitted(video) for video in s.job.videos)
        made = {
            keys: jax.tree.map(fetch, Frames(channels(vae, s.job.cfg.num_frames, *_ends(given, keys))))
            for keys in wanted
        }
        return [made[_fitted(video)] for video in s.job.videos]


def clip_channels(s: Session, given: Fitted, vae: WanVAE, starts: Sequence[ClipStart]) -> list[Frames]:
    """See `Kind.clip`; the last image ends the last clip.

    With clip_padding=reference and clip_mask=first they are those on which the LoRAs of Stable Video Infinity (SVI)
    are trained: the image stands for every frame that is not given, and the mask marks the first frame alone.
    """
    cfg, made = s.job.cfg, []
    with s.stages("image"):
        for start in starts:
            video = start.video
            size = video.width, video.height
            first, last = (given[at, *size] if at else None for at in (video.image, video.last_image))
            begin: Any = first[None] if start.frames is None and first is not None else start.frames
            padding = first if cfg.clip_padding == "reference" else None
            marked = 1 if cfg.clip_mask == "first" else None
            end = last if start.last else None
            made.append(Frames(channels=channels(vae, cfg.num_frames, begin, end, padding, marked)))
        return jax.block_until_ready(made)


def channel_shapes(job: Job, videos: Sequence[Video], configs: Mapping[str, Any], grid: Grid) -> Shapes:
    """See `Kind.shapes`."""
    wanted = {_fitted(video) for video in videos} - {()}
    frames = Frames(channels=fp32(*grid, configs["vae"].temporal_factor + configs["vae"].z_dim))
    video = (job.cfg.num_frames, videos[0].height, videos[0].width)
    count = len(videos) * len(job.segments) if job.chained else len(wanted)
    return Shapes({"frames": frames}, {video: count}) if count else NOTHING


def encode_first(s: Session, given: Fitted) -> list[Frames]:
    """The first latent frame of each video that has an image."""
    vae = s.load("vae")
    with s.stages("image"):
        latents = {at: fetch(vae.encode(parallel.put(image[None, None])))[0] for at, image in given.items()}
        return [Frames(first=latents[_fitted(video)[0]]) if video.image else Frames() for video in s.job.videos]


def clip_first(s: Session, given: Fitted, vae: WanVAE, starts: Sequence[ClipStart]) -> list[Frames]:
    """See `Kind.clip`."""
    made = []
    with s.stages("image"):
        for start in starts:
            video, frames = start.video, start.frames
            if frames is None:
                frames = given[str(video.image), video.width, video.height][None]
            made.append(Frames(first=vae.encode(parallel.put(frames[None]))[0]))
        return jax.block_until_ready(made)


def first_shapes(job: Job, videos: Sequence[Video], configs: Mapping[str, Any], grid: Grid) -> Shapes:
    """See `Kind.shapes`."""
    wanted = {key for video in videos for key in _fitted(video)}
    first, count = job.cfg.overlap_frames if job.cfg.extend else 1, len(wanted)
    if job.chained:
        count = len(videos) * len(job.segments)
    latents, *_ = job.spec.latent_grid(first, videos[0].height, videos[0].width)
    frames = Frames(first=fp32(latents, *grid[1:], configs["vae"].z_dim))
    return Shapes({"frames": frames}, {(first, videos[0].height, videos[0].width): count}) if count else NOTHING


TOKENS = Kind(read_originals, encode_tokens, "image", token_shapes, clip_tokens)
CHANNELS = Kind(read_ends, encode_channels, "frames", channel_shapes, clip_channels)
FIRST_FRAME = Kind(read_first, encode_first, "frames", first_shapes, clip_first)


def channels(
    vae: WanVAE,
    frames: int,
    begin: Float[np.ndarray, "f h w 3"],
    end: Float[np.ndarray, "h w 3"] | None = None,
    padding: Float[np.ndarray, "h w 3"] | None = None,
    marked: int | None = None,
) -> Float[Array, "fl hl wl c"]:
    """The given frames of a video of `frames` frames, for the network's further input channels.

    Mask channels, one for each frame of a latent frame, 1 where a frame is given (the first one fills all of its latent
    frame), then the latents of the video.

    Args:
      vae: the encoder.
      frames: length of the video.
      begin: its first frames, [-1, 1].
      end: its last frame; None: none is given.
      padding: stands for each frame that is not given; None: zeros.
      marked: number of frames of `begin` that the mask marks; None: all.
    """
    video = np.zeros((1, frames, *begin.shape[1:]), np.float32)
    if padding is not None:
        video[:] = padding
    given = np.zeros(frames, np.float32)
    video[0, : len(begin)], given[: len(begin) if marked is None else marked] = begin, 1
    if end is not None:
        video[0, -1], given[-1] = end, 1
    latents = vae.encode(parallel.put(video))[0]
    factor = vae.config.temporal_factor
    mask = np.concatenate([np.repeat(given[:1], factor), given[1:]]).reshape(-1, 1, 1, factor)
    return jnp.concatenate([jnp.broadcast_to(mask, (*latents.shape[:3], factor)), latents], axis=-1)


def _ends(
    given: Fitted, keys: Sequence[tuple[str, int, int]]
) -> tuple[Float[np.ndarray, "1 h w 3"], Float[np.ndarray, "h w 3"] | None]:
    """The first image as a video of one frame, and the last one if there is one."""
    first, *last = (given[key] for key in keys)
    return first[None], last[0] if last else None


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
