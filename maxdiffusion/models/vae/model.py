"""The WAN video autoencoders: encoder, decoder, and the loop over chunks of frames."""

from __future__ import annotations

import functools
import itertools
import logging
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from maxdiffusion import parallel
from maxdiffusion.errors import UserError
from maxdiffusion.models.layers import Dtypes
from maxdiffusion.models.vae import blocks
from maxdiffusion.models.vae.blocks import Cache, Dtype, Video
from maxdiffusion.models.vae.config import VAEConfig
from maxdiffusion.parallel import axes, shard
from maxdiffusion.runtime import memory

log = logging.getLogger(__name__)

Latents = Float[Array, "b fl hl wl z"]

# Of one full-resolution activation in one chunk; the peak of a chunk is about eight of these, and the cache. On TPU7x-8
# chunks of five latent frames of 1280x720 instead of one take 17 % less a frame by the compiler's cycle estimates, but
# 5.8 GiB instead of 2.8 beside a transformer that may stay, and 190 s of one core to compile instead of 145.
_CHUNK_BYTES = 128 * 2**20


class Encoder(nnx.Module):
    """Pixels to the moments of the latents (reference: WanEncoder3d)."""

    def __init__(self, config: VAEConfig, weights_dtype: Dtype):
        dims = [config.base_dim * m for m in (1, *config.dim_mult)]
        self.conv_in = blocks.CausalConv3d((3, 3, 3), config.channels, dims[0], weights_dtype)
        levels: list[nnx.Module] = []
        for (c, o), temporal in itertools.zip_longest(itertools.pairwise(dims), config.temperal_downsample):
            down = None if temporal is None else blocks.Downsample(o, temporal, weights_dtype)
            if config.is_residual:
                levels.append(blocks.ResidualDownBlock(c, o, config.num_res_blocks, down, weights_dtype))
            else:
                for j in range(config.num_res_blocks):
                    levels.append(blocks.ResidualBlock(c if j == 0 else o, o, weights_dtype))
                levels += [] if down is None else [down]
        self.down_blocks = nnx.List(levels)
        self.mid_block = blocks.MidBlock(dims[-1], weights_dtype)
        self.norm_out = blocks.RMSNorm(dims[-1])
        self.conv_out = blocks.CausalConv3d((3, 3, 3), dims[-1], 2 * config.z_dim, weights_dtype)

    def __call__(self, x: Video, cache: Cache) -> tuple[Float[Array, "b fo ho wo o"], Cache]:
        end = blocks.activated(self.norm_out, self.conv_out)
        return blocks.chain((self.conv_in, *self.down_blocks, self.mid_block, end), blocks.place(x), cache)


