"""Classifier-free guidance (Ho & Salimans 2022): u + g (c - u), u for the negative prompt, c for the prompt."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Collection
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from maxdiffusion.denoise.network import Predict

log = logging.getLogger(__name__)


class Contexts(NamedTuple):
    """What the network is conditioned on: two pytrees of the same structure whose leaves lead with the batch."""

    positive: Any
    negative: Any = None  # None where nothing guides


@runtime_checkable
class Guidance(Protocol):
    """A frozen value that turns the network's function into the guided one."""

    def __call__(
        self,
        predict: Predict,
        x: Float[Array, "b f h w c"],
        timestep: Float[Array, " b"],
        contexts: Contexts,
        scale: Any,
    ) -> Float[Array, "b f h w c"]:
        """The guided velocity; `scale` is this step's g: data of the program, so that a new scale compiles nothing."""


@dataclasses.dataclass(frozen=True)
class NoGuidance:
    """The prompt's velocity alone: what guidance scale 1 means, at half the work."""

    def __call__(self, predict, x, timestep, contexts, scale):
        del scale
        return predict(x, timestep, contexts.positive)


@dataclasses.dataclass(frozen=True)
class TwoPassGuidance:
    """One call for the prompt, one for the negative prompt: the least memory."""

    def __call__(self, predict, x, timestep, contexts, scale):
        positive = predict(x, timestep, contexts.positive)
        negative = predict(x, timestep, contexts.negative)
        return negative + scale * (positive - negative)


@dataclasses.dataclass(frozen=True)
class BatchedGuidance:
    """Both in one call of twice the batch, which the data axis of a mesh may split.

    The order is prompt, negative prompt, example by example (c0 u0 c1 u1 ...): where the batch is sharded, doubling it
    in this order moves nothing between devices; c0 c1 .. u0 u1 .. would.
    """

    def __call__(self, predict, x, timestep, contexts, scale):
        both = jax.tree.map(_interleave, contexts.positive, contexts.negative)
        velocity = predict(_interleave(x, x), _interleave(timestep, timestep), both)
        positive, negative = velocity[0::2], velocity[1::2]
        return negative + scale * (positive - negative)


def _interleave(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.stack([a, b], axis=1).reshape(2 * a.shape[0], *a.shape[1:])


# Above this many tokens in the doubled batch, `auto` takes two passes: a device is busy long before, and the
# activations of one pass are what memory has to hold (832x480 with 81 frames is 32,760 tokens a video).
BATCHED_TOKENS = 32_768


def choose(mode: str, scales: Collection[float], tokens: int, doubled: int) -> Guidance:
    """The strategy of a config.

    Args:
      mode: `batched`, `two_pass` or `auto`, which chooses by size and logs why.
      scales: the guidance scales of the run; if all are 1, there is no guidance.
      tokens: video tokens of the whole batch, undoubled, on one data shard.
      doubled: of both branches; no more than `tokens` where the data axis has a device for either.
    """
    if all(scale == 1 for scale in scales):
        return NoGuidance()
    if mode == "auto":
        limit = max(tokens, BATCHED_TOKENS)
        mode = "batched" if doubled <= limit else "two_pass"
        log.info("guidance_mode=auto: %s, as both branches make %d tokens on a device (limit %d)", mode, doubled, limit)
    return BatchedGuidance() if mode == "batched" else TwoPassGuidance()
