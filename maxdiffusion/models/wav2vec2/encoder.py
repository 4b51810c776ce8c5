"""The wav2vec 2.0 encoder (Baevski et al., 2020, arXiv:2006.11477) with the norms of its large models."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from maxdiffusion.models.layers import MLP, Dtypes, LayerNorm, Linear, parameter, scan, stack
from maxdiffusion.models.wav2vec2.config import Wav2Vec2Config
from maxdiffusion.parallel import axes

_gelu = functools.partial(jax.nn.gelu, approximate=False)


def normalised(samples: Float[np.ndarray, " samples"]) -> Float[np.ndarray, " samples"]:
    """The sound with mean 0 and variance 1, fp32 (`transformers.Wav2Vec2FeatureExtractor`)."""
    return ((samples - samples.mean()) / np.sqrt(samples.var() + 1e-7)).astype(np.float32)


class ConvLayer(nnx.Module):
    """A convolution over time, LayerNorm of its channels, GELU."""

    def __init__(self, size: int, stride: int, in_channels: int, out_channels: int, dtype: DTypeLike):
        self.stride = stride
        self.kernel = parameter((size, in_channels, out_channels), dtype)
        self.bias = parameter((out_channels,), dtype)
        self.layer_norm = LayerNorm(out_channels, 1e-5)

    def __call__(self, x: Float[Array, "b t c"]) -> Float[Array, "b t2 o"]:
        y = jax.lax.conv_general_dilated(
            x, self.kernel[...].astype(x.dtype), (self.stride,), "VALID", dimension_numbers=("NWC", "WIO", "NWC")
        )
        return _gelu(self.layer_norm(y + self.bias[...].astype(x.dtype))).astype(x.dtype)


class PositionalConv(nnx.Module):
    """Relative positions by a grouped convolution, whose kernel is stored as direction and length (weight norm)."""

    def __init__(self, config: Wav2Vec2Config, dtype: DTypeLike):
        size, dim = config.num_conv_pos_embeddings, config.hidden_size
        self.groups = config.num_conv_pos_embedding_groups
        self.gain = parameter((size,), jnp.float32)
        self.direction = parameter((size, dim // self.groups, dim), dtype)
        self.bias = parameter((dim,), dtype)

    def __call__(self, x: Float[Array, "b t e"]) -> Float[Array, "b t e"]:
        direction = self.direction[...].astype(jnp.float32)
        length = jnp.sqrt(jnp.sum(jnp.square(direction), axis=(1, 2), keepdims=True))
        kernel = (direction * (self.gain[...][:, None, None] / length)).astype(x.dtype)
        left = len(kernel) // 2
        y = jax.lax.conv_general_dilated(
            x,
            kernel,
            (1,),
            [(left, len(kernel) - 1 - left)],
            dimension_numbers=("NWC", "WIO", "NWC"),
            feature_group_count=self.groups,
        )
        return _gelu((y + self.bias[...].astype(x.dtype)).astype(jnp.float32)).astype(x.dtype)


class Attention(nnx.Module):
    """Self-attention over the whole sound, computed for `QUERIES` positions at a time: ten minutes have 30 000."""

    QUERIES = 512

    def __init__(self, config: Wav2Vec2Config, dtypes: Dtypes):
        self.heads, dim = config.num_attention_heads, config.hidden_size
        self.q_proj = Linear(dim, dim, (axes.EMBED, axes.HEADS), dtypes)
        self.k_proj = Linear(dim, dim, (axes.EMBED, axes.HEADS), dtypes)
        self.v_proj = Linear(dim, dim, (axes.EMBED, axes.HEADS), dtypes)
        self.out_proj = Linear(dim, dim, (axes.HEADS, axes.EMBED), dtypes)

    def __call__(self, x: Float[Array, "b t e"]) -> Float[Array, "b t e"]:
        b, length, e = x.shape
        q, k, v = (project(x).reshape(b, length, self.heads, -1) for project in (self.q_proj, self.k_proj, self.v_proj))

        def attend(q: jax.Array) -> jax.Array:
            logits = jnp.einsum("bsnd,bknd->bnsk", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
            weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
            return jnp.einsum("bnsk,bknd->bsnd", weights, v, preferred_element_type=jnp.float32)

        size = min(self.QUERIES, length)
        blocks = jnp.pad(q, ((0, 0), (0, -length % size), (0, 0), (0, 0))).reshape(b, -1, size, *q.shape[2:])
        out = jax.lax.map(attend, jnp.moveaxis(blocks, 1, 0))
        return self.out_proj(jnp.moveaxis(out, 0, 1).reshape(b, -1, e)[:, :length])


class Layer(nnx.Module):
    """Pre-norm attention and feed-forward; the residual stream is fp32."""

    def __init__(self, config: Wav2Vec2Config, dtypes: Dtypes):
        self.layer_norm = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.attention = Attention(config, dtypes)
        self.final_layer_norm = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.feed_forward = MLP(config.hidden_size, config.intermediate_size, config.hidden_size, _gelu, dtypes)

    def __call__(self, x: Float[Array, "b t e"]) -> Float[Array, "b t e"]:
        x = x + self.attention(self.layer_norm(x)).astype(jnp.float32)
        return x + self.feed_forward(self.final_layer_norm(x)).astype(jnp.float32)


class Wav2Vec2(nnx.Module):
    """Reference: `transformers.Wav2Vec2Model`. Layers are stored stacked; see `WanTransformer` for `scan_layers`."""

    BLOCK = 1500  # hidden states whose convolutions are computed at a time, 30 s

    def __init__(self, config: Wav2Vec2Config, dtypes: Dtypes, scan_layers: bool = True):
        self.config, self.unroll, self.dtype = config, not scan_layers, dtypes.activations
        widths = zip((1, *config.conv_dim), config.conv_dim, strict=False)
        layers = zip(config.conv_kernel, config.conv_stride, widths, strict=True)
        self.conv_layers = nnx.List([ConvLayer(size, by, *width, dtypes.weights) for size, by, width in layers])
        self.feature_norm = LayerNorm(config.conv_dim[-1], config.layer_norm_eps)
        self.projection = Linear(config.conv_dim[-1], config.hidden_size, (None, axes.EMBED), dtypes)
        self.positions = PositionalConv(config, dtypes.weights)
        self.layers = stack(lambda: Layer(config, dtypes), config.num_hidden_layers)
        self.layer_norm = LayerNorm(config.hidden_size, config.layer_norm_eps)

    def __call__(
        self, samples: Float[Array, "b samples"], keep: Callable[[jax.Array], jax.Array] = lambda x: x
    ) -> Float[Array, "b layers t e"]:
        """`keep` of the input of each layer, then of the normed output of the last, b t e fp32.

        `samples` come from `normalised`. All hidden states of ten minutes would take 3 GiB.
        """
        x = self.projection(self.feature_norm(self._convolved(samples)))
        x = (x + self.positions(x)).astype(jnp.float32)
        x, before = scan(self.layers, lambda layer, x, _: (layer(x), keep(x)), x, None, self.unroll)
        return jnp.moveaxis(jnp.concatenate([before, keep(self.layer_norm(x))[None]]), 0, 1)

    def _convolved(self, samples: Float[Array, "b samples"]) -> Float[Array, "b t c"]:
        """The features of the sound, block by block: those of ten minutes take 4 GiB after the first convolution."""

        def block(samples: jax.Array) -> jax.Array:
            x = samples[..., None].astype(self.dtype)
            for layer in self.conv_layers:
                x = layer(x)
            return x

        count = self.config.length(samples.shape[1])
        if count <= self.BLOCK:
            return block(samples)
        step, size = self.BLOCK * self.config.stride, self.config.samples(self.BLOCK)
        starts = np.arange(0, count * self.config.stride, step)
        samples = jnp.pad(samples, ((0, 0), (0, max(int(starts[-1]) + size - samples.shape[1], 0))))
        found = jax.lax.map(lambda start: block(jax.lax.dynamic_slice_in_dim(samples, start, size, 1)), starts)
        return jnp.moveaxis(found, 0, 1).reshape(len(samples), -1, found.shape[-1])[:, :count]
