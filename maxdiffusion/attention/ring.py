"""Ring attention: keys and values travel around the ring axis, each hop's result is merged by its log-sum-exp."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from maxdiffusion.attention.kernels import Local
from maxdiffusion.attention.merge import merge
from maxdiffusion.parallel import axes

Held = list[tuple[jax.Array, jax.Array]]  # parts of k and v that travel together


def ring(local: Local, degree: int, *, two_way: bool = False) -> Local:
    """`local` over all the keys of the ring axis (Liu et al., arXiv 2310.01889), to be called under `shard_map`.

    The result takes q, k and v of one ring shard, and a `valid` that covers the keys of all shards, in their order: a
    hop cuts from it the keys that it holds, by the shard that they came from, so no mask travels. The loop is unrolled,
    with a barrier per hop: otherwise XLA starts every rotation before the first kernel and keeps all copies alive.

    One way, k and v are each permuted `degree - 1` times, from every device to the next. Two ways, the first half of
    every block travels to the next device and the second half to the previous one: 4 (degree - 1) permutations of half
    the size, the same bytes in all, and each hop joins its halves, which copies k and v once. On an axis that wraps
    around, a link then carries half as much in either direction. On one that does not, the transfer that closes the
    ring takes the links' idle direction and one way is as fast: its end has one link to receive `degree - 1` blocks by.
    """

    def attend(
        q: Float[Array, "b s n d"],
        k: Float[Array, "b k n d"],
        v: Float[Array, "b k n d"],
        valid: Bool[Array, "b ring_k"] | None = None,
    ) -> tuple[Float[Array, "b s n d"], Float[Array, "b s n"]]:
        here = jax.lax.axis_index(axes.RING)
        block = k.shape[1]
        half = -(-block // 2) if two_way else block
        # (first row, rows, direction) of the parts that travel together; a block of one row has one.
        parts = [(first, rows, way) for first, rows, way in ((0, half, 1), (half, block - half, -1)) if rows]

        def hop(held: Held, number: int) -> tuple[jax.Array, jax.Array]:
            k, v = (_joined([part[i] for part in held]) for i in range(2))
            if valid is None:
                return local(q, k, v, None)
            starts = [((here - way * number) % degree * block + first, rows) for first, rows, way in parts]
            seen = [jax.lax.dynamic_slice_in_dim(valid, start, rows, axis=1) for start, rows in starts]
            return local(q, k, v, _joined(seen))

        def rotate(held: Held) -> Held:
            ways = [way for _, _, way in parts]
            return [
                (_permute(k, way, degree), _permute(v, way, degree)) for (k, v), way in zip(held, ways, strict=True)
            ]

        held = [(k[:, first : first + rows], v[:, first : first + rows]) for first, rows, _ in parts]
        ahead = rotate(held)
        out, lse = hop(held, 0)
        for number in range(1, degree):
            held, out, lse = jax.lax.optimization_barrier((ahead, out, lse))
            if number + 1 < degree:
                ahead = rotate(held)
            out, lse = merge(out, lse, *hop(held, number))
        return out, lse

    return attend


def _permute(x: jax.Array, way: int, degree: int) -> jax.Array:
    return jax.lax.ppermute(x, axes.RING, [(i, (i + way) % degree) for i in range(degree)])


def _joined(parts: list[jax.Array]) -> jax.Array:
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)
