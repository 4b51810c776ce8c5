"""Dense attention: all logits in memory at once. The reference of all other kernels, and the fastest for few logits."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from maxdiffusion.attention.layout import zero_masked

# A local kernel: (q: b s n d, k: b k n d, v: b k n d, valid: b k or None) -> (out: b s n d, lse: b s n), as `dense`.
Local = Callable[[jax.Array, jax.Array, jax.Array, jax.Array | None], tuple[jax.Array, jax.Array]]


def dense(
    q: Float[Array, "b s n d"],
    k: Float[Array, "b k n d"],
    v: Float[Array, "b k n d"],
    valid: Bool[Array, "b k"] | None = None,
) -> tuple[Float[Array, "b s n d"], Float[Array, "b s n"]]:
    """softmax(q k^T / sqrt(d)) v over the valid keys, and its log-sum-exp.

    Logits, softmax and sums in fp32; both results are fp32. A row without a valid key gives 0 and -inf, without NaN
    in the value or the gradient; NaN in a query is NaN in its row alone, and in a masked key nowhere. Memory b n s k.
    """
    logits = jnp.einsum("bsnd,bknd->bnsk", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    if valid is not None:
        logits = jnp.where(valid[:, None, None, :], logits, -jnp.inf)
    weights, total, lse = exponentiate(logits)
    values = zero_masked(v, valid)
    out = jnp.einsum("bnsk,bknd->bsnd", weights.astype(v.dtype), values, preferred_element_type=jnp.float32)
    return out / total.transpose(0, 2, 1)[..., None], lse.transpose(0, 2, 1)


def exponentiate(
    logits: Float[Array, "*rows k"],
) -> tuple[Float[Array, "*rows k"], Float[Array, "*rows"], Float[Array, "*rows"]]:
    """exp(logits - max), its sum (1 where every logit is -inf) and the log-sum-exp (-inf there), per row."""
    top = logits.max(axis=-1, initial=-jnp.inf)
    top = jax.lax.stop_gradient(jnp.where(top == -jnp.inf, 0.0, top))
    weights = jnp.exp(logits - top[..., None])
    total = weights.sum(axis=-1)
    empty = total == 0  # not of a row with NaN
    safe = jnp.where(empty, 1.0, total)
    return weights, safe, jnp.where(empty, -jnp.inf, top + jnp.log(safe))
