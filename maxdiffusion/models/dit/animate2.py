"""Animate 2 (Wan-Animate-2, 2026, arXiv:2608.06009): self-attention to the keys of a driving video's own pass.

The first latent frame of the result is the character's image; frame t of it sees frame t - 1 of the driving video.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from maxdiffusion.attention.frames import FrameKeys, by_shard
from maxdiffusion.models.dit.adapter import Adapter, After, Extract
from maxdiffusion.models.dit.block import Signal
from maxdiffusion.models.dit.config import Animate2Config, DiTConfig
from maxdiffusion.models.dit.context import Context, Frames
from maxdiffusion.parallel import axes, shard


class Driving(NamedTuple):
    """The input of an Animate 2 transformer.

    Attributes:
      latents: of the driving video, a frame fewer than the result's.
      text, image: hidden states of the encoders for the driving video.
      negative: whether the branch of guidance is the negative one.
    """

    latents: Float[Array, "b f-1 h w c"]
    text: Float[Array, "b k e_text"]
    image: Float[Array, "b k e_image"] | None
    negative: Bool[Array, " b"]


class PreparedDriving(NamedTuple):
    """Keys, with their positions, and values of the driving video's tokens in every layer, by `frames.by_shard`."""

    keys: Float[Array, "b layers shards k n d"]
    values: Float[Array, "b layers shards k n d"]
    negative: Bool[Array, " b"]


class Animate2(Adapter):
    """The driving video's pass through the trunk, and its keys and values in the trunk's self-attention.

    Reference: `diffusers.WanAnimate2Transformer3DModel`.
    """

    TIMESTEP = 1.0  # of the driving video

    def __init__(self, config: DiTConfig):
        self.patch = config.patch_size
        self.skipped = Animate2Config.SKIPPED

    def read(self, driving: Driving, extract: Extract) -> PreparedDriving:
        latents = driving.latents
        f, h, w = (a // b for a, b in zip(latents.shape[1:4], self.patch, strict=True))
        # All frames are given: the mask of image to video is 1, and the given frames are the latents.
        given = jnp.concatenate([jnp.ones((*latents.shape[:4], 4), latents.dtype), latents], axis=-1)
        context = Context(driving.text, driving.image, Frames(given))

        def arrange(x: Float[Array, "b k n d"]) -> Float[Array, "b shards own_k n d"]:
            return shard(by_shard(x, (f + 1) * h * w, h * w), axes.BATCH, axes.SEQUENCE, None, axes.HEADS, None)

        found = extract(context, latents, self.TIMESTEP, Animate2Config.origin((f, h, w)), arrange)
        return PreparedDriving(*found, driving.negative)

    def prepare(self, text: Float[Array, "b k e"], driving: PreparedDriving) -> PreparedDriving:
        return driving

    def frame_keys(self, driving: PreparedDriving, layer: Int[Array, ""], signal: Signal) -> FrameKeys:
        k, v = (jax.lax.dynamic_index_in_dim(a, layer, 1, keepdims=False) for a in driving[:2])
        return FrameKeys(k, v, math.prod(signal.grid[1:]))

    def start(
        self, x: Float[Array, "b s e"], signal: Signal, driving: PreparedDriving
    ) -> tuple[Float[Array, "b s e"], Float[Array, "b s e"], After]:
        """The tokens, twice: the state is those before the block, which the negative branch keeps at one layer."""

        def after(layer: jax.Array, x: jax.Array, before: jax.Array) -> tuple[jax.Array, jax.Array]:
            x = jnp.where(((layer == self.skipped) & driving.negative)[:, None, None], before, x)
            return x, x

        return x, x, after
