"""Search of arrays for NaN and infinity."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def fault(tree: Any) -> str:
    """How many values of a pytree of floating arrays are not finite, such as "3 NaN and 1 infinite"; empty: none.

    Counted on the device: every process gets the same answer, and arrays stay where they are.
    """
    nan, infinite = (int(count) for count in np.asarray(_count(tree)))
    return " and ".join(f"{count} {name}" for count, name in ((nan, "NaN"), (infinite, "infinite")) if count)


@jax.jit
def _count(tree: Any) -> jax.Array:
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    found = [jnp.stack([jnp.isnan(leaf).sum(), jnp.isinf(leaf).sum()]) for leaf in leaves]
    return sum(found, jnp.zeros(2, jnp.int32))
