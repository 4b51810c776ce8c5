"""One WAN transformer block: self-attention, cross-attention to the text, feed-forward, modulated by the timestep."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Num

from maxdiffusion.attention.api import cross_attention, self_attention
from maxdiffusion.attention.frames import FrameKeys
from maxdiffusion.attention.plan import AttentionPlan
from maxdiffusion.models.dit.config import Animate2Config, DiTConfig
from maxdiffusion.models.dit.rows import Rotary, gelu, join_heads, layer_norm, split_heads
from maxdiffusion.models.layers import MLP, Dtypes, LayerNorm, Linear, RMSNorm, gelu_tanh, parameter
from maxdiffusion.models.quantized import Quantized
from maxdiffusion.parallel import axes, degree, shard


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Signal:
    """Timestep embeddings and token positions, inputs of blocks and head beside the tokens.

    Attributes:
      embedding: the timestep embedding, b t e fp32; t is 2 with `clean` tokens (the second is timestep 0), else 1.
      time: its projection to the six modulation vectors of a block, b t 6 e fp32.
      cos, sin: tables of `rope.rotate`, s d fp32.
      valid: b s bool, False on padding; None: no padding.
      clean: s bool, True on conditioning tokens at timestep 0; None: there are none.
      grid: tokens on each axis (f, h, w), padding not counted.
    """

    embedding: Any
    time: Any
    cos: Any
    sin: Any
    valid: Any
    clean: Any
    grid: tuple[int, int, int] = dataclasses.field(metadata={"static": True})

    def by_token(self, vectors: Float[Array, "b t e"]) -> Float[Array, "b s e"]:
        """The vector of each token's timestep; s is 1 if all tokens share a timestep."""
        return vectors if self.clean is None else jnp.where(self.clean[:, None], vectors[:, 1:], vectors[:, :1])


Operand = Float[Array, "b k e"] | Quantized
Kernel = Num[Array, "in out"]  # of a linear layer, by `Linear.gathered`


class KeyValue(nnx.Module):
    """Projections to keys and values; RMSNorm of k over the whole inner dim, before the heads are split.

    `tokens` is the logical axis of the tokens that have the keys.
    """

    def __init__(self, config: DiTConfig, dtypes: Dtypes, tokens: str | None = None):
        self.heads = config.num_attention_heads
        self.tokens = tokens
        self.to_k = Linear(config.dim, config.dim, (axes.EMBED, axes.HEADS), dtypes)
        self.to_v = Linear(config.dim, config.dim, (axes.EMBED, axes.HEADS), dtypes)
        self.norm_k = RMSNorm(config.dim, config.eps)

    def key(self, x: Operand, rotary: Rotary | None = None, kernel: Kernel | None = None) -> Float[Array, "b k n d"]:
        return split_heads(self.to_k(x, kernel), self.heads, self.norm_k, rotary, self.tokens)

    def value(self, x: Operand, kernel: Kernel | None = None) -> Float[Array, "b k n d"]:
        return split_heads(self.to_v(x, kernel), self.heads, tokens=self.tokens)


class Attention(KeyValue):
    """The projections of one attention; q is normed in the same way as k."""

    def __init__(self, config: DiTConfig, dtypes: Dtypes, tokens: str | None = None):
        super().__init__(config, dtypes, tokens)
        self.to_q = Linear(config.dim, config.dim, (axes.EMBED, axes.HEADS), dtypes)
        self.to_out = Linear(config.dim, config.dim, (axes.HEADS, axes.EMBED), dtypes)
        self.norm_q = RMSNorm(config.dim, config.eps)

    def query(self, x: Operand, rotary: Rotary | None = None, kernel: Kernel | None = None) -> Float[Array, "b s n d"]:
        return split_heads(self.to_q(x, kernel), self.heads, self.norm_q, rotary)

    def qkv(
        self, x: Operand, rotary: Rotary
    ) -> tuple[Float[Array, "b s n d"], Float[Array, "b s n d"], Float[Array, "b s n d"]]:
        """Queries, keys and values of the same tokens.

        Spread kernels are gathered before the first product: an all-to-all of q would hold up a gather behind it.
        """
        kernels = [layer.gathered() for layer in (self.to_q, self.to_k, self.to_v)]
        if degree(axes.EMBED) > 1:
            kernels = jax.lax.optimization_barrier(kernels)
        q, k, v = kernels
        return self.query(x, rotary, q), self.key(x, rotary, k), self.value(x, v)

    def output(self, x: Float[Array, "b s n d"]) -> Float[Array, "b s e"]:
        return self.to_out(join_heads(x, self.to_out.operand_dtype))


