"""Step caches: reuse in a step of what the network's trunk computed in the steps before."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax

from maxdiffusion.denoise.solvers.solver import Numbers


@runtime_checkable
class Cache(Protocol):
    """A frozen value that stands around the trunk.

    Its state belongs to one of a step's calls of the network: without guidance there is one, in two passes there are
    two (prompt, negative prompt); batched guidance makes one call, whose rows are of both. It begins as zeros at the
    first step of every segment, so no expert sees another's.
    """

    def init(self, tokens: jax.ShapeDtypeStruct) -> Any:
        """The state for such tokens: a hashable pytree (tuples) of ShapeDtypeStructs."""

    def __call__(
        self, step: Numbers, tokens: jax.Array, trunk: Callable[[jax.Array], jax.Array], state: Any
    ) -> tuple[jax.Array, Any]:
        """The trunk's output at `step` (int32 scalar, counted over the run), computed or reused, and the new state."""


@dataclasses.dataclass(frozen=True)
class NoCache:
    """Every step computes the trunk."""

    def init(self, tokens: jax.ShapeDtypeStruct) -> tuple[()]:
        return ()

    def __call__(
        self, step: Numbers, tokens: jax.Array, trunk: Callable[[jax.Array], jax.Array], state: tuple[()]
    ) -> tuple[jax.Array, tuple[()]]:
        return trunk(tokens), state
