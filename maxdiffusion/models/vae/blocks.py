"""The blocks of the VAE.

Every block is called as `y, cache = block(x, cache)`. `cache` is a pytree of what the block needs of earlier frames,
None at the start of a video, so that a chain of blocks is a pure function of any chunk of frames.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from maxdiffusion.models.layers import parameter
from maxdiffusion.models.vae.conv import causal_conv3d, conv2d, doubled_conv2d, operands
from maxdiffusion.parallel import axes, shard

Cache = Any
Dtype = Any
Video = Float[Array, "b f h w c"]

_ATTENTION_LOGITS_BYTES = 64 * 2**20  # of one block of queries


def place(x: Video) -> Video:
    """Shards activations: videos over the data axis, columns of pixels over the context axes."""
    return shard(x, axes.BATCH, None, None, axes.WIDTH, None)


def chain(blocks: Iterable[Any], x: Video, cache: Cache) -> tuple[Float[Array, "b fo ho wo o"], Cache]:
    """Runs blocks one after the other; the cache is the tuple of their caches."""
    blocks = tuple(blocks)
    caches = (None,) * len(blocks) if cache is None else cache
    after = []
    for block, before in zip(blocks, caches, strict=True):
        x, entry = block(x, before)
        after.append(entry)
    return x, tuple(after)


class RMSNorm(nnx.Module):
    """x / max(|x|, 1e-12) * sqrt(c) * scale over the channels, in fp32 (reference: WanRMS_norm)."""

    def __init__(self, dim: int):
        self.scale = parameter((dim,), jnp.float32)

    def __call__(self, x: Video) -> Video:
        wide = x.astype(jnp.float32)
        length = jnp.sqrt(jnp.sum(wide * wide, axis=-1, keepdims=True))
        return (wide * (x.shape[-1] ** 0.5 / jnp.maximum(length, 1e-12)) * self.scale[...]).astype(x.dtype)


class CausalConv3d(nnx.Module):
    """A causal convolution; its cache holds the last frames before the chunk (reference: WanCausalConv3d)."""

    def __init__(self, size: tuple[int, int, int], c: int, o: int, weights_dtype: Dtype):
        self.kernel, self.bias = _affine((*size, c, o), weights_dtype)

    def __call__(self, x: Video, cache: Cache) -> tuple[Float[Array, "b f h w o"], Cache]:
        return causal_conv3d(x, self.kernel[...], self.bias[...], cache)


def activated(norm: RMSNorm, conv: CausalConv3d) -> Callable[[Video, Cache], tuple[Video, Cache]]:
    """The block of norm, SiLU and convolution."""
    return lambda x, cache: conv(nnx.silu(norm(x)), cache)


class Conv2d(nnx.Module):
    """The parameters of a 3x3 convolution of single frames."""

    def __init__(self, c: int, o: int, weights_dtype: Dtype):
        self.kernel, self.bias = _affine((3, 3, c, o), weights_dtype)


class Pointwise(nnx.Module):
    """A linear map of the channels (reference: convolutions of size 1)."""

    def __init__(self, c: int, o: int, weights_dtype: Dtype):
        self.kernel, self.bias = _affine((c, o), weights_dtype)

    def __call__(self, x: Video) -> Float[Array, "b f h w o"]:
        y = jnp.einsum("bfhwc,co->bfhwo", x, self.kernel[...].astype(x.dtype), preferred_element_type=jnp.float32)
        return (y + self.bias[...]).astype(x.dtype)


class ResidualBlock(nnx.Module):
    """Norm, SiLU and convolution, twice, plus a shortcut (reference: WanResidualBlock)."""

    def __init__(self, c: int, o: int, weights_dtype: Dtype):
        self.norm1 = RMSNorm(c)
        self.conv1 = CausalConv3d((3, 3, 3), c, o, weights_dtype)
        self.norm2 = RMSNorm(o)
        self.conv2 = CausalConv3d((3, 3, 3), o, o, weights_dtype)
        self.conv_shortcut = nnx.data(None if c == o else Pointwise(c, o, weights_dtype))

    def __call__(self, x: Video, cache: Cache) -> tuple[Float[Array, "b f h w o"], Cache]:
        y, cache = chain((activated(self.norm1, self.conv1), activated(self.norm2, self.conv2)), x, cache)
        shortcut = x if self.conv_shortcut is None else self.conv_shortcut(x)
        return place(shortcut + y), cache


class AttentionBlock(nnx.Module):
    """Single-head self-attention among the pixels of each frame (reference: WanAttentionBlock)."""

    def __init__(self, dim: int, weights_dtype: Dtype):
        self.norm = RMSNorm(dim)
        self.to_qkv = Pointwise(dim, 3 * dim, weights_dtype)
        self.proj = Pointwise(dim, dim, weights_dtype)

    def __call__(self, x: Video, cache: Cache) -> tuple[Video, Cache]:
        del cache
        b, f, h, w, c = x.shape
        q, k, v = jnp.split(self.to_qkv(self.norm(x)), 3, axis=-1)
        k, v = (y.reshape(b, f, h * w, c) for y in (k, v))

        def attend(rows: jax.Array) -> jax.Array:
            logits = jnp.einsum("bfrwc,bfkc->bfrwk", rows, k, preferred_element_type=jnp.float32) * c**-0.5
            weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
            return jnp.einsum("bfrwk,bfkc->bfrwc", weights, v, preferred_element_type=jnp.float32).astype(v.dtype)

        # As many image rows of queries at a time as the budget allows: at once, 6,240 pixels (480p) would need 156 MB.
        fitting = max(1, _ATTENTION_LOGITS_BYTES // (4 * b * f * w * h * w))
        rows = max(n for n in range(1, h + 1) if h % n == 0 and n <= fitting)
        blocks = jnp.moveaxis(q.reshape(b, f, h // rows, rows, w, c), 2, 0)
        out = jnp.moveaxis(jax.lax.map(attend, blocks), 0, 2).reshape(b, f, h, w, c)
        return place(x + self.proj(out)), ()


class Downsample(nnx.Module):
    """Halves height and width, and with `temporal` the frames after the first of a video (reference: WanResample)."""

    def __init__(self, dim: int, temporal: bool, weights_dtype: Dtype):
        self.resample = Conv2d(dim, dim, weights_dtype)
        self.time_conv = nnx.data(CausalConv3d((3, 1, 1), dim, dim, weights_dtype) if temporal else None)

    def __call__(self, x: Video, cache: Cache) -> tuple[Float[Array, "b fo h//2 w//2 c"], Cache]:
        x = conv2d(x, self.resample.kernel[...], self.resample.bias[...], stride=2, padding=(0, 1))
        if self.time_conv is None:
            return place(x), ()
        # The first frame of a video stays as it is; then each output sees two new frames and the one before them.
        first, last = x[:, :1], x[:, -1:]
        seen = x if cache is None else jnp.concatenate([cache, x], axis=1)
        y, _ = self.time_conv(seen[:, 2:], seen[:, :2]) if seen.shape[1] > 2 else (x[:, :0], None)
        y = y[:, ::2]
        return place(jnp.concatenate([first, y], axis=1) if cache is None else y), last


class Upsample(nnx.Module):
    """Doubles height and width, and with `temporal` the frames after the first of a video (reference: WanResample)."""

    def __init__(self, dim: int, out: int, temporal: bool, weights_dtype: Dtype):
        self.resample = Conv2d(dim, out, weights_dtype)
        self.time_conv = nnx.data(CausalConv3d((3, 1, 1), dim, 2 * dim, weights_dtype) if temporal else None)

    def __call__(self, x: Video, cache: Cache) -> tuple[Float[Array, "b fo 2*h 2*w o"], Cache]:
        cache_after: Cache = ()
        if self.time_conv is not None:
            # The first frame of a video is neither doubled nor seen by the later ones.
            first, rest = (x[:, :1], x[:, 1:]) if cache is None else (x[:, :0], x)
            b, f, h, w, c = rest.shape
            if f == 0:
                return self._double(first), jnp.zeros((b, 2, h, w, c), operands(x.dtype))
            pairs, cache_after = self.time_conv(rest, cache)
            pairs = jnp.moveaxis(pairs.reshape(b, f, h, w, 2, c), 4, 2).reshape(b, 2 * f, h, w, c)
            x = jnp.concatenate([first, pairs], axis=1)
        return self._double(x), cache_after

    def _double(self, x: Video) -> Float[Array, "b f 2*h 2*w o"]:
        return place(doubled_conv2d(x, self.resample.kernel[...], self.resample.bias[...]))


class MidBlock(nnx.Module):
    """Residual, attention, residual (reference: WanMidBlock)."""

    def __init__(self, dim: int, weights_dtype: Dtype):
        self.resnets = nnx.List([ResidualBlock(dim, dim, weights_dtype) for _ in range(2)])
        self.attentions = nnx.List([AttentionBlock(dim, weights_dtype)])

    def __call__(self, x: Video, cache: Cache) -> tuple[Video, Cache]:
        return chain((self.resnets[0], self.attentions[0], self.resnets[1]), x, cache)


class UpBlock(nnx.Module):
    """Residual blocks and, except in the last level, an upsampling (reference: WanUpBlock)."""

    def __init__(self, c: int, o: int, num_res_blocks: int, up: Upsample | None, weights_dtype: Dtype):
        self.resnets = nnx.List(
            [ResidualBlock(c if i == 0 else o, o, weights_dtype) for i in range(num_res_blocks + 1)]
        )
        self.upsamplers = nnx.List([] if up is None else [up])

    def __call__(self, x: Video, cache: Cache) -> tuple[Float[Array, "b fo ho wo o"], Cache]:
        return chain((*self.resnets, *self.upsamplers), x, cache)


class ResidualDownBlock(nnx.Module):
    """Residual blocks and a downsampling, plus a shortcut that averages (reference: WanResidualDownBlock)."""

    def __init__(self, c: int, o: int, num_res_blocks: int, down: Downsample | None, weights_dtype: Dtype):
        self.resnets = nnx.List([ResidualBlock(c if i == 0 else o, o, weights_dtype) for i in range(num_res_blocks)])
        self.downsampler = nnx.data(down)
        self.factors = _factors(down)

    def __call__(self, x: Video, cache: Cache) -> tuple[Float[Array, "b fo ho wo o"], Cache]:
        blocks = self.resnets if self.downsampler is None else (*self.resnets, self.downsampler)
        y, cache = chain(blocks, x, cache)
        return place(y + averaged(x, self.factors, y.shape[-1])), cache


class ResidualUpBlock(UpBlock):
    """Residual blocks and an upsampling, plus a shortcut that repeats (reference: WanResidualUpBlock)."""

    def __init__(self, c: int, o: int, num_res_blocks: int, up: Upsample | None, weights_dtype: Dtype):
        super().__init__(c, o, num_res_blocks, up, weights_dtype)
        self.factors = _factors(up)

    def __call__(self, x: Video, cache: Cache) -> tuple[Float[Array, "b fo ho wo o"], Cache]:
        y, after = super().__call__(x, cache)
        if self.factors == (1, 1):
            return y, after
        shortcut = repeated(x, self.factors, y.shape[-1])
        return place(y + shortcut[:, -y.shape[1] :]), after  # the first frame of a video is made once


def _factors(resample: Downsample | Upsample | None) -> tuple[int, int]:
    """Factors of the resampling in time and in space."""
    return (1, 1) if resample is None else (1 if resample.time_conv is None else 2, 2)


def averaged(x: Video, factors: tuple[int, int], out: int) -> Float[Array, "b fo ho wo o"]:
    """Folds frames, rows and columns into channels and averages consecutive channels to `out` (reference: AvgDown3D).

    An odd number of frames, at the start of a video, is preceded by a frame of zeros.
    """
    t, s = factors
    x = jnp.pad(x, ((0, 0), (-x.shape[1] % t, 0), (0, 0), (0, 0), (0, 0)))
    b, f, h, w, c = x.shape
    x = x.reshape(b, f // t, t, h // s, s, w // s, s, c).transpose(0, 1, 3, 5, 7, 2, 4, 6)
    x = x.reshape(*x.shape[:4], out, -1)
    return jnp.mean(x, axis=-1, dtype=jnp.float32).astype(x.dtype)


def repeated(x: Video, factors: tuple[int, int], out: int) -> Float[Array, "b fo ho wo o"]:
    """Repeats channels and unfolds them into frames, rows and columns; `out` channels remain (reference: DupUp3D)."""
    (t, s), (b, f, h, w, c) = factors, x.shape
    x = jnp.repeat(x, out * t * s * s // c, axis=-1).reshape(b, f, h, w, out, t, s, s)
    return x.transpose(0, 1, 5, 2, 6, 3, 7, 4).reshape(b, f * t, h * s, w * s, out)


def _affine(shape: tuple[int, ...], dtype: Dtype) -> tuple[nnx.Param, nnx.Param]:
    """A kernel (.., c, o) and a bias (o,), replicated: the VAE is smaller than a layer of the 14B model."""
    return parameter(shape, dtype), parameter(shape[-1:], dtype)
