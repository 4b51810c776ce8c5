"""Ring attention: keys and values rotate around the ring axis; each hop's result is merged by its log-sum-exp."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from maxdiffusion.attention.dense import Local
from maxdiffusion.attention.merge import merge
from maxdiffusion.parallel import axes

Block = list[tuple[jax.Array, jax.Array]]  # (k, v) of each direction


def ring(local: Local, degree: int, *, two_way: bool = False) -> Local:
    """`local` over all keys of the ring axis (Liu et al., arXiv 2310.01889), to be called under `shard_map`.

    The result takes q, k and v of one ring shard, and a `valid` that covers the keys of all shards in their order. Each
    hop slices the mask of the shard that its keys came from, so masks are not communicated. The loop is unrolled, with
    a barrier per hop: without it XLA starts every rotation before the first kernel and keeps all copies alive.

    One way, k and v are each permuted `degree - 1` times, from every device to the next. Two ways, the first half of
    every block travels to the next device and the second half to the previous one: 4 (degree - 1) permutations of half
    the size, the same bytes in total, and each hop concatenates the halves, which copies k and v once.
    docs/tpu_layouts.md says on which interconnects two ways are faster.
    """

    def attend(
        q: Float[Array, "b s n d"],
        k: Float[Array, "b k n d"],
        v: Float[Array, "b k n d"],
        valid: Bool[Array, "b ring_k"] | None = None,
    ) -> tuple[Float[Array, "b s n d"], Float[Array, "b s n"]]:
        device = jax.lax.axis_index(axes.RING)
        length = k.shape[1]
        half = -(-length // 2) if two_way else length
        # (first row, rows, step) of the parts of a block, by direction; a block of one row has one part.
        parts = [(first, rows, step) for first, rows, step in ((0, half, 1), (half, length - half, -1)) if rows]

        def hop(block: Block, number: int) -> tuple[jax.Array, jax.Array]:
            k, v = (_concatenate(list(halves), 2).swapaxes(1, 2) for halves in zip(*block, strict=True))
            if valid is None:
                return local(q, k, v, None)
            starts = [((device - step * number) % degree * length + first, rows) for first, rows, step in parts]
            masks = [jax.lax.dynamic_slice_in_dim(valid, start, rows, axis=1) for start, rows in starts]
            return local(q, k, v, _concatenate(masks, 1))

        def rotate(block: Block) -> Block:
            routes = [[(i, (i + step) % degree) for i in range(degree)] for _, _, step in parts]
            return [jax.lax.ppermute(part, axes.RING, route) for part, route in zip(block, routes, strict=True)]

        # Heads before tokens, the kernels' layout; in the other one a TPU copies the keys and values of every hop.
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
        block = [(k[:, :, first : first + rows], v[:, :, first : first + rows]) for first, rows, _ in parts]
        next_block = rotate(block)
        out, lse = hop(block, 0)
        for number in range(1, degree):
            block, out, lse = jax.lax.optimization_barrier((next_block, out, lse))
            if number + 1 < degree:
                next_block = rotate(block)
            out, lse = merge(out, lse, *hop(block, number))
        return out, lse

    return attend


def _concatenate(parts: list[jax.Array], axis: int) -> jax.Array:
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=axis)
