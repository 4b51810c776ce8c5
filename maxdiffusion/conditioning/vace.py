"""What a VACE transformer is controlled by: a video, a mask of what to make anew, and images of what is to appear.

Reference: `diffusers.WanVACEPipeline` (`preprocess_conditions`, `prepare_video_latents`, `prepare_masks`).
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from maxdiffusion.media.frames import to_float
from maxdiffusion.models.vae import WanVAE


def on_canvas(image: UInt8[np.ndarray, "h1 w1 3"], height: int, width: int, step: int) -> Float[Array, "h w 3"]:
    """The image, scaled to multiples of `step`, then as large as it fits in the middle of white, proportions kept."""
    (own,) = to_float(image[None], *(side - side % step for side in image.shape[:2]))
    scale = min(height / own.shape[0], width / own.shape[1])
    h, w = int(own.shape[0] * scale), int(own.shape[1] * scale)
    resized = jax.image.resize(jnp.asarray(own), (h, w, 3), "bilinear", antialias=False)
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

    The references' latents come first on the frame axis, the last of them first of all (as the reference has it), with
    zeros in the other channels.

    Args:
      vae: the encoder.
      video: [-1, 1].
      mask: 0..1, from 0.5 on made anew.
      references: any size.
    """
    _, height, width, _ = video.shape
    anew = (mask > 0.5).astype(np.float32)
    kept, made = (vae.encode(jnp.asarray(part)[None])[0] for part in (video * (1 - anew), video * anew))
    t, s = vae.config.temporal_factor, vae.config.spatial_factor
    channels = mask_channels(jnp.asarray(mask[..., 0]), kept.shape[0], (t, s, s))
    control = jnp.concatenate([kept, made, channels], axis=-1)
    for image in references:
        latents = vae.encode(on_canvas(image, height, width, s)[None, None])[0]
        padded = jnp.pad(latents, ((0, 0), (0, 0), (0, 0), (0, control.shape[-1] - latents.shape[-1])))
        control = jnp.concatenate([padded, control])
    return control