class Decoder(nnx.Module):
    """Latents to pixels (reference: WanDecoder3d)."""

    def __init__(self, config: VAEConfig, weights_dtype: Dtype):
        dims = [config.decoder_dim * m for m in (config.dim_mult[-1], *reversed(config.dim_mult))]
        self.conv_in = blocks.CausalConv3d((3, 3, 3), config.z_dim, dims[0], weights_dtype)
        self.mid_block = blocks.MidBlock(dims[0], weights_dtype)
        # WAN 2.1 halves the channels where it doubles the pixels, 2.2 in the block after.
        block, halved = (blocks.ResidualUpBlock, 1) if config.is_residual else (blocks.UpBlock, 2)
        levels: list[blocks.UpBlock] = []
        for (c, o), temporal in itertools.zip_longest(itertools.pairwise(dims), reversed(config.temperal_downsample)):
            up = None if temporal is None else blocks.Upsample(o, o // halved, temporal, weights_dtype)
            levels.append(block(c if not levels else c // halved, o, config.num_res_blocks, up, weights_dtype))
        self.up_blocks = nnx.List(levels)
        self.norm_out = blocks.RMSNorm(dims[-1])
        self.conv_out = blocks.CausalConv3d((3, 3, 3), dims[-1], config.channels, weights_dtype)

    def __call__(self, x: Video, cache: Cache) -> tuple[Float[Array, "b fo ho wo o"], Cache]:
        end = blocks.activated(self.norm_out, self.conv_out)
        return blocks.chain((self.conv_in, self.mid_block, *self.up_blocks, end), blocks.place(x), cache)


class WanVAE(nnx.Module):
    """AutoencoderKLWan of WAN 2.1 and 2.2, which differ in `VAEConfig`.

    Long videos run chunk by chunk with a cache of earlier frames; the result does not depend on the chunks' size. A
    video whose activations fit in one chunk is one program, any other is two, however long: one for the first latent
    frame and one for all other chunks, which have one size. Where the device's memory does not suffice, the chunks are
    halved, for this video and those that follow.
    """

    def __init__(self, config: VAEConfig, dtypes: Dtypes = Dtypes()):  # noqa: B008 (immutable)
        self.config = config
        self.dtype = jnp.dtype(dtypes.activations)
        self.chunk_bytes = _CHUNK_BYTES
        self.encoder = Encoder(config, dtypes.weights)
        self.quant_conv = blocks.Pointwise(2 * config.z_dim, 2 * config.z_dim, dtypes.weights)
        self.post_quant_conv = blocks.Pointwise(config.z_dim, config.z_dim, dtypes.weights)
        self.decoder = Decoder(config, dtypes.weights)

    def encode(self, video: Video, *, chunk: int | None = None) -> Latents:
        """Normalised latents (mu - mean) / std, float32, of a video in [-1, 1] with 3 channels.

        `chunk` is the largest number of latent frames in one program; None: as many as fit in memory.

        Raises:
          UserError: a number of frames that is not 4n + 1, or sides that do not divide by 8 (for the official config).
        """
        _, frames, height, width, _ = video.shape
        t, s = self.config.temporal_factor, self.config.spatial_factor
        if (frames - 1) % t or frames < 1:
            near = 1 + t * max(0, round((frames - 1) / t))
            raise UserError(
                f"A video of {frames} frames cannot be encoded: it must have {t}n+1 frames, such as {near}."
            )
        if height % s or width % s:
            near_h, near_w = (s * max(1, round(side / s)) for side in (height, width))
            raise UserError(
                f"A video of {width}x{height} pixels cannot be encoded: both sides must divide by {s}, "
                f"such as {near_w}x{near_h}."
            )
        return jnp.concatenate(list(self._in_chunks("encode", video, chunk)), axis=1)

    def decode(self, latents: Latents, *, chunk: int | None = None) -> Video:
        """The video in [-1, 1], float32, of normalised latents; `chunk` as in `encode`."""
        return jnp.concatenate(list(self.decode_chunks(latents, chunk=chunk)), axis=1)

    def decode_chunks(self, latents: Latents, *, chunk: int | None = None) -> Iterator[Video]:
        """The frames of `decode` in order, chunk by chunk, in memory that does not grow with the video's length."""
        return self._in_chunks("decode", latents, chunk)

    def calls(self, name: str, shape: Sequence[int]) -> tuple[int, ...]:
        """How often `encode` or `decode` (`name`) runs each of its programs for an array of that shape."""
        rest = len(self._lengths(name, shape, None)) - 1
        return (1, rest) if rest else (1,)

    def lower(self, name: str, x: jax.ShapeDtypeStruct, index: int) -> jax.stages.Lowered:
        """The program of that index in `calls`, for an abstract array."""
        net, cache, lengths = nnx.split(self), None, self._lengths(name, x.shape, None)

        def chunk(length: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((x.shape[0], length, *x.shape[2:]), x.dtype, sharding=x.sharding)

        if index:
            first = jax.eval_shape(functools.partial(_run, net[0], name=name, cache=None), net[1], x=chunk(lengths[0]))
            cache = jax.tree.map(lambda leaf: parallel.like(leaf.shape, leaf.dtype, *_CACHED), first[1])
        return program(index > 0).lower(*net, name, cache, chunk(lengths[index]))

    def _in_chunks(self, name: str, x: Video, chunk: int | None) -> Iterator[Video]:
        """The frames of the result in order.

        After a failure for lack of memory the video starts again, because the failed call has taken the cache; frames
        that were given are computed, but not given again. Of several processes each decides alone: all run the same
        programs in memories of one size.
        """
        given = 0
        out: Video | None = None
        while True:
            at = 0
            try:
                for out in self._run_chunks(name, x, chunk):
                    at += out.shape[1]
                    if at > given:
                        first, given = given - at, at
                        yield out[:, first:]
                return
            except jax.errors.JaxRuntimeError as error:
                latent_frames, frame_bytes = self._largest_chunk(name, x.shape)
                if chunk is not None or latent_frames == 1 or not memory.exhausted(error):
                    raise
            out = None  # with the exception, which holds the arrays of the failed call
            self.chunk_bytes = latent_frames // 2 * frame_bytes
            log.warning(
                "out of device memory in a call that %ss %d latent frames; tried again by %d",
                *(name, latent_frames, latent_frames // 2),
            )

    def _run_chunks(self, name: str, x: Video, chunk: int | None) -> Iterator[Video]:
        net, cache, at = nnx.split(self), None, 0
        for length in self._lengths(name, x.shape, chunk):
            rest = min(length, x.shape[1] - at)
            part = x if rest == x.shape[1] else jax.lax.dynamic_slice_in_dim(x, at, rest, axis=1)
            if rest < length:  # causal: frames of padding after the video change none of its own
                part = jnp.pad(part, [(0, length - rest) if axis == 1 else (0, 0) for axis in range(x.ndim)])
            out, cache = jax.block_until_ready(program(cache is not None)(*net, name, cache, part))
            at += length
            yield out if rest == length else out[:, : out.shape[1] * rest // length]

    def _largest_chunk(self, name: str, shape: Sequence[int]) -> tuple[int, int]:
        """Latent frames of the largest call, and the bytes that each counts for."""
        config, (batch, frames, height, width, _) = self.config, shape
        t, s = config.temporal_factor, config.spatial_factor
        if name == "decode":
            height, width = height * s, width * s
        else:
            frames = (frames - 1) // t + 1
        pixels, dim = height * width // config.patch**2, max(config.base_dim, config.decoder_dim)
        frame_bytes = batch * t * pixels * dim * self.dtype.itemsize
        return min(frames, max(1, self.chunk_bytes // frame_bytes)), frame_bytes

    def _lengths(self, name: str, shape: Sequence[int], chunk: int | None) -> list[int]:
        """Frames of each call: all at once if they fit, else those of the first latent frame and then equal parts.

        The last part may be longer than the frames that are left.
        """
        t, frames, step = self.config.temporal_factor, shape[1], 1
        if name == "encode":
            frames, step = (frames - 1) // t + 1, t
        fitting = self._largest_chunk(name, shape)[0] if chunk is None else chunk
        if frames <= fitting:
            return [1 + (frames - 1) * step]
        count = math.ceil((frames - 1) / fitting)
        return [1] + [math.ceil((frames - 1) / count) * step] * count

    def _encode_chunk(self, video: Video, cache: Cache) -> tuple[Latents, Cache]:
        moments, cache = self.encoder(_fold(video.astype(self.dtype), self.config.patch), cache)
        mu = self.quant_conv(moments)[..., : self.config.z_dim].astype(jnp.float32)
        mean, std = (jnp.asarray(v, jnp.float32) for v in (self.config.latents_mean, self.config.latents_std))
        return shard((mu - mean) / std, axes.BATCH, None, None, None, None), cache

    def _decode_chunk(self, latents: Latents, cache: Cache) -> tuple[Video, Cache]:
        mean, std = (jnp.asarray(v, jnp.float32) for v in (self.config.latents_mean, self.config.latents_std))
        z = (latents.astype(jnp.float32) * std + mean).astype(self.dtype)
        video, cache = self.decoder(self.post_quant_conv(z), cache)
        return jnp.clip(_unfold(video, self.config.patch).astype(jnp.float32), -1.0, 1.0), cache


def _fold(x: Video, p: int) -> Float[Array, "b f ho wo o"]:
    """Patches of pixels as channels, (c, w, h) from outermost to innermost (reference: `patchify`)."""
    b, f, h, w, c = x.shape
    return x.reshape(b, f, h // p, p, w // p, p, c).transpose(0, 1, 2, 4, 6, 5, 3).reshape(b, f, h // p, w // p, -1)


def _unfold(x: Video, p: int) -> Float[Array, "b f ho wo 3"]:
    """The inverse of `_fold`."""
    b, f, h, w, _ = x.shape
    return x.reshape(b, f, h, w, -1, p, p).transpose(0, 1, 2, 6, 3, 5, 4).reshape(b, f, h * p, w * p, -1)


def program(later: bool = False) -> Any:
    """`_run` compiled under the current placement; the cache is donated, so that it is updated in place.

    `later` is the program of the chunks after the first. On a TPU it is compiled at XLA's level O1, that of the first,
    which runs once a video, at O0: higher levels tune each convolution for long. By the compiler's cycle estimates four
    frames of 1280x720 over 8 devices take 33 ms on TPU7x and 56 on v6e; of an earlier form 35 and 72, at O0 146 and
    119. Compiling them takes 145 s of one core, at O0 47; by default one convolution of 96 channels takes 69 s,
    and half of its time at O1.
    """
    return parallel.jit(_run, static_argnums=(0, 2), donate_argnums=3, tpu_level=19 if later else 9)


def _run(graph: Any, state: Any, name: str, cache: Cache, x: jax.Array) -> tuple[jax.Array, Cache]:
    """Encodes or decodes one chunk."""
    vae = nnx.merge(graph, state)
    out, cache = (vae._encode_chunk if name == "encode" else vae._decode_chunk)(x, cache)
    return out, jax.tree.map(_settled, cache)


# The placement of the cache between programs.
_CACHED = (axes.BATCH, None, None, axes.WIDTH, None)


def _settled(leaf: jax.Array) -> jax.Array:
    sharding = parallel.like(leaf.shape, leaf.dtype, *_CACHED).sharding
    return leaf if sharding is None else jax.lax.with_sharding_constraint(leaf, sharding)
