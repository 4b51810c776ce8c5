"""Features into heads and back: a reshape, which a TPU is given as slices.

An array of a TPU lies in tiles of 8 x 128 over its last two axes, so no layout of (s, n d) is one of (s, n, d). For a
reshape XLA turns the tokens into the lanes, where splitting n d costs nothing, and turns them back: two transpositions
of every tile. A head of 128 features is a column of whole tiles, and taking each by itself moves tiles as they are.

Of two layers of the 14B model on v6e-8, data 2 x ulysses 4, `scripts/tpu.py memory` predicts 0.027 s for all but
products and kernels, with reshapes 0.041, and a peak of 3.46 GiB instead of 3.81.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped

from maxdiffusion.parallel import axes, current


def split(x: Shaped[Array, "b s e"], heads: int) -> Shaped[Array, "b s {heads} d"]:
    """Heads of equal width, in order."""
    return jax.lax.platform_dependent(
        x,
        tpu=lambda x: split_by_slices(x, heads, _shards()),
        default=lambda x: x.reshape(*x.shape[:2], heads, -1),
    )


def join(x: Shaped[Array, "b s n d"]) -> Shaped[Array, "b s e"]:
    """The inverse."""
    return jax.lax.platform_dependent(
        x,
        tpu=lambda x: join_by_slices(x, _shards()),
        default=lambda x: x.reshape(*x.shape[:2], -1),
    )


def split_by_slices(x: Shaped[Array, "b s e"], heads: int, shards: int = 1) -> Shaped[Array, "b s {heads} d"]:
    """Of each shard of the features by themselves, so that none is moved to another device."""
    own = x.reshape(*x.shape[:2], shards, -1)
    return jnp.stack(jnp.split(own, heads // shards, axis=3), axis=3).reshape(*x.shape[:2], heads, -1)


def join_by_slices(x: Shaped[Array, "b s n d"], shards: int = 1) -> Shaped[Array, "b s e"]:
    """The inverse of `split_by_slices`."""
    batch, tokens, heads, dim = x.shape
    own = x.reshape(batch, tokens, shards, heads // shards, dim)
    return jnp.concatenate([own[:, :, :, n] for n in range(heads // shards)], axis=-1).reshape(batch, tokens, -1)


def _shards() -> int:
    placement = current()
    return 1 if placement is None else placement.degree(axes.HEADS)
