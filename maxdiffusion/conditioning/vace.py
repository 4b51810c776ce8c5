"""What a VACE transformer is controlled by: a video, a mask of what to make anew, and images of what is to appear.

Reference: `diffusers.WanVACEPipeline` (`preprocess_conditions`, `prepare_video_latents`, `prepare_masks`).
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from maxdiffusion import parallel, variants
from maxdiffusion.conditioning import inputs
from maxdiffusion.conditioning.described import Described, Grid, full
from maxdiffusion.config import Config
from maxdiffusion.config.examples import Example
from maxdiffusion.errors import UserError
from maxdiffusion.media.fetch import open_image
from maxdiffusion.media.frames import to_float
from maxdiffusion.models.dit.vace import Control
from maxdiffusion.models.vae import WanVAE
from maxdiffusion.runtime.stages import Stages
from maxdiffusion.weights.nets import Nets

log = logging.getLogger(__name__)


class Inputs(NamedTuple):
    """The contents of the files."""

    video: Float[np.ndarray, "f h w 3"]  # [-1, 1]
    mask: Float[np.ndarray, "f h w 3"]  # 0..1, from 0.5 on made anew
    references: tuple[UInt8[np.ndarray, "_ _ 3"], ...]


def read(cfg: Config, videos: Sequence[Example]) -> Inputs:
    """What `video`, `mask` and `reference_images` name; without a video or a mask all is made anew.

    Raises:
      UserError: an image is too small or narrow; see also `inputs.one_size`, `inputs.video` and `open_image`.
    """
    frames, size = cfg.num_frames, inputs.one_size(cfg, videos)
    shown: np.ndarray = np.zeros((frames, *size, 3), np.float32)
    mask: np.ndarray = np.ones((frames, *size, 3), np.float32)
    if cfg.video:
        video = inputs.video("video", cfg.video, frames, *size)
        shown = to_float(video[:frames], *size)
        if cfg.mask:
            white = inputs.video("mask", cfg.mask, frames, *size, ("video", video))
            mask = (to_float(white[:frames], *size) + 1) / 2
    step = variants.get(cfg.model_name).vae_stride[1]
    return Inputs(shown, mask, tuple(_reference(path, *size, step) for path in cfg.reference_images))


def _reference(path: str, height: int, width: int, step: int) -> UInt8[np.ndarray, "_ _ 3"]:
    image = np.asarray(open_image(path))
    (own_height, own_width, _), (_, (h, w)) = image.shape, _sizes(image, height, width, step)
    if not min(h, w):
        raise UserError(
            f"reference_images={path} is {own_width} wide x {own_height} high, of which nothing is left in multiples "
            f"of {step} within {width} x {height}; give an image that is not as small or narrow."
        )
    log.info("reference image %s: %d x %d pixels, made %d x %d on white", path, own_width, own_height, w, h)
    return image


def _sizes(
    image: UInt8[np.ndarray, "_ _ 3"], height: int, width: int, step: int
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Height and width of an image in multiples of `step`, and of those as large as they fit, proportions kept."""
    h, w = (side - side % step for side in image.shape[:2])
    scale = min(height / max(h, 1), width / max(w, 1))
    return (h, w), (int(h * scale), int(w * scale))


def encode(cfg: Config, nets: Nets, stages: Stages, videos: Sequence[Example], given: Inputs) -> list[Control]:
    """One control for all videos.

    Raises:
      UserError: `conditioning_scale` has neither one entry nor one for each layer with a hint.
    """
    layers = nets.configs["transformer"].adapter.vace_layers
    if len(cfg.conditioning_scale) not in (1, len(layers)):
        raise UserError(
            f"conditioning_scale has {len(cfg.conditioning_scale)} entries, but this transformer is given "
            f"{len(layers)} hints; write one for all, or {len(layers)}."
        )
    scale = parallel.put(np.broadcast_to(np.asarray(cfg.conditioning_scale, np.float32), (len(layers),)))
    vae = stages.load(nets, "vae")
    with stages("control"):
        control = jax.block_until_ready(Control(control_latents(vae, *given), scale))
    return [control] * len(videos)


def described(cfg: Config, videos: Sequence[Example], configs: Mapping[str, Any], grid: Grid) -> Described:
    """See `Kind.describe`."""
    (f, h, w), vae, images = grid, configs["vae"], len(cfg.reference_images)
    latents = full(images + f, h, w, 2 * vae.z_dim + vae.spatial_factor**2)
    control = Control(latents, full(len(configs["transformer"].adapter.vace_layers)))
    size = (cfg.height, cfg.width)
    return Described({"adapter": control}, Counter({(1, *size): images}) + Counter({(cfg.num_frames, *size): 2}))


def on_canvas(image: UInt8[np.ndarray, "h1 w1 3"], height: int, width: int, step: int) -> Float[Array, "h w 3"]:
    """The image, scaled to multiples of `step`, then as large as it fits in the middle of white, proportions kept."""
    own, (h, w) = _sizes(image, height, width, step)
    resized = jax.image.resize(jnp.asarray(to_float(image[None], *own)[0]), (h, w, 3), "bilinear", antialias=False)
    top, left = (height - h) // 2, (width - w) // 2
    return jnp.ones((height, width, 3)).at[top : top + h, left : left + w].set(resized)


def mask_channels(mask: Float[Array, "f h w"], frames: int, stride: tuple[int, int, int]) -> Float[Array, "f2 h2 w2 c"]:
    """Each latent pixel's square of mask pixels as channels, of the frame nearest to each latent frame's middle."""
    f, h, w = mask.shape
    _, down, across = stride
    nearest = np.floor((np.arange(frames) + 0.5) * (f / frames)).astype(int)
    squares = mask[nearest].reshape(frames, h // down, down, w // across, across)
    return squares.transpose(0, 1, 3, 2, 4).reshape(frames, h // down, w // across, down * across)


def control_latents(
    vae: WanVAE,
    video: Float[np.ndarray, "f h w 3"],
    mask: Float[np.ndarray, "f h w 3"],
    references: Sequence[UInt8[np.ndarray, "_ _ 3"]],
) -> Float[Array, "f2 h2 w2 c"]:
    """Channels: latents of what is kept, of what is made anew, then the mask; fp32.

    The references' latents come first on the frame axis, with zeros in the other channels: the last of them first of
    all, as diffusers has it (the official wan/vace.py keeps their order).

    Args:
      vae: the encoder.
      video: [-1, 1].
      mask: 0..1, from 0.5 on made anew.
      references: any size.
    """
    _, height, width, _ = video.shape
    anew = (mask > 0.5).astype(np.float32)
    kept, made = (vae.encode(parallel.put(part[None]))[0] for part in (video * (1 - anew), video * anew))
    t, s = vae.config.temporal_factor, vae.config.spatial_factor
    channels = mask_channels(jnp.asarray(mask[..., 0]), kept.shape[0], (t, s, s))
    control = jnp.concatenate([kept, made, channels], axis=-1)
    for image in references:
        canvas = np.asarray(on_canvas(image, height, width, s))
        latents = vae.encode(parallel.put(canvas[None, None]))[0]
        padded = jnp.pad(latents, ((0, 0), (0, 0), (0, 0), (0, control.shape[-1] - latents.shape[-1])))
        control = jnp.concatenate([padded, control])
    return control
