"""The interface of adapters (VACE, Animate, S2V), which add tokens to the video's or act after layers of the trunk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from maxdiffusion.attention.frames import FrameKeys
from maxdiffusion.models.dit.block import Signal
from maxdiffusion.models.dit.context import Context, KeysValues

# (layer, x: b s e, state) -> (x, state): called after every block.
After = Callable[[Int[Array, ""], jax.Array, Any], tuple[jax.Array, Any]]


# (context, latents: b f h w c, timestep, origin, arrange) -> keys, with their positions, and values of every layer's
# self-attention, each `arrange` of b s n d with the layers as the second axis. A pass of the trunk without adapter;
# `origin` is the position of the first token on each axis.
Extract = Callable[
    [Context, jax.Array, float, tuple[int, int, int], Callable[[jax.Array], jax.Array]],
    KeysValues,
]


class Tokens(NamedTuple):
    """The input of the trunk before it is split over devices.

    Attributes:
      x: those of the video in (f, h, w) order, then others, which are clean: at timestep 0.
      cos, sin: tables of `rope.rotate`.
      valid: False on tokens that no other attends to; None: there are none.
    """

    x: Float[Array, "b s e"]
    cos: Float[Array, "s d"]
    sin: Float[Array, "s d"]
    valid: Bool[Array, "b s"] | None = None


class Adapter(nnx.Module):
    """What adapters share: they have no tokens of their own, unless they say so."""

    def extend(self, tokens: Tokens, patch_embedding: Callable[[jax.Array], jax.Array], prepared: Any) -> Tokens:
        """The video's tokens, followed by the adapter's."""
        return tokens

    def read(self, control: Any, extract: Extract) -> Any:
        """The input of `prepare`, with what the trunk computes of it."""
        return control

    def frame_keys(self, prepared: Any, layer: Int[Array, ""], signal: Signal) -> FrameKeys | None:
        """The keys and values that the self-attention of a layer has beside those of the tokens."""
        return None


class NoAdapter(Adapter):
    """The adapter of the plain transformer: adds nothing."""

    def prepare(self, text: Float[Array, "b k e"], control: tuple[()]) -> tuple[()]:
        return control

    def start(self, x: Float[Array, "b s e"], signal: Any, prepared: tuple[()]) -> tuple[jax.Array, Any, After]:
        return x, (), lambda layer, x, state: (x, state)


def after_layers(
    layers: Sequence[int], run: Callable[[Int[Array, ""], jax.Array, Any], tuple[jax.Array, Any]]
) -> After:
    """Calls `run(i, x, state)` after the i-th of `layers`.

    Other layers skip it by a conditional, so that the blocks stay one scan whatever the layers are.
    """
    indices = np.full(max(layers) + 1, -1, np.int32)
    indices[list(layers)] = np.arange(len(layers))

    def after(layer: jax.Array, x: jax.Array, state: Any) -> tuple[jax.Array, Any]:
        index = jnp.take(jnp.asarray(indices), layer, mode="fill", fill_value=-1)
        return jax.lax.cond(index >= 0, run, lambda index, x, state: (x, state), index, x, state)

    return after
