"""Merges attention over disjoint sets of keys (online softmax)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def merge(
    out: Float[Array, "b s n d"],
    lse: Float[Array, "b s n"],
    other_out: Float[Array, "b s n d"],
    other_lse: Float[Array, "b s n"],
) -> tuple[Float[Array, "b s n d"], Float[Array, "b s n"]]:
    """Attention over the union of two disjoint key sets (Milakov and Gimelshein, arXiv 1805.02867).

    `lse` is the natural log of the sum of exponentiated logits, fp32; rows without a valid key have -inf and `out` 0.
    Rows without a key on either side stay (0, -inf). Neither the value nor the gradient has NaN.
    """
    top = jnp.maximum(lse, other_lse)
    top = jax.lax.stop_gradient(jnp.where(top == -jnp.inf, 0.0, top))
    ours, theirs = jnp.exp(lse - top), jnp.exp(other_lse - top)
    total = ours + theirs
    empty = total == 0  # not of a row with NaN
    safe = jnp.where(empty, 1.0, total)
    ours, theirs = ours / safe, theirs / safe
    merged = out.astype(jnp.float32) * ours[..., None] + other_out.astype(jnp.float32) * theirs[..., None]
    return merged, jnp.where(empty, -jnp.inf, top + jnp.log(safe))
