"""Animate: a pose added to the embedded latents, and attention to the motion of a face after every few blocks."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from maxdiffusion.models.dit.adapter import Adapter, After, after_layers
from maxdiffusion.models.dit.block import Signal
from maxdiffusion.models.dit.config import AnimateConfig, DiTConfig
from maxdiffusion.models.dit.context import KeysValues
from maxdiffusion.models.dit.frame_attention import frame_attention
from maxdiffusion.models.dit.motion import FaceEncoder, MotionEncoder
from maxdiffusion.models.dit.patches import fold
from maxdiffusion.models.layers import Dtypes, Linear, RMSNorm, layer_norm, pick, scan, stack
from maxdiffusion.parallel import axes, shard


class Performance(NamedTuple):
    """Pose and face of the driving video, one latent frame fewer than the result, which begins with the character."""

    pose: Float[Array, "b f-1 h w c"]  # latents of the pose video
    face: Float[Array, "b frames height width 3"]  # pixels in [-1, 1]


class PreparedPerformance(NamedTuple):
    """`Performance` with the keys and values of the face for each adapter."""

    pose: Float[Array, "b f-1 h w c"]
    face: KeysValues


class FaceAdapter(nnx.Module):
    """Attention of every token to the face's tokens of its own latent frame.

    Reference: `WanAnimateFaceBlockCrossAttention` in diffusers' transformer_wan_animate.py.
    """

    def __init__(self, config: DiTConfig, dtypes: Dtypes):
        self.heads, self.eps, self.dtype = config.num_attention_heads, config.eps, dtypes.activations
        self.to_q = Linear(config.dim, config.dim, (axes.EMBED, axes.HEADS), dtypes)
        self.to_k = Linear(config.dim, config.dim, (axes.EMBED, axes.HEADS), dtypes)
        self.to_v = Linear(config.dim, config.dim, (axes.EMBED, axes.HEADS), dtypes)
        self.to_out = Linear(config.dim, config.dim, (axes.HEADS, axes.EMBED), dtypes)
        self.norm_q = RMSNorm(config.attention_head_dim, config.eps)
        self.norm_k = RMSNorm(config.attention_head_dim, config.eps)

    def _heads(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:2], self.heads, -1)

    def source(self, face: Float[Array, "b k e"]) -> tuple[Float[Array, "b k n d"], Float[Array, "b k n d"]]:
        face = layer_norm(face, self.eps)
        return self.norm_k(self._heads(self.to_k(face))).astype(self.dtype), self._heads(self.to_v(face))

    def __call__(
        self,
        x: Float[Array, "b s e"],
        keys: Float[Array, "b k n d"],
        values: Float[Array, "b k n d"],
        tokens_per_frame: int,
        keys_per_frame: int,
    ) -> Float[Array, "b s e"]:
        q = self.norm_q(self._heads(self.to_q(layer_norm(x, self.eps)))).astype(self.dtype)
        out = frame_attention(q, keys, values, tokens_per_frame, keys_per_frame)
        return self.to_out(out.reshape(*x.shape[:2], -1))


class Animate(Adapter):
    """Pose embedding, motion encoder, face encoder and the face adapters (`blocks`).

    Reference: `diffusers.WanAnimateTransformer3DModel`.
    """

    def __init__(self, config: DiTConfig, animate: AnimateConfig, dtypes: Dtypes):
        self.layers = config.adapter_layers
        self.patch = config.patch_size
        channels = animate.latent_channels * math.prod(config.patch_size)
        self.pose_patch_embedding = Linear(channels, config.dim, (None, axes.EMBED), dtypes)
        self.motion_encoder = MotionEncoder(animate, dtypes)
        self.face_encoder = FaceEncoder(animate, config.dim, dtypes)
        self.blocks = stack(lambda: FaceAdapter(config, dtypes), len(self.layers))

    def prepare(self, text: Float[Array, "b k e"], performance: Performance) -> PreparedPerformance:
        del text
        face = self.face_encoder(self.motion_encoder(performance.face))
        face = jnp.pad(face, ((0, 0), (1, 0), (0, 0), (0, 0)))  # the character's own frame has no motion
        face = face.reshape(face.shape[0], -1, face.shape[-1])
        _, (keys, values) = scan(self.blocks, lambda one, _, __: (None, one.source(face)), None, None, False)
        return PreparedPerformance(performance.pose, KeysValues(jnp.moveaxis(keys, 0, 1), jnp.moveaxis(values, 0, 1)))

    def start(
        self, x: Float[Array, "b s e"], signal: Signal, performance: PreparedPerformance
    ) -> tuple[Float[Array, "b s e"], tuple[()], After]:
        """The tokens with the pose added, and the face attention after each block of the trunk."""
        frames, height, width = (a // b for a, b in zip(performance.pose.shape[1:4], self.patch, strict=True))
        per_frame = height * width
        pose = self.pose_patch_embedding(fold(performance.pose, self.patch))
        pose = jnp.pad(pose, ((0, 0), (per_frame, x.shape[1] - per_frame - pose.shape[1]), (0, 0)))
        keys_per_frame = performance.face.keys.shape[2] // (frames + 1)

        def adapt(index: jax.Array, x: jax.Array, state: tuple[()]) -> tuple[jax.Array, tuple[()]]:
            keys, values = (jax.lax.dynamic_index_in_dim(a, index, 1, keepdims=False) for a in performance.face)
            h = pick(self.blocks, index)(x, keys, values, per_frame, keys_per_frame)
            return shard(_sum(x, h), axes.BATCH, axes.SEQUENCE, None), state

        return shard(_sum(x, pose), axes.BATCH, axes.SEQUENCE, None), (), after_layers(self.layers, adapt)


def _sum(x: jax.Array, y: jax.Array) -> jax.Array:
    return (x.astype(jnp.float32) + y.astype(jnp.float32)).astype(x.dtype)