class Block(nnx.Module):
    """Reference: `diffusers.models.transformers.transformer_wan.WanTransformerBlock`."""

    def __init__(self, config: DiTConfig, plan: AttentionPlan, dtypes: Dtypes):
        self.plan = plan
        self.dtype = dtypes.activations
        self.eps = config.eps
        self.log_scale = config.adapter.log_scale if isinstance(config.adapter, Animate2Config) else 0.0
        self.attn1 = Attention(config, dtypes, axes.SEQUENCE)
        self.attn2 = Attention(config, dtypes)
        self.attn2_image = nnx.List([] if config.image_dim is None else [KeyValue(config, dtypes)])
        self.norm2 = LayerNorm(config.dim, config.eps)
        self.ffn = MLP(config.dim, config.ffn_dim, config.dim, gelu_tanh, dtypes)
        self.scale_shift_table = parameter((6, config.dim), jnp.float32)

    def sources(self, *tokens: Float[Array, "b _ e"]) -> tuple[tuple[Float[Array, "b k n d"], ...], ...]:
        """Keys and values of the text's and then the image's tokens, in the activation dtype.

        They do not depend on the latents.
        """
        layers = (self.attn2, *self.attn2_image)
        return tuple((layer.key(x), layer.value(x)) for layer, x in zip(layers, tokens, strict=True))

    def __call__(
        self,
        x: Float[Array, "b s e"],
        signal: Signal,
        sources: Sequence[Sequence[Float[Array, "b _ n d"]]],
        frames: FrameKeys | None = None,
    ) -> Float[Array, "b s e"]:
        """`sources` holds the (keys, values) of each cross-attention, `frames` those beside the self-attention's."""
        return self.with_keys(x, signal, sources, frames)[0]

    def with_keys(
        self,
        x: Float[Array, "b s e"],
        signal: Signal,
        sources: Sequence[Sequence[Float[Array, "b _ n d"]]],
        frames: FrameKeys | None = None,
    ) -> tuple[Float[Array, "b s e"], Float[Array, "b s n d"], Float[Array, "b s n d"]]:
        """The block's output, and the keys, with their positions, and the values of its self-attention."""
        modulation = self.scale_shift_table[...] + signal.time
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = (modulation[:, :, i] for i in range(6))
        rotary = signal.cos, signal.sin

        h = layer_norm(x, 1 + scale_1, shift_1, signal.clean, self.eps, self.attn1.to_q.operand_dtype)
        q, k, v = self.attn1.qkv(h, rotary)
        h = self_attention(self.plan, q, k, v, signal.valid, frames, self.log_scale)
        x = self._add(x, self.attn1.output(h) * signal.by_token(gate_1))

        gain, bias = (vector[...][None, None] for vector in (self.norm2.scale, self.norm2.bias))
        q = self.attn2.query(layer_norm(x, gain, bias, None, self.eps, self.attn2.to_q.operand_dtype))
        h = functools.reduce(jnp.add, (cross_attention(self.plan, q, *source) for source in sources))
        x = self._add(x, self.attn2.output(h))

        h = layer_norm(x, 1 + scale_2, shift_2, signal.clean, self.eps, self.ffn.linear_1.operand_dtype)
        h = gelu(self.ffn.linear_1(h), self.ffn.linear_2.operand_dtype)
        return self._add(x, self.ffn.linear_2(h) * signal.by_token(gate_2)), k, v

    def _add(self, x: Float[Array, "b s e"], y: Float[Array, "b s e"]) -> Float[Array, "b s e"]:
        """The residual sum in fp32, rounded to the activation dtype."""
        total = x.astype(jnp.float32) + y.astype(jnp.float32)
        return shard(total.astype(self.dtype), axes.BATCH, axes.SEQUENCE, None)
