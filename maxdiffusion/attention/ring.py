"""Ring attention: keys and values rotate around the ring axis; each hop's result is merged by its log-sum-exp."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from maxdiffusion.attention.dense import Local
from maxdiffusion.attention.layout import pad_to_multiple
from maxdiffusion.attention.merge import merge
from maxdiffusion.parallel import axes

Block = list[tuple[jax.Array, jax.Array]]  # (k, v) of each direction


def ring(
    local: Callable[..., Any], degree: int, *, two_way: bool = False, unit: int = 1, merges: bool = False
) -> Local:
    """`local` over all keys of the ring axis (Liu et al., arXiv 2310.01889), to be called under `shard_map`.

    The result takes q, k and v of one ring shard, and a `valid` that covers the keys of all shards in their order. Each
    hop slices the mask of the shard that its keys came from, so masks are not communicated. The loop is unrolled, with
    a barrier per hop: without it XLA starts every rotation before the first kernel and keeps all copies alive.

    One way, k and v are each permuted `degree - 1` times, from every device to the next. Two ways, the first half of
    every block travels to the next device and the second half to the previous one: 4 (degree - 1) permutations of half
    the size, the same bytes in total, and each hop concatenates the halves, which copies k and v once.
    docs/tpu_layouts.md says on which interconnects two ways are faster.

    The keys of a shard are padded to a multiple of `unit`: on a TPU the rows of a tile, because a permutation of
    partly filled tiles has another layout, and k and v are copied before and after it.

    A kernel that `merges` is given the result of the hops before.
    """

    def attend(
        q: Float[Array, "b s n d"],
        k: Float[Array, "b k n d"],
        v: Float[Array, "b k n d"],
        valid: Bool[Array, "b ring_k"] | None = None,
    ) -> tuple[Float[Array, "b s n d"], Float[Array, "b s n"]]:
        device = jax.lax.axis_index(axes.RING)
        length = k.shape[1]
        # Heads before tokens, the kernels' layout.
        k, v = (pad_to_multiple(x, 1, unit).swapaxes(1, 2) for x in (k, v))
        padded = k.shape[2]
        half = -(-padded // (2 * unit)) * unit if two_way else padded
        # (first row, rows, step) of the parts of a block, by direction; a block of one row has one part.
        parts = [(first, rows, step) for first, rows, step in ((0, half, 1), (half, padded - half, -1)) if rows]
        shards = None
        if valid is not None or padded > length:
            all_valid = jnp.ones((k.shape[0], degree * length), bool) if valid is None else valid
            shards = pad_to_multiple(all_valid.reshape(-1, degree, length), 2, unit)

        def hop(
            block: Block, number: int, before: tuple[jax.Array, jax.Array] | None = None
        ) -> tuple[jax.Array, jax.Array]:
            k, v = (_concatenate(list(halves), 2).swapaxes(1, 2) for halves in zip(*block, strict=True))
            if merges:
                return local(queries, k, v, mask(number), before, whole=number + 1 == degree)
            result = local(queries, k, v, mask(number))
            return result if before is None else merge(*before, *result)

        def mask(number: int) -> jax.Array | None:
            if shards is None:
                return None
            sources = [(device - step * number) % degree for _, _, step in parts]
            masks = [
                jax.lax.dynamic_index_in_dim(shards, source, 1, keepdims=False)[:, first : first + rows]
                for source, (first, rows, _) in zip(sources, parts, strict=True)
            ]
            return _concatenate(masks, 1)

        def rotate(block: Block) -> Block:
            routes = [[(i, (i + step) % degree) for i in range(degree)] for _, _, step in parts]
            return [jax.lax.ppermute(part, axes.RING, route) for part, route in zip(block, routes, strict=True)]

        block = [(k[:, :, first : first + rows], v[:, :, first : first + rows]) for first, rows, _ in parts]
        # Ulysses' all-to-all of q would wait behind a rotation that has started; the kernel hides the rotation anyway.
        queries, block = jax.lax.optimization_barrier((q, block))
        next_block = rotate(block)
        out, lse = hop(block, 0)
        for number in range(1, degree):
            block, out, lse = jax.lax.optimization_barrier((next_block, out, lse))
            if number + 1 < degree:
                next_block = rotate(block)
            out, lse = hop(block, number, (out, lse))
        return out, lse

    return attend


def _concatenate(parts: list[jax.Array], axis: int) -> jax.Array:
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=axis)
