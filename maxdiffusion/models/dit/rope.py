"""Rotary positions on three axes (Su et al., 2021; RoFormer), as the official WAN repositories lay them out."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

THETA = 1e4


def rotary_tables(
    grid: tuple[int, int, int], head_dim: int
) -> tuple[Float[Array, "s half_d"], Float[Array, "s half_d"]]:
    """Cosine and sine of the angle of every token and channel pair, fp32, tokens in (f, h, w) order.

    The head dim is split into t = d - 4 (d // 6) and h = w = 2 (d // 6) channels. Angles are made in float64 on the
    host, one small table for each axis; the product over the grid is left to the program, so that no table of the
    length of the sequence becomes a constant of the executable.
    """
    f, h, w = grid
    spatial = 2 * (head_dim // 6)
    angles = []
    for positions, channels in ((f, head_dim - 2 * spatial), (h, spatial), (w, spatial)):
        frequencies = THETA ** -(np.arange(0, channels, 2, dtype=np.float64) / channels)
        angles.append(np.outer(np.arange(positions, dtype=np.float64), frequencies))

    def spread(table_f: np.ndarray, table_h: np.ndarray, table_w: np.ndarray) -> Float[Array, "s half_d"]:
        parts = (
            jnp.asarray(table_f, jnp.float32)[:, None, None],
            jnp.asarray(table_h, jnp.float32)[None, :, None],
            jnp.asarray(table_w, jnp.float32)[None, None, :],
        )
        return jnp.concatenate([jnp.broadcast_to(part, (f, h, w, part.shape[-1])) for part in parts], axis=-1).reshape(
            f * h * w, head_dim // 2
        )

    return spread(*map(np.cos, angles)), spread(*map(np.sin, angles))


def rotate(
    x: Float[Array, "b s n d"], cos: Float[Array, "s half_d"], sin: Float[Array, "s half_d"]
) -> Float[Array, "b s n d"]:
    """Turns each pair of channels (2i, 2i + 1) by its angle, in fp32; fp32 out."""
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    cos, sin = cos[:, None], sin[:, None]
    return jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1).reshape(x.shape)
