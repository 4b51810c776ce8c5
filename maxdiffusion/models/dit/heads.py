"""Splits features into heads and joins them: a reshape, on TPUs as slices (docs/tpu_layouts.md)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped

from maxdiffusion.parallel import axes, current


def split(x: Shaped[Array, "b s e"], heads: int) -> Shaped[Array, "b s {heads} d"]:
    """Splits features into heads."""
    return jax.lax.platform_dependent(
        x,
        tpu=lambda x: split_by_slices(x, heads, _shards()),
        default=lambda x: x.reshape(*x.shape[:2], heads, -1),
    )


def join(x: Shaped[Array, "b s n d"]) -> Shaped[Array, "b s e"]:
    """Joins heads: the inverse of `split`."""
    return jax.lax.platform_dependent(
        x,
        tpu=lambda x: join_by_slices(x, _shards()),
        default=lambda x: x.reshape(*x.shape[:2], -1),
    )


def split_by_slices(x: Shaped[Array, "b s e"], heads: int, shards: int = 1) -> Shaped[Array, "b s {heads} d"]:
    """Slices each shard of the features by itself, so that nothing moves between devices."""
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
