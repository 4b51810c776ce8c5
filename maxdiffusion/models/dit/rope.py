"""Rotary positions on three axes (Su et al., 2021, arXiv:2104.09864), laid out as in the official WAN repositories."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

THETA = 1e4


def rotary_tables(
    grid: tuple[int, int, int], head_dim: int, origin: tuple[int, int, int] = (0, 0, 0)
) -> tuple[Float[Array, "s d"], Float[Array, "s d"]]:
    """`rotary_tables_at` positions from `origin` on."""
    f, h, w = (first + np.arange(extent) for first, extent in zip(origin, grid, strict=True))
    return rotary_tables_at((f, h, w), head_dim)


def rotary_tables_at(
    positions: tuple[Int[np.ndarray, " f"], Int[np.ndarray, " h"], Int[np.ndarray, " w"]], head_dim: int
) -> tuple[Float[Array, "s d"], Float[Array, "s d"]]:
    """Tables of `rotate`: cosines, and sines negated in even channels; fp32.

    Tokens are in (f, h, w) order. The head dim is split into t = d - 4 (d // 6) and h = w = 2 (d // 6) channels.
    Angles are computed in float64 on the host, one small table for each axis. The program broadcasts them over the
    grid, so that no table as long as the sequence becomes a constant of the executable.
    """
    f, h, w = grid = tuple(map(len, positions))
    spatial = 2 * (head_dim // 6)
    cosines: list[jax.Array] = []
    sines: list[jax.Array] = []
    for axis, channels in enumerate((head_dim - 2 * spatial, spatial, spatial)):
        frequencies = THETA ** -(np.arange(0, channels, 2, dtype=np.float64) / channels)
        angles = np.repeat(np.outer(positions[axis].astype(np.float64), frequencies), 2, axis=-1)
        shape = [channels if n == 3 else grid[axis] if n == axis else 1 for n in range(4)]
        signs = np.where(np.arange(channels) % 2, 1.0, -1.0)
        for tables, values in ((cosines, np.cos(angles)), (sines, np.sin(angles) * signs)):
            table = jnp.asarray(values.reshape(shape), jnp.float32)
            tables.append(jnp.broadcast_to(table, (f, h, w, channels)))
    cos, sin = (jnp.concatenate(tables, axis=-1).reshape(f * h * w, head_dim) for tables in (cosines, sines))
    return cos, sin


def rotate(x: Float[Array, "b s n d"], cos: Float[Array, "s d"], sin: Float[Array, "s d"]) -> Float[Array, "b s n d"]:
    """Rotates each pair of channels (2i, 2i + 1) by its angle, in fp32; fp32 out."""
    x = x.astype(jnp.float32)
    swapped = jnp.flip(x.reshape(*x.shape[:-1], -1, 2), axis=-1).reshape(x.shape)
    return x * cos[:, None] + swapped * sin[:, None]
