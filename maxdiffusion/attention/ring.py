"""Ring attention: keys and values travel around the ring axis, each hop's result is merged by its log-sum-exp."""

import jax
from jaxtyping import Array, Bool, Float

from maxdiffusion.attention.kernels import Local
from maxdiffusion.attention.merge import merge
from maxdiffusion.parallel import axes


def ring(local: Local, degree: int) -> Local:
    """`local` over all the keys of the ring axis (Liu et al., arXiv 2310.01889), to be called under `shard_map`.

    The result takes q, k and v of one ring shard, and a `valid` that covers the keys of all shards, in their order: a
    hop cuts from it the part of the shard that its block came from, so no mask travels. k and v are permuted
    `degree - 1` times. The loop is unrolled, with a barrier per hop: otherwise XLA starts every rotation before the
    first kernel and keeps all copies alive.
    """
    neighbours = [(i, (i + 1) % degree) for i in range(degree)]

    def rotate(x: jax.Array) -> jax.Array:
        return jax.lax.ppermute(x, axes.RING, neighbours)

    def attend(
        q: Float[Array, "b s n d"],
        k: Float[Array, "b k n d"],
        v: Float[Array, "b k n d"],
        valid: Bool[Array, "b ring_k"] | None = None,
    ) -> tuple[Float[Array, "b s n d"], Float[Array, "b s n"]]:
        here = jax.lax.axis_index(axes.RING)
        block = k.shape[1]

        def hop(k: jax.Array, v: jax.Array, number: int) -> tuple[jax.Array, jax.Array]:
            if valid is None:
                return local(q, k, v, None)
            source = (here - number) % degree
            return local(q, k, v, jax.lax.dynamic_slice_in_dim(valid, source * block, block, axis=1))

        ahead = rotate(k), rotate(v)
        out, lse = hop(k, v, 0)
        for number in range(1, degree):
            (k, v), out, lse = jax.lax.optimization_barrier((ahead, out, lse))
            if number + 1 < degree:
                ahead = rotate(k), rotate(v)
            out, lse = merge(out, lse, *hop(k, v, number))
        return out, lse

    return attend
