"""The WAN video transformer."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from maxdiffusion.attention.plan import AttentionPlan
from maxdiffusion.models.dit.adapter import NoAdapter, Tokens
from maxdiffusion.models.dit.block import Block, Signal
from maxdiffusion.models.dit.config import Animate2Config, AnimateConfig, DiTConfig, S2VConfig, VACEConfig
from maxdiffusion.models.dit.context import Context, KeysValues, PreparedContext
from maxdiffusion.models.dit.patches import fold, unfold
from maxdiffusion.models.dit.rope import rotary_tables
from maxdiffusion.models.layers import (
    MLP,
    Dtypes,
    LayerNorm,
    Linear,
    gelu_tanh,
    layer_norm,
    parameter,
    pick,
    scan,
    stack,
)
from maxdiffusion.parallel import axes, shard, token_multiple


def sinusoid(timestep: Float[Array, "*b"], channels: int) -> Float[Array, "*b channels"]:
    """Cosines, then sines of t * 10000^(-i / (channels / 2)), fp32 (Ho et al., 2020; cosines first, as in WAN)."""
    half = channels // 2
    frequencies = np.exp(-math.log(10000) * np.arange(half) / half).astype(np.float32)
    angles = timestep[..., None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def _layer(sources: tuple[KeysValues, ...], layer: jax.Array) -> tuple[KeysValues, ...]:
    """Keys and values of one layer's cross-attentions."""
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, layer, axis=1, keepdims=False), sources)


def make_adapter(config: DiTConfig, plan: AttentionPlan, dtypes: Dtypes) -> Any:
    """The adapter of the transformer, or `NoAdapter`; those that it lacks are not imported."""
    match config.adapter:
        case VACEConfig() as vace:
            from maxdiffusion.models.dit.vace import VACE

            return VACE(config, vace, plan, dtypes)
        case AnimateConfig() as animate:
            from maxdiffusion.models.dit.animate import Animate

            return Animate(config, animate, dtypes.unquantized)
        case Animate2Config():
            from maxdiffusion.models.dit.animate2 import Animate2

            return Animate2(config)
        case S2VConfig() as s2v:
            from maxdiffusion.models.dit.s2v import S2V

            return S2V(config, s2v, dtypes.unquantized)
    return NoAdapter()


class ImageEmbedder(nnx.Module):
    """Norm, feed-forward, norm of the image encoder's hidden states (reference: WanImageEmbedding)."""

    EPS = 1e-5  # independent of the transformer's

    def __init__(self, in_features: int, out_features: int, positions: int | None):
        self.pos_embed = nnx.data(None if positions is None else parameter((positions, in_features), jnp.float32))
        self.norm1 = LayerNorm(in_features, self.EPS)
        gelu = functools.partial(jax.nn.gelu, approximate=False)
        self.ff = MLP(in_features, in_features, out_features, gelu, Dtypes())
        self.norm2 = LayerNorm(out_features, self.EPS)

    def __call__(self, x: Float[Array, "b k e_image"]) -> Float[Array, "b k e"]:
        x = x if self.pos_embed is None else x + self.pos_embed[...]
        return self.norm2(self.ff(self.norm1(x)))


class ConditionEmbedder(nnx.Module):
    """Embeds timestep, text and image; parameters and arithmetic in fp32."""

    def __init__(self, config: DiTConfig):
        self.freq_dim = config.freq_dim
        self.time_embedder = MLP(config.freq_dim, config.dim, config.dim, jax.nn.silu, Dtypes())
        self.time_proj = Linear(config.dim, 6 * config.dim, (axes.EMBED, axes.MLP), Dtypes())
        self.text_embedder = MLP(config.text_dim, config.dim, config.dim, gelu_tanh, Dtypes())
        self.image_embedder = nnx.data(
            None if config.image_dim is None else ImageEmbedder(config.image_dim, config.dim, config.pos_embed_seq_len)
        )

    def time(self, timestep: Float[Array, "*b"]) -> tuple[Float[Array, "*b e"], Float[Array, "*b 6 e"]]:
        """The timestep embedding for the head, and its projection to the six modulation vectors of a block."""
        embedding = self.time_embedder(sinusoid(timestep, self.freq_dim))
        vectors = self.time_proj(jax.nn.silu(embedding)).reshape(*timestep.shape, 6, -1)
        return embedding, shard(vectors, axes.BATCH, *[None] * (vectors.ndim - 1))


