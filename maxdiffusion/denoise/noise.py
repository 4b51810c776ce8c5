"""The noise of a run: the initial one, and that which a solver adds between steps."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt32

from maxdiffusion import parallel
from maxdiffusion.errors import UserError
from maxdiffusion.parallel import axes, shard

Shape = tuple[int, int, int, int]


def noise(seeds: Sequence[int], shape: Shape) -> Float[Array, "b f h w c"]:
    """Standard normal float32 of shape (len(seeds), *shape), sharded over the batch by the current placement.

    Each example is drawn from its own seed alone, so it is the same in any batch and on any mesh: threefry with
    `jax_threefry_partitionable`, where an element depends on the key and its own index only.

    Args:
      seeds: one per example, 0 .. 2**64 - 1. jax.random.key would drop the upper 32 bits of a large one; the key is
        made here from both halves, and equals jax.random.key's below 2**32.
      shape: (f, h, w, c) of one example's latents.

    Raises:
      UserError: a seed is out of range.
    """
    return parallel.jit(_noise, static_argnums=1)(_keys(seeds), shape)


def _noise(keys: jax.Array, shape: Shape) -> jax.Array:
    return _normal(jax.random.wrap_key_data(keys, impl="threefry2x32"), shape)


def step_keys(seeds: Sequence[int], segment: int = 0) -> UInt32[np.ndarray, "b 2"]:
    """The keys from which `step_noise` draws: one per example, of its seed and the number of the segment.

    Raises:
      UserError: a seed is out of range.
    """
    return np.asarray(_folded(_keys(seeds), segment))


@jax.jit
def _folded(keys: jax.Array, segment: jax.Array) -> jax.Array:
    typed = jax.random.wrap_key_data(keys, impl="threefry2x32")
    return jax.random.key_data(jax.vmap(jax.random.fold_in, (0, None))(typed, segment))


def step_noise(keys: UInt32[Array, "b 2"], step: jax.Array, shape: Shape) -> Float[Array, "b f h w c"]:
    """Standard normal float32 for a step (an integer scalar), as `noise`; to be traced inside a program.

    It depends on the key and the number of the step alone, so a resumed run draws what the whole run drew.
    """
    typed = jax.random.wrap_key_data(keys, impl="threefry2x32")
    return _normal(jax.vmap(jax.random.fold_in, (0, None))(typed, step), shape)


def _keys(seeds: Sequence[int]) -> UInt32[np.ndarray, "b 2"]:
    for seed in seeds:
        if not 0 <= seed < 2**64:
            raise UserError(f"seed={seed} is outside 0 .. {2**64 - 1}; choose one within.")
    return np.array([[seed >> 32, seed & 0xFFFFFFFF] for seed in seeds], np.uint32)


def _normal(keys: jax.Array, shape: Shape) -> jax.Array:
    # Flat, then reshaped: the same bits (they go by the flat index), and XLA's CPU compiler takes 0.4 s, not 2.5 s.
    with jax.threefry_partitionable(True):
        x = jax.vmap(lambda key: jax.random.normal(key, (math.prod(shape),), jnp.float32))(keys)
    return shard(x.reshape(-1, *shape), axes.BATCH, None, None, None, None)
