"""One entry for every attention mode."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from maxdiffusion.attention.plan import AttentionPlan


def self_attention(
    plan: AttentionPlan,
    q: Float[Array, "b s n d"],
    k: Float[Array, "b s n d"],
    v: Float[Array, "b s n d"],
    valid: Bool[Array, "b s"] | None = None,
) -> Float[Array, "b s n d"]:
    """Attention among the video tokens; logits and softmax in fp32. A False in `valid` removes that key."""
    return cross_attention(plan, q, k, v, valid)


def cross_attention(
    plan: AttentionPlan,
    q: Float[Array, "b s n d"],
    k: Float[Array, "b k n d"],
    v: Float[Array, "b k n d"],
    valid: Bool[Array, "b k"] | None = None,
) -> Float[Array, "b s n d"]:
    """Attention of the video tokens to a short, replicated list of keys (text, image)."""
    del plan
    logits = jnp.einsum("bsnd,bknd->bnsk", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    if valid is not None:
        logits = jnp.where(valid[:, None, None, :], logits, -jnp.inf)
    weights = jax.nn.softmax(logits, axis=-1)
    return jnp.einsum("bnsk,bknd->bsnd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32).astype(q.dtype)
