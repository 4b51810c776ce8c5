"""What an Animate transformer is conditioned on: a character's image, and the pose and face of someone who acts.

A long video is made in segments; each but the first repeats the last frames of the one before, which are given to it.
Reference: `diffusers.WanAnimatePipeline`.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from PIL import Image

from maxdiffusion.models.vae import WanVAE


def on_black(image: UInt8[np.ndarray, "h1 w1 3"], height: int, width: int) -> UInt8[np.ndarray, "h w 3"]:
    """The image as large as it fits, its proportions kept, in the middle of black.

    Reference: `WanAnimateImageProcessor`, which asks for bilinear resizing, but whose base class sets Lanczos again.
    """
    h, w = image.shape[:2]
    if width / height < w / h:
        h, w = h * width // w, width
    else:
        h, w = height, w * height // h
    canvas = Image.new("RGB", (width, height))
    resized = Image.fromarray(image).resize((w, h), Image.Resampling.LANCZOS)
    canvas.paste(resized, (width // 2 - w // 2, height // 2 - h // 2))
    return np.asarray(canvas)


def mask_channels(mask: Float[np.ndarray, "f h w"], frames_in_one: int) -> Float[np.ndarray, "f2 h w c"]:
    """The frames that fall into each latent frame as its channels, the first frame as often as it takes to fill one."""
    frames = np.concatenate([np.repeat(mask[:1], frames_in_one, axis=0), mask[1:]])
    return frames.reshape(-1, frames_in_one, *mask.shape[1:]).transpose(0, 2, 3, 1)


def given_channels(
    vae: WanVAE,
    character: Float[Array, "1 h2 w2 z"],
    shown: Float[np.ndarray, "f h w 3"],
    unknown: Float[np.ndarray, "f h w"],
    known: int,
) -> Float[Array, "f2 h2 w2 c"]:
    """What is concatenated to the latents' channels: which pixels are given, and what they show; fp32.

    Args:
      vae: the encoder.
      character: latents of its image, all of it given, the first frame of the result.
      shown: [-1, 1], frames carried over, background, or 0.
      unknown: 0..1, what the character is to replace; 1 everywhere in animate mode.
      known: so many first frames are given whole.
    """
    t, s = vae.config.temporal_factor, vae.config.spatial_factor
    given = 1 - unknown[:, ::s, ::s]  # "nearest" takes the first pixel of each square
    given[:known] = 1
    segment = jnp.concatenate([mask_channels(given, t), vae.encode(jnp.asarray(shown)[None])[0]], axis=-1)
    return jnp.concatenate([jnp.pad(character, ((0, 0),) * 3 + ((t, 0),), constant_values=1.0), segment])