class WanTransformer(nnx.Module):
    """Reference: `diffusers.WanTransformer3DModel`; paper: Wan (2025), arXiv:2503.20314.

    It is `head(trunk(embed(...)))`, so that a step cache can reuse the trunk's output. The blocks are stored stacked,
    with a leading layer axis on every parameter. `scan_layers` compiles one block and loops over it; without it the
    loop is unrolled.
    """

    def __init__(self, config: DiTConfig, plan: AttentionPlan, dtypes: Dtypes, scan_layers: bool = True):
        self.config = config
        self.dtype = dtypes.activations
        self.unroll = not scan_layers
        patch = math.prod(config.patch_size)
        self.adapter = make_adapter(config, plan, dtypes)
        self.patch_embedding = Linear(config.in_channels * patch, config.dim, (None, axes.EMBED), dtypes.unquantized)
        self.condition_embedder = ConditionEmbedder(config)
        self.blocks = stack(lambda: Block(config, plan, dtypes), config.num_layers)
        # The head computes in fp32: its output is the velocity, and it is small beside a block.
        self.proj_out = Linear(config.dim, config.out_channels * patch, (axes.EMBED, None), Dtypes(dtypes.weights))
        self.scale_shift_table = parameter((2, config.dim), jnp.float32)

    def prepare(self, context: Context) -> PreparedContext:
        """Embeds text and image and projects every layer's keys and values, once for all steps.

        Raises:
          ValueError: the context has an image and the transformer attends to none, or the reverse.
        """
        text, prepared = self._prepare(context)
        control = self.adapter.read(context.adapter, self._extract)
        return prepared._replace(adapter=self.adapter.prepare(text, control))

    def _prepare(self, context: Context) -> tuple[Float[Array, "b k e"], PreparedContext]:
        """The embedded text, and `prepare` without the adapter."""
        embedder = self.condition_embedder
        tokens = [embedder.text_embedder(context.text)]
        if embedder.image_embedder is not None and context.image is not None:
            tokens.append(embedder.image_embedder(context.image))
        elif embedder.image_embedder is not None or context.image is not None:
            raise ValueError("a context has an image if and only if the transformer attends to one (image_dim)")
        _, sources = scan(self.blocks, lambda block, _, __: (None, block.sources(*tokens)), None, None, self.unroll)
        sources = jax.tree.map(
            lambda a: shard(jnp.moveaxis(a, 0, 1), axes.BATCH, None, None, axes.HEADS, None), sources
        )
        frames = jax.tree.map(lambda a: shard(a, axes.BATCH, None, None, None, None), context.frames)
        return tokens[0], PreparedContext(tuple(KeysValues(*source) for source in sources), frames)

    def _extract(
        self,
        context: Context,
        latents: Float[Array, "b f h w c"],
        timestep: float,
        origin: tuple[int, int, int],
        arrange: Callable[[jax.Array], jax.Array],
    ) -> KeysValues:
        """An `adapter.Extract`."""
        _, prepared = self._prepare(context)
        tokens, signal = self.embed(latents, jnp.full(latents.shape[:1], timestep, jnp.float32), prepared, origin)

        def step(block: Block, x: jax.Array, layer: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
            x, *own = block.with_keys(x, signal, _layer(prepared.sources, layer))
            return x, [arrange(a[:, : math.prod(signal.grid)]) for a in own]

        _, found = scan(self.blocks, step, tokens, jnp.arange(self.config.num_layers), self.unroll)
        return KeysValues(*(jnp.moveaxis(a, 0, 1) for a in found))

    def embed(
        self,
        latents: Float[Array, "b f h w c"],
        timestep: Float[Array, " b"],
        context: PreparedContext,
        origin: tuple[int, int, int] = (0, 0, 0),
    ) -> tuple[Float[Array, "b s e"], Signal]:
        """Embeds patches, positions, which count from `origin`, and timesteps; `timestep` is 0..1000.

        A sequence that does not divide over the context shards is padded; the padding is masked in attention.

        Raises:
          UserError: the latent's size does not divide by the patch, or exceeds the model's positions.
        """
        frames = context.frames
        grid = self.config.grid(*latents.shape[1:4])
        cos, sin = rotary_tables(grid, self.config.attention_head_dim, origin)
        x = self.patch_embedding(fold(frames.input(latents), self.config.patch_size))
        tokens = self.adapter.extend(Tokens(x, cos, sin), self.patch_embedding, context.adapter)
        x, cos, sin, valid = tokens

        length = x.shape[1]
        padding = -length % token_multiple()
        if padding:
            valid = jnp.ones(x.shape[:2], bool) if valid is None else valid
            x = jnp.pad(x, ((0, 0), (0, padding), (0, 0)))
            cos, sin = (jnp.pad(table, ((0, padding), (0, 0))) for table in (cos, sin))
            valid = jnp.pad(valid, ((0, 0), (0, padding)))
        x = shard(x, axes.BATCH, axes.SEQUENCE, None)
        timestep, clean = timestep[:, None], None
        if frames.first is not None or length > math.prod(grid):
            timestep = jnp.concatenate([timestep, jnp.zeros_like(timestep)], axis=1)
            first = 0 if frames.first is None else frames.first.shape[1] // self.config.patch_size[0]
            index = jnp.arange(length + padding)
            appended = (index >= math.prod(grid)) & (index < length)
            clean = shard((index < first * math.prod(grid[1:])) | appended, axes.SEQUENCE)
        cos, sin = (shard(table, axes.SEQUENCE, None) for table in (cos, sin))
        return x, Signal(*self.condition_embedder.time(timestep), cos, sin, valid, clean, grid)

    def trunk(self, tokens: Float[Array, "b s e"], signal: Signal, context: PreparedContext) -> Float[Array, "b s e"]:
        """Runs all blocks, and the adapter between them."""
        x, state, step = self._steps(tokens, signal, context)
        (x, _), _ = scan(self.blocks, step, (x, state), jnp.arange(self.config.num_layers), self.unroll)
        return x

    def first_block(
        self, tokens: Float[Array, "b s e"], signal: Signal, context: PreparedContext
    ) -> tuple[Float[Array, "b s e"], Float[Array, "b s e"], Any]:
        """Runs the first block of `trunk`: the tokens before it, those after it and the adapter's state."""
        x, state, step = self._steps(tokens, signal, context)
        first = jnp.int32(0)
        (out, state), _ = step(pick(self.blocks, first), (x, state), first)
        return x, out, state

    def other_blocks(
        self,
        tokens: Float[Array, "b s e"],
        carry: tuple[Float[Array, "b s e"], Any],
        signal: Signal,
        context: PreparedContext,
    ) -> Float[Array, "b s e"]:
        """Runs the blocks after `first_block`, from its last two results.

        Blocks are picked from the stack in the loop: a slice of the stack would be a copy of its weights.
        """
        _, _, step = self._steps(tokens, signal, context)
        layers = jnp.arange(1, self.config.num_layers)
        (x, _), _ = jax.lax.scan(lambda c, i: step(pick(self.blocks, i), c, i), carry, layers, unroll=self.unroll)
        return x

    def _steps(
        self, tokens: jax.Array, signal: Signal, context: PreparedContext
    ) -> tuple[jax.Array, Any, Callable[..., tuple[tuple[jax.Array, Any], None]]]:
        """Tokens and the adapter's state before the first block, and the step from one block to the next."""
        x, state, after = self.adapter.start(tokens, signal, context.adapter)

        def step(block: Block, carry: tuple[jax.Array, Any], layer: jax.Array) -> tuple[tuple[jax.Array, Any], None]:
            x, state = carry
            frames = self.adapter.frame_keys(context.adapter, layer, signal)
            return after(layer, block(x, signal, _layer(context.sources, layer), frames), state), None

        return x, state, step

    def head(self, tokens: Float[Array, "b s e"], signal: Signal) -> Float[Array, "b f h w c_out"]:
        """The velocity, fp32."""
        modulation = self.scale_shift_table[...] + signal.embedding[:, :, None]
        shift, scale = (signal.by_token(modulation[:, :, i]) for i in range(2))
        x = self.proj_out(layer_norm(tokens, self.config.eps) * (1 + scale) + shift)
        return unfold(x[:, : math.prod(signal.grid)], self.config.patch_size, signal.grid)

    def __call__(
        self,
        latents: Float[Array, "b f h w c"],
        timestep: Float[Array, " b"],
        context: Context | PreparedContext,
    ) -> Float[Array, "b f h w c_out"]:
        """`head` of `trunk` of `embed`: the velocity, fp32."""
        context = context if isinstance(context, PreparedContext) else self.prepare(context)
        tokens, signal = self.embed(latents, timestep, context)
        return self.head(self.trunk(tokens, signal, context), signal)
