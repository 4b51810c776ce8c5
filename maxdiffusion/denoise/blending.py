"""A call of the network for a long video, computed over context windows and blended."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from maxdiffusion.denoise.guidance import Call
from maxdiffusion.denoise.network import Cut
from maxdiffusion.denoise.windows import Windows
from maxdiffusion.parallel import axes, current, shard

# (the call of some windows, the state of their cache) -> (their velocities, the new state)
Evaluate = Callable[[Call, Any], tuple[jax.Array, Any]]


def turns(windows: Windows, rows: int) -> Int[np.ndarray, "turns windows frames"]:
    """The latent frames of the windows of each turn, for so many rows under the current placement."""
    return np.array([[windows.frames_of(each) for each in turn] for turn in numbers(windows, rows)], np.int32)


def numbers(windows: Windows, rows: int) -> list[list[int]]:
    """The numbers of the windows of each turn, likewise."""
    placement = current()
    return windows.turns(rows, 1 if placement is None else placement.degree(axes.BATCH))


def cut_call(call: Call, frames: Int[Array | np.ndarray, "windows frames"], cut: Cut) -> Call:
    """The call whose rows are the windows of each row of `call`, side by side; positions count from their start.

    In this order windows of a batch that is sharded stay on its devices, and those of one video spread over them.
    """
    count, (x, _, _) = len(frames), call
    at = jnp.tile(frames, (len(x), 1))
    x, timestep, context = jax.tree.map(lambda a: jnp.repeat(a, count, axis=0), call)

    def take(a: jax.Array) -> jax.Array:
        return jax.vmap(lambda row, at: jnp.take(row, at, axis=0, mode="clip"))(a, at)

    return shard(take(x), axes.BATCH, None, None, None, None), timestep, cut(context, take)


def by_window(windows: Windows, cut: Cut, evaluate: Evaluate, call: Call, cache: Any) -> tuple[jax.Array, Any]:
    """The blended velocity of a call, b f h w c, and the cache's states; one turn of windows is in memory at a time."""

    def turn(inputs: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        frames, cache = inputs
        return evaluate(cut_call(call, frames, cut), cache)

    velocities, cache = jax.lax.map(turn, (jnp.asarray(turns(windows, len(call[0]))), cache))
    return blend(windows, velocities, len(call[0])), cache


def blend(
    windows: Windows, velocities: Float[Array, "turns rows frames h w c"], rows: int
) -> Float[Array, "b f h w c"]:
    """The weighted mean of the windows' velocities at each latent frame; `rows` is b."""
    count, (_, _, _, *picture) = velocities.shape[1] // rows, velocities.shape
    lead, length = windows.leading, windows.length
    total = jnp.zeros((rows, lead + windows.frames, *picture), velocities.dtype)
    for number, (start, weights) in enumerate(zip(windows.starts, windows.weights, strict=True)):
        turn, place = divmod(number, count)
        one = velocities[turn, place::count] * jnp.asarray(weights, velocities.dtype)[:, None, None, None]
        total = total.at[:, :lead].add(one[:, :lead])
        total = total.at[:, lead + start : lead + start + length].add(one[:, lead:])
    return total
