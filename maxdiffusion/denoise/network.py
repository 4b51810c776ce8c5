"""A network as the denoise loop calls it: pure functions of its parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

# (context, take) -> the context of some latent frames; `take` takes them of an array b f ...
Cut = Callable[[Any, Callable[[jax.Array], jax.Array]], Any]


def cut_nothing(context: Any, take: Callable[[jax.Array], jax.Array]) -> Any:
    """The context itself: none of it is on the latents' frames."""
    return context


def no_padding(signal: Any) -> jax.Array | None:
    """None: every token is valid."""
    return None


def _undivided(*arguments: Any) -> Any:
    raise ValueError("this network's trunk has no first block")


@dataclasses.dataclass(frozen=True)
class Network:
    """A velocity computed in three parts, so that a step cache can reuse the trunk's output.

    Attributes:
      embed: (params, x: b f h w c float32, timestep: b float32 in 0..1000, context: pytree with leading axis b) ->
        (tokens: b s e, signal: a pytree for the other two).
      trunk: (params, tokens, signal, context) -> tokens.
      head: (params, tokens, signal) -> velocity, shaped as x.
      cut: see `Cut`.
      valid: signal -> which tokens are not padding, b s; None: all.
      first: (params, tokens, signal, context) -> (tokens before the trunk's first block, tokens after it, a pytree).
      rest: (params, tokens, the last two results of `first`, signal, context) -> tokens after all blocks.
    """

    embed: Callable[[Any, jax.Array, jax.Array, Any], tuple[jax.Array, Any]]
    trunk: Callable[[Any, jax.Array, Any, Any], jax.Array]
    head: Callable[[Any, jax.Array, Any], jax.Array]
    cut: Cut = cut_nothing
    valid: Callable[[Any], jax.Array | None] = no_padding
    first: Callable[..., tuple[jax.Array, jax.Array, Any]] = _undivided
    rest: Callable[..., jax.Array] = _undivided

    @classmethod
    def of(cls, velocity: Callable[[Any, jax.Array, jax.Array, Any], jax.Array]) -> Network:
        """A network that is all trunk: its tokens are x and its signal the timestep."""
        return cls(lambda params, x, timestep, context: (x, timestep), velocity, lambda params, tokens, signal: tokens)


def split(module: Any) -> tuple[Network, Any]:
    """An nnx module with the methods of `WanTransformer` as a network and its parameters, loaded or abstract.

    The parameters are then arguments of the compiled program, not constants in it. Two experts of one architecture
    share the functions. Its contexts have a method `cut(take)`, which windows call.
    """
    graph, params = nnx.split(module)

    def part(name: str) -> Callable[..., Any]:
        return lambda params, *args: getattr(nnx.merge(graph, params), name)(*args)

    def cut(context: Any, take: Callable[[jax.Array], jax.Array]) -> Any:
        return context.cut(take)

    def valid(signal: Any) -> jax.Array | None:
        return getattr(signal, "valid", None)

    embed, trunk, head, first, rest = map(part, ("embed", "trunk", "head", "first_block", "other_blocks"))
    return Network(embed, trunk, head, cut, valid, first, rest), params
