"""Speech to video (Wan-S2V, 2025, arXiv:2508.18621): attention to a sound after some blocks, and tokens of frames.

Tokens of a reference image and of the frames before the clip follow those of the video.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from maxdiffusion.models.dit.adapter import Adapter, After, Tokens, after_layers
from maxdiffusion.models.dit.block import Attention, Signal
from maxdiffusion.models.dit.config import DiTConfig, S2VConfig
from maxdiffusion.models.dit.context import KeysValues
from maxdiffusion.models.dit.frame_attention import frame_attention
from maxdiffusion.models.dit.motion import CausalConv1d
from maxdiffusion.models.dit.patches import fold
from maxdiffusion.models.dit.rope import rotary_tables_at
from maxdiffusion.models.layers import Dtypes, Linear, layer_norm, parameter, pick, scan, stack
from maxdiffusion.parallel import axes, shard


class Speech(NamedTuple):
    """The input of an S2V transformer.

    Attributes:
      audio: hidden states of the audio encoder for each frame of the video, all layers; zeros are no sound.
      pose: latents of the pose video; zeros without one.
      reference: latents of the image.
      motion: latents of the last frames before the clip.
      continued: 1 where the clip goes on from `motion`, 0 for a first clip.
    """

    audio: Float[Array, "b layers frames c"]
    pose: Float[Array, "b f h w c"]
    reference: Float[Array, "b 1 h w c"]
    motion: Float[Array, "b m h w c"]
    continued: Float[Array, " b"]


class PreparedSpeech(NamedTuple):
    """`Speech` with keys and values of the sound and its modulation (shift, scale; fp32) for each injection."""

    pose: Float[Array, "b f h w c"]
    reference: Float[Array, "b 1 h w c"]
    motion: Float[Array, "b m h w c"]
    continued: Float[Array, " b"]
    audio: KeysValues
    modulation: Float[Array, "b layers f 2*e"]


class AudioEncoder(nnx.Module):
    """Encodes the hidden states of every video frame as a few tokens for every latent frame.

    Reference: `CausalAudioEncoder` and `MotionEncoder_tc` of the official repository.
    """

    SIZE, EPS = 3, 1e-6

    def __init__(self, s2v: S2VConfig, dim: int, dtypes: Dtypes):
        self.heads, quarter = s2v.num_audio_token, dim // 4
        self.weights = parameter((s2v.audio_layers,), jnp.float32)
        self.conv1_local = CausalConv1d(self.SIZE, s2v.audio_dim, quarter * self.heads, 1, dtypes.weights)
        self.conv1_global = CausalConv1d(self.SIZE, s2v.audio_dim, quarter, 1, dtypes.weights)
        self.conv2 = CausalConv1d(self.SIZE, quarter, dim // 2, 2, dtypes.weights)
        self.conv3 = CausalConv1d(self.SIZE, dim // 2, dim, 2, dtypes.weights)
        self.final_linear = Linear(dim, dim, (None, axes.EMBED), Dtypes(dtypes.weights))
        self.padding_tokens = parameter((dim,), dtypes.weights)

    def __call__(
        self, audio: Float[Array, "b layers t c"]
    ) -> tuple[Float[Array, "b f e"], Float[Array, "b f tokens e"]]:
        """Tokens of every fourth frame, from the first on, fp32: one of the whole; one of each head, then padding."""
        weights = jax.nn.silu(self.weights[...])
        x = jnp.einsum("bltc,l->btc", audio, weights / weights.sum(), precision="highest")
        b, t, _ = x.shape
        local = self.conv1_local(x).reshape(b, t, self.heads, -1)
        local = self._halve_twice(local.transpose(0, 2, 1, 3).reshape(b * self.heads, t, -1))
        local = local.reshape(b, self.heads, *local.shape[1:]).transpose(0, 2, 1, 3)
        padding = jnp.broadcast_to(self.padding_tokens[...].astype(local.dtype), local[:, :, :1].shape)
        whole = self.final_linear(self._halve_twice(self.conv1_global(x)))
        return whole, jnp.concatenate([local, padding], axis=2)

    def _halve_twice(self, x: Float[Array, "b t c"]) -> Float[Array, "b f e"]:
        for conv in (self.conv2, self.conv3):
            x = conv(jax.nn.silu(layer_norm(x, self.EPS)))
        return jax.nn.silu(layer_norm(x, self.EPS))


class FramePacker(nnx.Module):
    """Embeds latent frames in patches that grow with their distance (FramePack: Zhang and Agrawala, 2025).

    Reference: `FramePackMotioner` of the official repository.
    """

    def __init__(self, config: DiTConfig, s2v: S2VConfig, dtypes: Dtypes):
        t, h, w = config.patch_size
        self.buckets = s2v.BUCKETS
        self.patches = tuple((t * 2**i, h * 2**i, w * 2**i) for i in range(len(self.buckets)))
        widths = [s2v.cond_dim * math.prod(patch) for patch in self.patches]
        self.proj, self.proj_2x, self.proj_4x = (
            Linear(width, config.dim, (None, axes.EMBED), dtypes) for width in widths
        )

    def __call__(self, latents: Float[Array, "b m h w c"]) -> Float[Array, "b k e"]:
        """The nearest frame first; the latents are as many frames as all buckets, oldest first."""
        tokens: list[jax.Array] = []
        end = latents.shape[1]
        for count, patch, proj in zip(self.buckets, self.patches, (self.proj, self.proj_2x, self.proj_4x), strict=True):
            tokens.append(proj(fold(latents[:, end - count : end], patch)))
            end -= count
        return jnp.concatenate(tokens, axis=1)

    def tables(self, height: int, width: int, head_dim: int) -> tuple[Float[Array, "k d"], Float[Array, "k d"]]:
        """Tables of `rope.rotate` for frames of that grid, which count back from -1; large patches skip positions."""
        found: list[tuple[jax.Array, jax.Array]] = []
        distance = 0
        for i, count in enumerate(self.buckets):
            distance += count
            frames = -_spread(distance, distance - count + 1, count // 2**i)
            rows, columns = (_spread(0, extent - 1, extent // 2**i) for extent in (height, width))
            found.append(rotary_tables_at((frames, rows, columns), head_dim))
        cos, sin = (jnp.concatenate(tables) for tables in zip(*found, strict=True))
        return cos, sin


def _spread(first: int, last: int, count: int) -> np.ndarray:
    return np.linspace(first, last, count).astype(np.int64)


class AudioInjection(nnx.Module):
    """Attention of the video's tokens to the sound of their latent frame, after a norm that the sound modulates."""

    EPS = 1e-5  # of `diffusers.models.normalization.AdaLayerNorm`

    def __init__(self, config: DiTConfig, dtypes: Dtypes):
        self.dtype = dtypes.activations
        self.attention = Attention(config, dtypes)
        self.modulation = Linear(config.dim, 2 * config.dim, (axes.EMBED, None), Dtypes(dtypes.weights))

    def source(
        self, whole: Float[Array, "b f e"], local: Float[Array, "b k e"]
    ) -> tuple[Float[Array, "b k n d"], Float[Array, "b k n d"], Float[Array, "b f 2*e"]]:
        """Keys, values and modulation: what does not depend on the latents."""
        keys = self.attention.key(local)
        return keys, self.attention.value(local), self.modulation(jax.nn.silu(whole))

    def __call__(
        self,
        x: Float[Array, "b s e"],
        keys: Float[Array, "b k n d"],
        values: Float[Array, "b k n d"],
        modulation: Float[Array, "b f 2*e"],
        tokens_per_frame: int,
    ) -> Float[Array, "b s e"]:
        frames = modulation.shape[1]
        own = jnp.minimum(jnp.arange(x.shape[1]) // tokens_per_frame, frames - 1)
        shift, scale = jnp.split(jnp.take(modulation, own, axis=1), 2, axis=-1)
        h = layer_norm(x, self.EPS) * (1 + scale) + shift
        q = self.attention.query(h)
        return self.attention.output(frame_attention(q, keys, values, tokens_per_frame, keys.shape[1] // frames))


class S2V(Adapter):
    """Reference: `WanModel_S2V` of the official repository, in the configuration of its checkpoint."""

    REFERENCE = 30  # position of the reference on the frame axis

    def __init__(self, config: DiTConfig, s2v: S2VConfig, dtypes: Dtypes):
        self.layers, self.patch, self.head_dim = config.adapter_layers, config.patch_size, config.attention_head_dim
        channels = s2v.cond_dim * math.prod(config.patch_size)
        self.pose_embedding = Linear(channels, config.dim, (None, axes.EMBED), dtypes)
        self.kinds = parameter((3, config.dim), jnp.float32)  # added to tokens of the video, reference, motion
        self.frame_packer = FramePacker(config, s2v, dtypes)
        self.audio_encoder = AudioEncoder(s2v, config.dim, dtypes)
        self.blocks = stack(lambda: AudioInjection(config, dtypes), len(self.layers))

    def prepare(self, text: Float[Array, "b k e"], speech: Speech) -> PreparedSpeech:
        del text
        # The frames before the clip are given the sound of its first.
        latents = speech.motion.shape[1]
        audio = jnp.pad(speech.audio, ((0, 0), (0, 0), (4 * latents - 3, 0), (0, 0)), mode="edge")
        whole, local = (tokens[:, latents:] for tokens in self.audio_encoder(audio))
        local = local.reshape(local.shape[0], -1, local.shape[-1])
        _, made = scan(self.blocks, lambda one, _, __: (None, one.source(whole, local)), None, None, False)
        keys, values, modulation = (jnp.moveaxis(a, 0, 1) for a in made)
        return PreparedSpeech(*speech[1:], KeysValues(keys, values), modulation)

    def extend(
        self, tokens: Tokens, patch_embedding: Callable[[jax.Array], jax.Array], prepared: PreparedSpeech
    ) -> Tokens:
        """Adds the pose; appends the reference and, where the clip goes on, the motion."""
        _, height, width = (a // b for a, b in zip(prepared.pose.shape[1:4], self.patch, strict=True))
        reference = patch_embedding(fold(prepared.reference, self.patch))
        motion = self.frame_packer(prepared.motion)
        pose = self.pose_embedding(fold(prepared.pose, self.patch))
        parts = (_sum(tokens.x, pose), reference, motion)
        x = jnp.concatenate([_sum(part, kind) for part, kind in zip(parts, self.kinds[...], strict=True)], axis=1)
        at = np.array([self.REFERENCE]), np.arange(height), np.arange(width)
        tables = rotary_tables_at(at, self.head_dim), self.frame_packer.tables(height, width, self.head_dim)
        cos, sin = (jnp.concatenate(each) for each in zip((tokens.cos, tokens.sin), *tables, strict=True))
        seen = jnp.arange(x.shape[1]) < x.shape[1] - motion.shape[1]
        return Tokens(x, cos, sin, seen | (prepared.continued > 0)[:, None])

    def start(
        self, x: Float[Array, "b s e"], signal: Signal, prepared: PreparedSpeech
    ) -> tuple[Float[Array, "b s e"], tuple[()], After]:
        """The tokens, and the injection of the sound after some blocks of the trunk."""
        per_frame = math.prod(signal.grid[1:])
        video = (jnp.arange(x.shape[1]) < math.prod(signal.grid))[:, None]

        def inject(index: jax.Array, x: jax.Array, state: tuple[()]) -> tuple[jax.Array, tuple[()]]:
            sound = (*prepared.audio, prepared.modulation)
            k, v, modulation = (jax.lax.dynamic_index_in_dim(a, index, 1, keepdims=False) for a in sound)
            h = pick(self.blocks, index)(x, k, v, modulation, per_frame)
            return shard(_sum(x, jnp.where(video, h, 0)), axes.BATCH, axes.SEQUENCE, None), state

        return x, (), after_layers(self.layers, inject)


def _sum(x: jax.Array, y: jax.Array) -> jax.Array:
    return (x.astype(jnp.float32) + y.astype(jnp.float32)).astype(x.dtype)
