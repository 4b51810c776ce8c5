"""The interface of adapters (VACE's hints, Animate's face attention), which act after some layers of the trunk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

# (layer, x: b s e, state) -> (x, state): called after every block.
After = Callable[[Int[Array, ""], jax.Array, Any], tuple[jax.Array, Any]]


class NoAdapter(nnx.Module):
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
