"""Step caches, which reuse the trunk's output of earlier steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax

from maxdiffusion.denoise.solvers.solver import Numbers


@runtime_checkable
class Cache(Protocol):
    """A frozen value that computes the trunk or reuses its earlier output.

    Each of a step's calls of the network has its own state: one without guidance, two in two passes (prompt, negative
    prompt), one with batched guidance, whose rows hold both branches. It is zeros at the first step of every expert,
    so no expert sees another's.
    """

    def init(self, tokens: jax.ShapeDtypeStruct) -> Any:
        """The abstract state for such tokens: a hashable pytree (tuples) of ShapeDtypeStructs."""

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
