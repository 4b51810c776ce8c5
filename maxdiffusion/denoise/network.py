"""All that the loop knows of a network: a pure function and its parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

# (params, x: b f h w c float32, timestep: b float32 in 0..1000, context: pytree with leading axis b) -> velocity, as x.
Network = Callable[[Any, jax.Array, jax.Array, Any], jax.Array]
# The same with its parameters given.
Predict = Callable[[jax.Array, jax.Array, Any], jax.Array]


def split(module: nnx.Module) -> tuple[Network, Any]:
    """An nnx module as a pure function and its parameters, which may be loaded or described.

    The parameters are then arguments of the compiled program, not constants in it. Two experts of one architecture
    share the function.
    """
    graph, params = nnx.split(module)

    def network(params: Any, x: jax.Array, timestep: jax.Array, context: Any) -> jax.Array:
        return nnx.merge(graph, params)(x, timestep, context)

    return network, params
