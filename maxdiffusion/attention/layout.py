"""Fitting arrays to shards: pad, say which keys are real, cut again."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Shaped


def pad_to_multiple(x: Shaped[Array, "..."], axis: int, multiple: int) -> Shaped[Array, "..."]:
    """Zeros (False) at the end of an axis, until its length is a multiple."""
    missing = -x.shape[axis] % multiple
    if not missing:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, missing)
    return jnp.pad(x, widths)


def validity(
    batch: int, length: int, padded: int, valid: Bool[Array, "b k"] | None
) -> Bool[Array, "b padded_k"] | None:
    """Which of `padded` keys count: key g does if and only if g < length and the caller's mask allows it.

    None where all do. Index g is global: each hop of a ring looks up the keys of the shard that its block came from.
    """
    if valid is not None:
        return pad_to_multiple(valid, 1, padded)
    if padded == length:
        return None
    return jnp.broadcast_to(jnp.arange(padded) < length, (batch, padded))
