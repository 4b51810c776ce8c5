"""Classifier-free guidance (Ho & Salimans 2022): u + g (c - u), u for the negative prompt, c for the prompt.

A strategy is a frozen value of two functions. `calls` makes the arguments (x, timestep, context) of each call of the
network in a step; `combine` makes the guided velocity of the results. The scale g is data of the program, so that a new
one compiles nothing.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from maxdiffusion.models.dit.context import Contexts, map_batched

log = logging.getLogger(__name__)

Call = tuple[jax.Array, jax.Array, Any]  # x: b f h w c, timestep: b, context


@dataclasses.dataclass(frozen=True)
class NoGuidance:
    """The prompt's velocity alone: guidance scale 1, at half the work."""

    def calls(self, x: jax.Array, timestep: jax.Array, contexts: Contexts) -> tuple[Call, ...]:
        return ((x, timestep, contexts.positive),)

    def combine(self, velocities: Sequence[jax.Array], scale: Any) -> Float[Array, "b f h w c"]:
        (velocity,) = velocities
        return velocity


@dataclasses.dataclass(frozen=True)
class TwoPassGuidance:
    """One call for the prompt, one for the negative prompt: the least memory."""

    def calls(self, x: jax.Array, timestep: jax.Array, contexts: Contexts) -> tuple[Call, ...]:
        negative = map_batched(lambda _, own: own, contexts.positive, contexts.negative)
        return (x, timestep, contexts.positive), (x, timestep, negative)

    def combine(self, velocities: Sequence[jax.Array], scale: Any) -> Float[Array, "b f h w c"]:
        positive, negative = velocities
        return negative + scale * (positive - negative)


@dataclasses.dataclass(frozen=True)
class BatchedGuidance:
    """One call of twice the batch, which the data axis of a mesh may split.

    The order is prompt, negative prompt, example by example (c0 u0 c1 u1 ...): where the batch is sharded, doubling it
    in this order moves nothing between devices; c0 c1 .. u0 u1 .. would.
    """

    def calls(self, x: jax.Array, timestep: jax.Array, contexts: Contexts) -> tuple[Call, ...]:
        both = map_batched(_interleave, contexts.positive, contexts.negative)
        return ((_interleave(x, x), _interleave(timestep, timestep), both),)

    def combine(self, velocities: Sequence[jax.Array], scale: Any) -> Float[Array, "b f h w c"]:
        (velocity,) = velocities
        positive, negative = velocity[0::2], velocity[1::2]
        return negative + scale * (positive - negative)


Guidance = NoGuidance | TwoPassGuidance | BatchedGuidance


def _interleave(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.stack([a, b], axis=1).reshape(2 * a.shape[0], *a.shape[1:])


# Above this many tokens in the doubled batch, `auto` makes two passes: a device is busy with far fewer, and two passes
# hold the activations of one branch at a time (832x480 with 81 frames is 32,760 tokens a video).
BATCHED_TOKENS = 32_768


def choose(mode: str, tokens: int, doubled: int) -> TwoPassGuidance | BatchedGuidance:
    """Chooses how guided steps evaluate both branches.

    Args:
      mode: `batched`, `two_pass` or `auto`, which chooses by size and logs why.
      tokens: video tokens of the whole batch, undoubled, on one data shard.
      doubled: the same with both branches in one batch; equal to `tokens` where the data axis has devices for both.
    """
    if mode == "auto":
        limit = max(tokens, BATCHED_TOKENS)
        mode = "batched" if doubled <= limit else "two_pass"
        log.info("guidance_mode=auto: %s, as both branches make %d tokens on a device (limit %d)", mode, doubled, limit)
    return BatchedGuidance() if mode == "batched" else TwoPassGuidance()
