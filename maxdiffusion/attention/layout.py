"""Padding of arrays to shards, and the masks of padded keys."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Shaped


def pad_to_multiple(x: Shaped[Array, "..."], axis: int, multiple: int) -> Shaped[Array, "..."]:
    """Appends zeros (False) to an axis until its length is a multiple."""
    missing = -x.shape[axis] % multiple
    if not missing:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, missing)
    return jnp.pad(x, widths)


def zero_masked(v: Shaped[Array, "b k n d"], valid: Bool[Array, "b k"] | None) -> Shaped[Array, "b k n d"]:
    """The values with 0 in place of masked ones, which a weight of 0 would not keep out if they were NaN."""
    return v if valid is None else jnp.where(valid[:, :, None, None], v, 0)


def validity(
    batch: int, length: int, padded: int, valid: Bool[Array, "b k"] | None
) -> Bool[Array, "b padded_k"] | None:
    """Mask of `padded` keys: key g is valid if and only if g < length and the caller's mask allows it.

    None if every key is valid. Index g is global: each hop of a ring slices the mask of the shard its keys came from.
    """
    if valid is not None:
        return pad_to_multiple(valid, 1, padded)
    if padded == length:
        return None
    return jnp.broadcast_to(jnp.arange(padded) < length, (batch, padded))
