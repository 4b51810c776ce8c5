"""What a step may reuse of the steps before, instead of asking the network again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
from jaxtyping import Array, Float

from maxdiffusion.denoise.solvers.solver import Numbers

Velocity = Callable[[Float[Array, "b f h w c"]], Float[Array, "b f h w c"]]


@runtime_checkable
class Cache(Protocol):
    """A frozen value whose state, a pytree, travels with the loop's."""

    def init(self, x: Float[Array, "b f h w c"]) -> Any:
        """The state before the first step."""

    def velocity(self, velocity: Velocity, state: Any, step: Numbers, x: jax.Array) -> tuple[jax.Array, Any]:
        """The guided velocity at x of `step` (int32 scalar), computed or remembered, and the new state."""


@dataclasses.dataclass(frozen=True)
class NoCache:
    """Every step asks the network."""

    def init(self, x: Float[Array, "b f h w c"]) -> tuple[()]:
        return ()

    def velocity(
        self, velocity: Velocity, state: tuple[()], step: Numbers, x: jax.Array
    ) -> tuple[jax.Array, tuple[()]]:
        del step
        return velocity(x), state
