"""VACE (Jiang et al., 2025, arXiv:2503.07598): a second stream of blocks computes hints from a control video."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from maxdiffusion.attention.plan import AttentionPlan
from maxdiffusion.models.dit.adapter import Adapter, After, after_layers
from maxdiffusion.models.dit.block import Block, Signal
from maxdiffusion.models.dit.config import DiTConfig, VACEConfig
from maxdiffusion.models.dit.context import KeysValues
from maxdiffusion.models.dit.patches import fold
from maxdiffusion.models.layers import Dtypes, Linear, pick, scan, stack
from maxdiffusion.parallel import axes, shard


class Control(NamedTuple):
    """The control input of a VACE transformer."""

    latents: Float[Array, "b f h w c"]  # inactive, reactive, mask: 96 channels in the official checkpoints
    scale: Float[Array, "b hints"]  # of each hint


class PreparedControl(NamedTuple):
    """`Control` with the keys and values of the text for each block of the control stream."""

    latents: Float[Array, "b f h w c"]
    scale: Float[Array, "b hints"]
    text: KeysValues

    def cut(self, take: Callable[[jax.Array], jax.Array]) -> PreparedControl:
        """See `PreparedContext.cut`."""
        return self._replace(latents=take(self.latents))


class ControlBlock(nnx.Module):
    """A block of the control stream and the projection to its hint.

    Reference: `diffusers.models.transformers.transformer_wan_vace.WanVACETransformerBlock`.
    """

    def __init__(self, config: DiTConfig, plan: AttentionPlan, dtypes: Dtypes):
        self.block = Block(config, plan, dtypes)
        self.proj_out = Linear(config.dim, config.dim, (axes.EMBED, None), dtypes.unquantized)


class VACE(Adapter):
    """The control stream, which runs along with the main one, so that one hint is in memory at a time.

    The reference computes all hints first. They depend on the main stream by its embedded latents only, so each can be
    computed where it is added.

    Reference: `diffusers.WanVACETransformer3DModel`.
    """

    def __init__(self, config: DiTConfig, vace: VACEConfig, plan: AttentionPlan, dtypes: Dtypes):
        self.layers = config.adapter_layers
        self.patch = config.patch_size
        channels = vace.vace_in_channels * math.prod(config.patch_size)
        self.patch_embedding = Linear(channels, config.dim, (None, axes.EMBED), dtypes.unquantized)
        self.proj_in = Linear(config.dim, config.dim, (axes.EMBED, None), dtypes.unquantized)
        self.blocks = stack(lambda: ControlBlock(config, plan, dtypes), len(vace.vace_layers))

    def prepare(self, text: Float[Array, "b k e"], control: Control) -> PreparedControl:
        _, sources = scan(self.blocks, lambda one, _, __: (None, one.block.sources(text)), None, None, False)
        return PreparedControl(*control, KeysValues(*(jnp.moveaxis(a, 0, 1) for a in sources[0])))

    def start(
        self, x: Float[Array, "b s e"], signal: Signal, control: PreparedControl
    ) -> tuple[Float[Array, "b s e"], Float[Array, "b s e"], After]:
        """The tokens, the control stream before its first block, and the step of both after each block of the trunk."""
        stream = self.proj_in(self.patch_embedding(fold(control.latents, self.patch)))
        stream = jnp.pad(stream, ((0, 0), (0, x.shape[1] - stream.shape[1]), (0, 0)))
        stream = shard(stream + x, axes.BATCH, axes.SEQUENCE, None)

        def hint(index: jax.Array, x: jax.Array, stream: jax.Array) -> tuple[jax.Array, jax.Array]:
            one = pick(self.blocks, index)
            text = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, index, 1, keepdims=False), control.text)
            stream = one.block(stream, signal, (text,))
            scale = jax.lax.dynamic_index_in_dim(control.scale, index, 1).astype(jnp.float32)
            total = x.astype(jnp.float32) + one.proj_out(stream).astype(jnp.float32) * scale[..., None]
            return shard(total.astype(x.dtype), axes.BATCH, axes.SEQUENCE, None), stream

        return x, stream, after_layers(self.layers, hint)
