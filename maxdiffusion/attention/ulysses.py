"""Ulysses attention: an all-to-all trades a shard of the sequence for a shard of the heads, and back."""

import jax
from jaxtyping import Array, Bool, Float

from maxdiffusion.attention.kernels import Local
from maxdiffusion.parallel import axes


def ulysses(local: Local) -> Local:
    """`local` over all tokens of the ulysses axis (Jacobs et al., arXiv 2309.14509), to be called under `shard_map`.

    q, k and v hold one shard of the tokens and every head; `local` sees all tokens of the axis, in order, and one shard
    of the heads, and `valid` reaches it as it is. The output travels in the dtype of q.
    """

    def attend(
        q: Float[Array, "b s n d"],
        k: Float[Array, "b s n d"],
        v: Float[Array, "b s n d"],
        valid: Bool[Array, "b all_k"] | None = None,
    ) -> tuple[Float[Array, "b s n d"], Float[Array, "b s n"]]:
        out, lse = local(_gather_tokens(q), _gather_tokens(k), _gather_tokens(v), valid)
        return _gather_heads(out.astype(q.dtype)), _gather_heads(lse)

    return attend


def _gather_tokens(x: jax.Array) -> jax.Array:
    return jax.lax.all_to_all(x, axes.ULYSSES, split_axis=2, concat_axis=1, tiled=True)


def _gather_heads(x: jax.Array) -> jax.Array:
    return jax.lax.all_to_all(x, axes.ULYSSES, split_axis=1, concat_axis=2, tiled=True)
