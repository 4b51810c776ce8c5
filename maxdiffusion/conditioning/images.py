"""What a video starts, and may end, with: images as tokens, as input channels and as the first latent frame.

Reference: `diffusers.WanImageToVideoPipeline` (`encode_image`, `prepare_latents`).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, UInt8
from PIL import Image

from maxdiffusion import parallel
from maxdiffusion.conditioning.described import NOTHING, Described, Grid, full
from maxdiffusion.config import Config
from maxdiffusion.config.examples import Example
from maxdiffusion.media.fetch import open_image
from maxdiffusion.models.clip.vision import preprocess
from maxdiffusion.models.dit import Frames
from maxdiffusion.models.vae import WanVAE
from maxdiffusion.runtime.stages import Stages
from maxdiffusion.weights.nets import Nets

log = logging.getLogger(__name__)

# Every image that a run names, once: by its location, and by its location and the video's width and height.
Originals = Mapping[str, UInt8[np.ndarray, "_ _ 3"]]
Fitted = Mapping[tuple[str, int, int], Float[np.ndarray, "_ _ 3"]]


def read_originals(cfg: Config, videos: Sequence[Example]) -> Originals | None:
    """All images in their own size; None where none is given.

    Raises:
      UserError: see `open_image`.
    """
    return {at: np.asarray(open_image(at)) for video in videos for at in _of(video)} or None


def read_fitted(cfg: Config, videos: Sequence[Example]) -> Fitted | None:
    """All images in the size of their video, [-1, 1]; None where none is given. Logs what became of each.

    Raises:
      UserError: see `open_image`.
    """
    wanted = dict.fromkeys(key for video in videos for key in _fitted(video))
    return {key: _fit(open_image(key[0]), *key) for key in wanted} or None


def encode_tokens(
    cfg: Config, nets: Nets, stages: Stages, videos: Sequence[Example], given: Originals
) -> list[Float[Array, "k e"]]:
    """CLIP's hidden states of each video's image, followed by those of its last image if it has one."""
    encoder = stages.load(nets, "image_encoder")
    run, net = program(), nnx.split(encoder)
    with stages("image"):
        pixels = {at: preprocess([Image.fromarray(image)], encoder.config.image_size) for at, image in given.items()}
        tokens = {at: run(*net, parallel.put(image))[0] for at, image in pixels.items()}
        return jax.block_until_ready([jnp.concatenate([tokens[at] for at in _of(video)]) for video in videos])


def _run(graph: Any, params: Any, pixels: jax.Array) -> jax.Array:
    return parallel.shard(nnx.merge(graph, params)(pixels), parallel.axes.BATCH, None, None)


def program() -> Any:
    """The image encoder under the current placement, jitted: (its graph, parameters, pixels) -> hidden states."""
    return parallel.jit(_run, static_argnums=0)


def tokens_described(cfg: Config, videos: Sequence[Example], configs: Mapping[str, Any], grid: Grid) -> Described:
    """See `Kind.describe`."""
    clip, images = configs["image_encoder"], {at: None for video in videos for at in _of(video)}
    shape = (len(_of(videos[0])) * clip.tokens, clip.hidden_size)
    return Described({"image": full(*shape)}, {}, len(images)) if images else NOTHING


def encode_channels(cfg: Config, nets: Nets, stages: Stages, videos: Sequence[Example], given: Fitted) -> list[Frames]:
    """Mask and encoded frames, as channels of the input (see `channels`)."""
    vae = stages.load(nets, "vae")
    with stages("image"):
        wanted = dict.fromkeys(_fitted(video) for video in videos)
        made = {keys: channels(vae, [given[key] for key in keys], cfg.num_frames) for keys in wanted}
        return jax.block_until_ready([Frames(channels=made[_fitted(video)]) for video in videos])


def channels_described(cfg: Config, videos: Sequence[Example], configs: Mapping[str, Any], grid: Grid) -> Described:
    """See `Kind.describe`."""
    wanted = {_fitted(video) for video in videos} - {()}
    shown = Frames(channels=full(*grid, configs["vae"].temporal_factor + configs["vae"].z_dim))
    video = (cfg.num_frames, videos[0].height, videos[0].width)
    return Described({"frames": shown}, {video: len(wanted)}) if wanted else NOTHING


def encode_first(cfg: Config, nets: Nets, stages: Stages, videos: Sequence[Example], given: Fitted) -> list[Frames]:
    """The first latent frame of each video that has an image."""
    vae = stages.load(nets, "vae")
    with stages("image"):
        latents = {at: vae.encode(parallel.put(image[None, None]))[0] for at, image in given.items()}
        shown = [Frames(first=latents[_fitted(video)[0]]) if video.image else Frames() for video in videos]
        return jax.block_until_ready(shown)


def first_described(cfg: Config, videos: Sequence[Example], configs: Mapping[str, Any], grid: Grid) -> Described:
    """See `Kind.describe`."""
    wanted = {key for video in videos for key in _fitted(video)}
    shown = Frames(first=full(1, *grid[1:], configs["vae"].z_dim))
    image = (1, videos[0].height, videos[0].width)
    return Described({"frames": shown}, {image: len(wanted)}) if wanted else NOTHING


def channels(vae: WanVAE, ends: Sequence[Float[np.ndarray, "h w 3"]], frames: int) -> Float[Array, "f hl wl c"]:
    """The first and maybe the last image of a video of `frames` frames, for the network's further input channels.

    As many mask channels as a latent frame stands for frames, 1 where a frame is given (the first image counts as often
    as that), then the latents of the video that has zeros in place of the frames not given.
    """
    video = np.zeros((1, frames, *ends[0].shape), np.float32)
    given = np.zeros(frames, np.float32)
    for at, image in zip((0, -1), ends, strict=False):
        video[0, at], given[at] = image, 1
    latents = vae.encode(parallel.put(video))[0]
    factor = vae.config.temporal_factor
    mask = np.concatenate([np.repeat(given[:1], factor), given[1:]]).reshape(-1, 1, 1, factor)
    return jnp.concatenate([jnp.broadcast_to(mask, (*latents.shape[:3], factor)), latents], axis=-1)


def _of(video: Example) -> tuple[str, ...]:
    return tuple(at for at in (video.image, video.last_image) if at is not None)


def _fitted(video: Example) -> tuple[tuple[str, int, int], ...]:
    return tuple((at, video.width, video.height) for at in _of(video))


def _fit(image: Image.Image, location: str, width: int, height: int) -> Float[np.ndarray, "h w 3"]:
    """Resized by PIL's Lanczos filter to cover the size, then cropped in the middle.

    Reference: `WanTI2V.i2v` of the official repository; without anything to crop as diffusers' `VaeImageProcessor`.
    """
    scale = max(width / image.width, height / image.height)
    w, h = round(image.width * scale), round(image.height * scale)
    left, top = (w - width) // 2, (h - height) // 2
    fitted = image.resize((w, h), Image.Resampling.LANCZOS).crop((left, top, left + width, top + height))
    cropped = "" if (w, h) == (width, height) else f", cropped to {width} x {height}"
    log.info("image %s: %d x %d pixels, made %d x %d%s", location, image.width, image.height, w, h, cropped)
    values: Any = np.asarray(fitted, np.float32)
    return values / np.float32(255) * 2 - 1
