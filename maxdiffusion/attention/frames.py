"""Attention to keys that are those of one frame, beside the keys that every token has."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from maxdiffusion.attention.dense import Local
from maxdiffusion.parallel import axes, degree, token_multiple


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FrameKeys:
    """Keys and values of frames 1, 2, ... for the queries of the same frame; frame 0 has none.

    Attributes:
      k, v: b shards k n d, as `by_shard` makes them.
      per_frame: tokens of a frame, of queries and keys alike.
    """

    k: Any
    v: Any
    per_frame: int = dataclasses.field(metadata={"static": True})


def by_shard(x: Float[Array, "b k n d"], length: int, per_frame: int) -> Float[Array, "b shards own_k n d"]:
    """Keys or values of frames 1, 2, ... as the devices of the sequence axis use them: those of their own frames.

    The `length` tokens are padded and split evenly. A device's queries may begin and end within a frame, so it has the
    keys of both whole frames, and no step communicates any: on 8 devices 22 frames become 32. Frames that `x` lacks are
    zeros.
    """
    shards = degree(axes.SEQUENCE)
    own = (length + -length % token_multiple()) // shards
    starts = np.arange(shards) * own
    first, last = starts // per_frame, (starts + own - 1) // per_frame
    frames = first[:, None] + np.arange((last - first).max() + 1)
    given = x.reshape(x.shape[0], -1, per_frame, *x.shape[2:])
    given = jnp.pad(given, ((0, 0), (1, max(0, frames.max() - given.shape[1])), *[(0, 0)] * 3))
    return jnp.take(given, frames, axis=1).reshape(x.shape[0], shards, -1, *x.shape[2:])


def attend_frames(
    local: Local,
    q: Float[Array, "b s n d"],
    k: Float[Array, "b k n d"],
    v: Float[Array, "b k n d"],
    shard: Int[Array, ""] | int,
    per_frame: int,
) -> tuple[Float[Array, "b s n d"], Float[Array, "b s n"]]:
    """`local` over the keys of each query's frame, to be called under `shard_map`: one shard of `FrameKeys`.

    The frames become examples of the batch; queries of frame 0 have no key, so 0 and -inf.
    """
    b, s, n, d = q.shape
    start = shard * s
    offset = start % per_frame

    def fold(x: jax.Array) -> jax.Array:
        return x.reshape(-1, per_frame, n, d)

    def own(x: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(x.reshape(b, -1, *x.shape[2:]), offset, s, 1)

    framed = jax.lax.dynamic_update_slice_in_dim(jnp.zeros((b, k.shape[1], n, d), q.dtype), q, offset, 1)
    out, lse = local(fold(framed), fold(k), fold(v), None)
    present = start + jnp.arange(s) >= per_frame
    return jnp.where(present[:, None, None], own(out), 0), jnp.where(present[:, None], own(lse), -jnp.inf)
