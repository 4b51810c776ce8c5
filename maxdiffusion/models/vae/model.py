"""The WAN video autoencoders: encoder, decoder, and the loops over chunks of frames."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from maxdiffusion import parallel
from maxdiffusion.errors import UserError
from maxdiffusion.models.vae.blocks import (
    Cache,
    CausalConv3d,
    Downsample,
    Dtype,
    MidBlock,
    Pointwise,
    ResidualBlock,
    ResidualDownBlock,
    ResidualUpBlock,
    RMSNorm,
    UpBlock,
    Upsample,
    Video,
    chain,
    place,
)
from maxdiffusion.models.vae.config import VAEConfig
from maxdiffusion.parallel import axes, shard

Latents = Float[Array, "b fl hl wl z"]

# Of one full-resolution activation in one chunk; the peak of a chunk is about eight of these, and the cache.
_CHUNK_BYTES = 128 * 2**20


class Encoder(nnx.Module):
    """Pixels to the moments of the latents (reference: WanEncoder3d)."""

    def __init__(self, config: VAEConfig, weights_dtype: Dtype):
        dims = [config.base_dim * m for m in (1, *config.dim_mult)]
        self.conv_in = CausalConv3d((3, 3, 3), config.channels, dims[0], weights_dtype)
        blocks: list[nnx.Module] = []
        for (c, o), temporal in itertools.zip_longest(itertools.pairwise(dims), config.temperal_downsample):
            down = None if temporal is None else Downsample(o, temporal, weights_dtype)
            if config.is_residual:
                blocks.append(ResidualDownBlock(c, o, config.num_res_blocks, down, weights_dtype))
            else:
                blocks += [ResidualBlock(c if j == 0 else o, o, weights_dtype) for j in range(config.num_res_blocks)]
                blocks += [] if down is None else [down]
        self.down_blocks = nnx.List(blocks)
        self.mid_block = MidBlock(dims[-1], weights_dtype)
        self.norm_out = RMSNorm(dims[-1])
        self.conv_out = CausalConv3d((3, 3, 3), dims[-1], 2 * config.z_dim, weights_dtype)

    def __call__(self, x: Video, cache: Cache) -> tuple[Float[Array, "b fo ho wo o"], Cache]:
        start, body, end = (None, None, None) if cache is None else cache
        x, start = self.conv_in(place(x), start)
        x, body = chain((*self.down_blocks, self.mid_block), x, body)
        x, end = self.conv_out(nnx.silu(self.norm_out(x)), end)
        return x, (start, body, end)


class Decoder(nnx.Module):
    """Latents to pixels (reference: WanDecoder3d)."""

    def __init__(self, config: VAEConfig, weights_dtype: Dtype):
        dims = [config.decoder_dim * m for m in (config.dim_mult[-1], *reversed(config.dim_mult))]
        self.conv_in = CausalConv3d((3, 3, 3), config.z_dim, dims[0], weights_dtype)
        self.mid_block = MidBlock(dims[0], weights_dtype)
        # WAN 2.1 halves the channels where it doubles the pixels, 2.2 in the block after.
        block, halved = (ResidualUpBlock, 1) if config.is_residual else (UpBlock, 2)
        blocks: list[UpBlock] = []
        for (c, o), temporal in itertools.zip_longest(itertools.pairwise(dims), reversed(config.temperal_downsample)):
            up = None if temporal is None else Upsample(o, o // halved, temporal, weights_dtype)
            blocks.append(block(c if not blocks else c // halved, o, config.num_res_blocks, up, weights_dtype))
        self.up_blocks = nnx.List(blocks)
        self.norm_out = RMSNorm(dims[-1])
        self.conv_out = CausalConv3d((3, 3, 3), dims[-1], config.channels, weights_dtype)

    def __call__(self, x: Video, cache: Cache) -> tuple[Float[Array, "b fo ho wo o"], Cache]:
        start, body, end = (None, None, None) if cache is None else cache
        x, start = self.conv_in(place(x), start)
        x, body = chain((self.mid_block, *self.up_blocks), x, body)
        x, end = self.conv_out(nnx.silu(self.norm_out(x)), end)
        return x, (start, body, end)


class WanVAE(nnx.Module):
    """AutoencoderKLWan of WAN 2.1 and 2.2, which differ in `VAEConfig`.

    Long videos run chunk by chunk, the earlier frames remembered in a cache that is carried along; the result does not
    depend on where they are cut. A video whose activations fit in one chunk is one program; any other is two, however
    long: one for the first frame, one for the rest.
    """

    def __init__(
        self,
        config: VAEConfig,
        *,
        weights_dtype: Dtype = jnp.float32,
        dtype: Dtype = jnp.float32,
    ):
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.encoder = Encoder(config, weights_dtype)
        self.quant_conv = Pointwise(2 * config.z_dim, 2 * config.z_dim, weights_dtype)
        self.post_quant_conv = Pointwise(config.z_dim, config.z_dim, weights_dtype)
        self.decoder = Decoder(config, weights_dtype)

    def encode(self, video: Video, *, chunk: int | None = None) -> Latents:
        """Normalised latents (mu - mean) / std, float32, of a video in [-1, 1] with 3 channels.

        `chunk` sets the number of latent frames in one program instead of the memory rule.

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
        """The frames of `decode` in order, a chunk at a time, in memory that does not grow with the video's length."""
        return self._in_chunks("decode", latents, chunk)

    def calls(self, name: str, shape: Sequence[int]) -> tuple[int, ...]:
        """How often `encode` or `decode`, as `name` says, runs each of its programs for such an array."""
        rest = len(self._lengths(name, shape, None)) - 1
        return (1, rest) if rest else (1,)

    def lower(self, name: str, x: jax.ShapeDtypeStruct, index: int) -> jax.stages.Lowered:
        """The program of that index in `calls`, for an array that is described."""
        net, cache, lengths = nnx.split(self), None, self._lengths(name, x.shape, None)

        def chunk(length: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((x.shape[0], length, *x.shape[2:]), x.dtype, sharding=x.sharding)

        if index:
            first = jax.eval_shape(functools.partial(_run, net[0], name=name, cache=None), net[1], x=chunk(lengths[0]))
            cache = jax.tree.map(lambda leaf: parallel.like(leaf.shape, leaf.dtype, *_CACHED), first[1])
        return program().lower(*net, name, cache, chunk(lengths[index]))

    def _in_chunks(self, name: str, x: Video, chunk: int | None) -> Iterator[Video]:
        cache, at = None, 0
        for length in self._lengths(name, x.shape, chunk):
            part = jax.lax.dynamic_slice_in_dim(x, at, length, axis=1)
            out, cache = program()(*nnx.split(self), name, cache, part)
            at += length
            yield out

    def _lengths(self, name: str, shape: Sequence[int], chunk: int | None) -> list[int]:
        """Frames of each call for such an array; the first differs from the others, which are alike."""
        b, frames, height, width, _ = shape
        t, s = self.config.temporal_factor, self.config.spatial_factor
        if name == "decode":
            return self._chunks(frames, height * s, width * s, b, chunk)
        first, *rest = self._chunks((frames - 1) // t + 1, height, width, b, chunk)
        return [(first - 1) * t + 1, *(n * t for n in rest)]

    def _chunks(self, frames: int, height: int, width: int, batch: int, chunk: int | None) -> list[int]:
        """Latent frames of each chunk: all at once if they fit, else the first alone and the rest in equal parts."""
        config = self.config
        pixels, dim = height * width // config.patch**2, max(config.base_dim, config.decoder_dim)
        frame_bytes = batch * config.temporal_factor * pixels * dim * self.dtype.itemsize
        fitting = max(1, _CHUNK_BYTES // frame_bytes) if chunk is None else chunk
        if frames <= fitting:
            return [frames]
        rest = frames - 1
        size = max(n for n in range(1, rest + 1) if rest % n == 0 and n <= fitting)
        return [1] + [size] * (rest // size)

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


def program() -> Any:
    """`_run` under the current placement; the cache is donated, so that it is updated in place.

    For a TPU at XLA's level O0, else each convolution is tuned. Decode at 1280x720 over 8 v6e: 50 s of one core and, by
    the compiler's cycle estimates, 2.5 s of 21 chunks; at O1 107 s and 1.8 s, by default several minutes.
    """
    return parallel.jit(_run, static_argnums=(0, 2), donate_argnums=3, tpu_level=9)


def _run(graph: Any, state: Any, name: str, cache: Cache, x: jax.Array) -> tuple[jax.Array, Cache]:
    """One chunk."""
    vae = nnx.merge(graph, state)
    out, cache = (vae._encode_chunk if name == "encode" else vae._decode_chunk)(x, cache)
    return out, jax.tree.map(_settled, cache)


# What the cache holds, as the next program takes it.
_CACHED = (axes.BATCH, None, None, axes.WIDTH, None)


def _settled(leaf: jax.Array) -> jax.Array:
    sharding = parallel.like(leaf.shape, leaf.dtype, *_CACHED).sharding
    return leaf if sharding is None else jax.lax.with_sharding_constraint(leaf, sharding)
