"""The UMT5 encoder: T5 with its own relative position bias in every layer (Chung et al., 2023, arXiv:2304.09151)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from maxdiffusion.models.layers import Dtypes, Linear, RMSNorm, gelu_tanh, parameter, scan, stack
from maxdiffusion.models.umt5.config import UMT5Config
from maxdiffusion.parallel import axes, shard


def position_buckets(length: int, buckets: int, max_distance: int) -> np.ndarray:
    """Bucket of every (query, key) distance, int32 (length, length): exact for near, logarithmic for far keys.

    Half of the buckets are for keys after the query. fp32 logarithm, as the reference: its rounding decides at the
    bucket edges.
    """
    distance = np.arange(length)[None, :] - np.arange(length)[:, None]
    half = buckets // 2
    exact = half // 2
    far = np.maximum(np.abs(distance), exact).astype(np.float32)
    ratio = np.log(far / np.float32(exact)) / np.float32(np.log(max_distance / exact)) * np.float32(half - exact)
    logarithmic = np.minimum(exact + ratio.astype(np.int32), half - 1)
    near = np.abs(distance)
    return (half * (distance > 0) + np.where(near < exact, near, logarithmic)).astype(np.int32)


class Embedding(nnx.Module):
    """Rows of a table; table (rows, features)."""

    def __init__(self, rows: int, features: int, logical: tuple[str | None, ...], dtype: DTypeLike):
        self.embedding = parameter((rows, features), dtype, *logical)

    def __call__(self, index: Int[Array, " ..."]) -> Float[Array, "... features"]:
        """fp32 out."""
        return self.embedding[...][index].astype(jnp.float32)


class Attention(nnx.Module):
    """Self-attention without 1/sqrt(d), with a bias by relative position."""

    def __init__(self, config: UMT5Config, dtypes: Dtypes):
        self.config = config
        inner = config.num_heads * config.d_kv
        self.q = Linear(config.d_model, inner, (axes.EMBED, axes.HEADS), dtypes, use_bias=False)
        self.k = Linear(config.d_model, inner, (axes.EMBED, axes.HEADS), dtypes, use_bias=False)
        self.v = Linear(config.d_model, inner, (axes.EMBED, axes.HEADS), dtypes, use_bias=False)
        self.o = Linear(inner, config.d_model, (axes.HEADS, axes.EMBED), dtypes, use_bias=False)
        buckets = config.relative_attention_num_buckets
        self.relative_attention_bias = Embedding(buckets, config.num_heads, (None, axes.HEADS), dtypes.weights)

    def __call__(self, x: Float[Array, "b k e"], valid: Bool[Array, "b k"]) -> Float[Array, "b k e"]:
        config, (b, length, _) = self.config, x.shape
        q, k, v = (project(x).reshape(b, length, config.num_heads, config.d_kv) for project in (self.q, self.k, self.v))
        buckets = position_buckets(
            length, config.relative_attention_num_buckets, config.relative_attention_max_distance
        )
        bias = self.relative_attention_bias(jnp.asarray(buckets)).transpose(2, 0, 1)
        logits = jnp.einsum("bsnd,bknd->bnsk", q, k, preferred_element_type=jnp.float32) + bias
        logits = jnp.where(valid[:, None, None, :], logits, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
        out = jnp.einsum("bnsk,bknd->bsnd", weights, v, preferred_element_type=jnp.float32)
        return self.o(out.reshape(b, length, -1))


class FeedForward(nnx.Module):
    """Gated GELU. With fp16, `wo` is stored and applied in fp32, because the gated product overflows fp16.

    transformers 5 does the same, and in bf16 keeps `wo` in bf16.
    """

    def __init__(self, config: UMT5Config, dtypes: Dtypes):
        weights, activations = (jnp.float32 if jnp.dtype(each) == jnp.float16 else each for each in dtypes[:2])
        wide = Dtypes(weights, activations)
        self.wi_0 = Linear(config.d_model, config.d_ff, (axes.EMBED, axes.MLP), dtypes, use_bias=False)
        self.wi_1 = Linear(config.d_model, config.d_ff, (axes.EMBED, axes.MLP), dtypes, use_bias=False)
        self.wo = Linear(config.d_ff, config.d_model, (axes.MLP, axes.EMBED), wide, use_bias=False)

    def __call__(self, x: Float[Array, "b k e"]) -> Float[Array, "b k e"]:
        gate = gelu_tanh(self.wi_0(x).astype(jnp.float32))
        return self.wo(gate * self.wi_1(x).astype(jnp.float32))


class Block(nnx.Module):
    """Pre-norm attention and feed-forward; the residual stream is fp32."""

    def __init__(self, config: UMT5Config, dtypes: Dtypes):
        self.attention_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)
        self.attention = Attention(config, dtypes)
        self.feed_forward_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)
        self.feed_forward = FeedForward(config, dtypes)

    def __call__(self, x: Float[Array, "b k e"], valid: Bool[Array, "b k"]) -> Float[Array, "b k e"]:
        x = x + self.attention(self.attention_norm(x), valid).astype(jnp.float32)
        return x + self.feed_forward(self.feed_forward_norm(x)).astype(jnp.float32)


class UMT5Encoder(nnx.Module):
    """Reference: `transformers.UMT5EncoderModel`. Blocks are stored stacked; see `WanTransformer` for `scan_layers`."""

    def __init__(self, config: UMT5Config, dtypes: Dtypes, scan_layers: bool = True):
        self.config = config
        self.unroll = not scan_layers
        self.shared = Embedding(config.vocab_size, config.d_model, (axes.VOCAB, axes.EMBED), dtypes.weights)
        self.block = stack(lambda: Block(config, dtypes), config.num_layers)
        self.final_layer_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)

    def __call__(self, token_ids: Int[Array, "b k"], valid: Bool[Array, "b k"]) -> Float[Array, "b k e"]:
        """The last hidden state, fp32. Invalid tokens are masked as keys; their own rows are undefined."""
        x = shard(self.shared(token_ids), axes.BATCH, None, None)
        x, _ = scan(self.block, lambda block, x, _: (block(x, valid), None), x, None, self.unroll)
        return self.final_layer_norm(x)
