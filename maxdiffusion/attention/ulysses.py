"""Ulysses attention: an all-to-all exchanges a shard of the sequence for a shard of the heads, and back."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Shaped

from maxdiffusion.attention.dense import Local
from maxdiffusion.kernels import rows
from maxdiffusion.parallel import TILE_ROWS, axes, platform


def ulysses(local: Local, chunks: int = 1) -> Local:
    """`local` over all tokens of the ulysses axis (Jacobs et al., arXiv 2309.14509), to be called under `shard_map`.

    q, k and v hold one shard of the tokens and every head; `local` gets all tokens of the axis, in order, one shard of
    the heads, and `valid` unchanged. The output is sent in q's dtype.

    The heads are processed in `chunks` groups, each with its own all-to-all of q, k, v and the output. Those of the
    next group may overlap with the kernel of the current one, between two barriers: without barriers XLA starts all of
    them before the first kernel, or each one only after it. docs/tpu_layouts.md says how many do overlap.
    """

    def attend(
        q: Float[Array, "b s n d"],
        k: Float[Array, "b s n d"],
        v: Float[Array, "b s n d"],
        valid: Bool[Array, "b all_k"] | None = None,
    ) -> tuple[Float[Array, "b s n d"], Float[Array, "b s n"]]:
        groups = list(zip(*(jnp.split(x, chunks, axis=2) for x in (q, k, v)), strict=True))
        results: list[tuple[jax.Array, jax.Array]] = []
        group = next_group = [_gather_tokens(x) for x in groups[0]]
        for number in range(chunks):
            if number + 1 < chunks:
                next_group = [_gather_tokens(x) for x in groups[number + 1]]
            out, lse = local(group[0], group[1], group[2], valid)
            results.append((out.astype(q.dtype), lse))
            if number + 1 < chunks:
                group, results[-1], groups[number + 2 :] = jax.lax.optimization_barrier(
                    (next_group, results[-1], groups[number + 2 :])
                )
        out, lse = (jnp.concatenate([_gather_heads(x) for x in part], axis=2) for part in zip(*results, strict=True))
        return out, lse

    return attend


# Both exchanges have the device as the first axis and heads before tokens, the kernels' layout: on a TPU each part is
# then a contiguous run of whole tiles, and only the side that has all tokens copies them, once.


def _gather_tokens(x: Shaped[Array, "b s n *d"]) -> Shaped[Array, "b all_s own_n *d"]:
    b, s, n, *d = x.shape
    devices = jax.lax.axis_size(axes.ULYSSES)
    parts = jnp.moveaxis(x.swapaxes(1, 2).reshape(b, devices, n // devices, s, *d), 1, 0)
    parts = _swap(_exchange(parts).reshape(devices, b * n // devices, s, *d))
    return parts.reshape(b, n // devices, devices * s, *d).swapaxes(1, 2)


def _gather_heads(x: Shaped[Array, "b all_s own_n *d"]) -> Shaped[Array, "b s n *d"]:
    b, s, n, *d = x.shape
    devices = jax.lax.axis_size(axes.ULYSSES)
    parts = _swap(x.swapaxes(1, 2).reshape(b * n, devices, s // devices, *d))
    parts = jnp.moveaxis(_exchange(parts.reshape(devices, b, n, s // devices, *d)), 0, 1)
    return parts.reshape(b, devices * n, s // devices, *d).swapaxes(1, 2)


def _swap(x: Shaped[Array, "m n s *d"]) -> Shaped[Array, "n m s *d"]:
    """Swaps the first two axes; XLA's copy of heads takes 2.5 times as long on TPUs."""
    whole = x.ndim == 4 and x.shape[2] % TILE_ROWS == 0 and x.shape[3] % rows.LANES == 0
    return rows.swap_leading(x) if platform() == "tpu" and whole else x.swapaxes(0, 1)


def _exchange(parts: Shaped[Array, "ulysses ..."]) -> Shaped[Array, "ulysses ..."]:
    """Sends part i to device i; returns the received parts in the order of their senders."""
    return jax.lax.all_to_all(parts, axes.ULYSSES, split_axis=0, concat_axis=0)
