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
from maxdiffusion.models.dit.context import Context, Frames, KeysValues, Shared
from maxdiffusion.parallel import axes, shard


class DrivingVideo(NamedTuple):
    """The driving video of all examples.

    Attributes:
      latents: a frame fewer than the result's.
      text, image: hidden states of the encoders.
    """

    latents: Float[Array, "f-1 h w c"]
    text: Float[Array, "k e_text"]
    image: Float[Array, "k e_image"] | None


class Driving(NamedTuple):
    """The input of an Animate 2 transformer.

    Attributes:
      video: a `DrivingVideo`.
      negative: whether the branch of guidance is the negative one.
    """

    video: Shared
    negative: Bool[Array, " b"]


class PreparedDriving(NamedTuple):
    """`Driving` after the driving video's own pass.

    Attributes:
      tokens: `KeysValues` of its tokens in every layer, by `frames.by_shard`: layers shards k n d, the keys with their
        positions. At 640 x 800 34 GB; of eight devices each has 6.6 to 10 GB.
      negative: as in `Driving`.
    """

    tokens: Shared
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
        latents, text, image = jax.tree.map(lambda a: a[None], driving.video.value)
        f, h, w = (a // b for a, b in zip(latents.shape[1:4], self.patch, strict=True))
        # All frames are given: the mask of image to video is 1, and the given frames are the latents.
        given = jnp.concatenate([jnp.ones((*latents.shape[:4], 4), latents.dtype), latents], axis=-1)
        context = Context(text, image, Frames(given))

        def arrange(x: Float[Array, "b k n d"]) -> Float[Array, "b shards own_k n d"]:
            return shard(by_shard(x, (f + 1) * h * w, h * w), axes.BATCH, axes.SEQUENCE, None, axes.HEADS, None)

        found = extract(context, latents, self.TIMESTEP, Animate2Config.origin((f, h, w)), arrange)
        return PreparedDriving(Shared(jax.tree.map(lambda a: a[0], found)), driving.negative)

    def prepare(self, text: Float[Array, "b k e"], driving: PreparedDriving) -> PreparedDriving:
        return driving

    def frame_keys(self, driving: PreparedDriving, layer: Int[Array, ""], signal: Signal) -> FrameKeys:
        def of_layer(a: Float[Array, "layers shards k n d"]) -> Float[Array, "b shards k n d"]:
            one = jax.lax.dynamic_index_in_dim(a, layer, 0, keepdims=False)
            return jnp.broadcast_to(one, (len(driving.negative), *one.shape))

        tokens: KeysValues = driving.tokens.value
        return FrameKeys(of_layer(tokens.keys), of_layer(tokens.values), math.prod(signal.grid[1:]))

    def start(
        self, x: Float[Array, "b s e"], signal: Signal, driving: PreparedDriving
    ) -> tuple[Float[Array, "b s e"], Float[Array, "b s e"], After]:
        """The tokens, twice: the state is those before the block, which the negative branch keeps at one layer."""

        def after(layer: jax.Array, x: jax.Array, before: jax.Array) -> tuple[jax.Array, jax.Array]:
            x = jnp.where(((layer == self.skipped) & driving.negative)[:, None, None], before, x)
            return x, x

        return x, x, after
